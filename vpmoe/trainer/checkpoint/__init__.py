"""Saving, restoring and resuming a stage."""
