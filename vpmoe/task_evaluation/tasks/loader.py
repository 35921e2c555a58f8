"""Reads the questions of our tasks, for the harness: beside this file, wherever the package is installed."""

import json
from importlib.resources import files
from typing import Any

from datasets import Dataset


def load(questions: str, **others: Any) -> dict[str, Dataset]:
    """The split `test` of the file `questions`. `others`: what the harness adds."""
    text = (files("vpmoe.task_evaluation") / "tasks" / questions).read_text(encoding="utf-8")
    return {"test": Dataset.from_list([json.loads(line) for line in text.splitlines()])}
