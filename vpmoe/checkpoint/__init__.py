"""The checkpoint format: where a stage stands, and the files that hold its state. Readable without a trainer."""
