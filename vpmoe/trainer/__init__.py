"""The training process: one stage of a run, on every rank."""
