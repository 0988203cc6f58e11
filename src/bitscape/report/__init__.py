"""Results as they are kept and shown: run records, and the tables made from them."""
