"""The trainer's side of an OnPolicy stage."""
