"""The sampler of an OnPolicy stage."""
