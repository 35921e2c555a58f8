"""Measures the student at the end of a stage: held-out loss, validity of completions, bits per byte of the
canary.

`evaluate.evaluate` is the step. Its result is vpmoe.rollout.evaluation_record, written once;
vpmoe.rollout.gate reads it. docs/reference/evaluation.md describes the step. What is measured during training
is in vpmoe.trainer.
"""
