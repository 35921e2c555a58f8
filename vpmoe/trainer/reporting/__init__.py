"""Progress, metrics and conditions of a stage."""
