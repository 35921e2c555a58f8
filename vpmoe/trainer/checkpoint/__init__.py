"""Writing and loading a learner's checkpoints. Their format is in vpmoe/checkpoint."""
