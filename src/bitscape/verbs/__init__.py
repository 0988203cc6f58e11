"""What users call: search, quantize and export, each with everything it needs done in the right order."""
