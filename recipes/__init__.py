"""Runnable examples and the networks that they share; not part of the installed package."""
