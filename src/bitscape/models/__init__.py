"""Float networks: finding the user's, listing and replacing their layers, attention made of plain Linear layers."""
