"""Datasets: Harmony tokens and spans in the bucket, how they are read, packed and mixed. preprocess/ makes them. No torch."""
