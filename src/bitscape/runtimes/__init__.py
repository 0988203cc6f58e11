"""Runtimes on this machine: files opened, run, asked what they compute in float, and timed."""
