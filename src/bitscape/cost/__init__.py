"""What a policy costs: arithmetic, storage and memory, counted per layer for one image."""
