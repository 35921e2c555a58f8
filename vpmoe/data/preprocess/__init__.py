"""The preprocess step: builds a dataset of tokens and spans from input shards."""
