"""Asks student and teacher the questions of benchmark tasks at three efforts, and counts right answers.

EleutherAI's lm-evaluation-harness has the tasks: questions, prompts, how an answer is taken from a text, and
metrics. server.py asks a model that vLLM serves, harness.py joins the two, evaluate.py makes the record
(vpmoe.rollout.task_record). Only the final message of a completion is an answer. `vpmoe evaluate` is the
command; no job imports this, and no image has the harness.
"""
