"""The trainer of all stages: processes, data order, the loop, checkpoints, metrics. docs/training.md describes the whole.

`launch` starts a stage's processes (no torch in it), `loop.train` is what each of them does. What is minimised is vpmoe.objectives'
business, the student itself vpmoe.model's.
"""
