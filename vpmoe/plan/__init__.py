"""The plan of a run before anything is spent: tokens, GPUs, hours, bytes and memory, from the specification.

Pure arithmetic with pydantic and YAML only. `vpmoe plan` prints it, and the step preprocess refuses a teacher
by it.
"""
