"""Measurements. None runs by default; each script does only the runs that its results file lacks."""
