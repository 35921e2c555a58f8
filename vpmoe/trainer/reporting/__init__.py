"""Log, progress, metrics and conditions of a stage."""
