"""What the student can do at the end of a stage: held-out loss, Harmony validity of what it samples, bits per byte of a canary.

`evaluate.evaluate` is the step; `record` what it writes, once; `require.check` whether an OnPolicy stage may begin, which needs no
torch. docs/evaluation.md describes the whole. What is measured while a stage trains is vpmoe.training's business.
"""
