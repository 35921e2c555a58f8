"""Preprocessing: input shards to a dataset of tokens and spans."""
