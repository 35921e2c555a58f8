"""The trainer's side of an OnPolicy stage. It meets the sampler and the teacher in the bucket alone."""
