"""The teacher: which model it is, which documents it scores, and the scores of datasets and of windows.

`rescore` is the step that scores a dataset, `score_windows` the one that scores the windows of an OnPolicy
stage. The model itself runs in vpmoe.inference.teacher_engine; nothing here imports torch or vLLM.
docs/reference/scores.md describes the whole.
"""
