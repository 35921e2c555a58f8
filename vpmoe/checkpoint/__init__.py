"""The checkpoint format: the train state in the manifest, and the tensors in the files. Readable without a
trainer."""
