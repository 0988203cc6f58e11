"""What files and layers cost in a runtime on this machine: time, size, operators left in float."""
