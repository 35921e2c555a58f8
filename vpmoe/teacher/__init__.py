"""The teacher: which model it is, what it thinks of the data set's documents, and where that is kept.

`model` and `scores` name things and import neither torch nor vLLM, `subset` picks, `scorer` runs the model, `rescore` is the step.
docs/rescoring.md describes the whole.
"""
