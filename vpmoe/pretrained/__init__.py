"""Hugging Face model directories that a run names: pinned to their content, fetched from a bucket or the hub,
and kept whole on a disk. No torch: engines and upcycling read the files."""
