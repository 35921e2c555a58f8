"""The sampler of an OnPolicy stage. No torch in its process."""
