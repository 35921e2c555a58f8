"""Datasets of Harmony tokens and spans in the bucket: lookup, reading, packing, mixing. preprocess/ builds
them. No torch."""
