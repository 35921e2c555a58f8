"""Labels and annotations that say where an object comes from: which run, step and attempt, which code, configuration and data.

Labels are short, to select by; annotations carry the same facts in full. Who puts them on what is the operator's and the jobs' business.
"""

import re

RUN = "vpmoe.dev/run"
STEP = "vpmoe.dev/step"
ATTEMPT = "vpmoe.dev/attempt"
GIT_SHA = "vpmoe.dev/git-sha"
CONFIG = "vpmoe.dev/config"
DATASET = "vpmoe.dev/dataset"
FINALIZER = "vpmoe.dev/delete-from-bucket"

SHORT = 16
"""Hex digits of a hash in a label."""

_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")


def label_value(key: str, value: str) -> str:
    """`value`, if Kubernetes takes it as the value of a label. ValueError otherwise."""
    if _VALUE.fullmatch(value) is None:
        raise ValueError(
            f"label {key}: {value!r} is not a label value (at most 63 letters, digits, '-', '_' and '.')"
        )
    return value


def labels(
    run: str, *, step: str, attempt: int, git_sha: str, config: str, dataset: str | None = None
) -> dict[str, str]:
    """Labels of an object of a run's step: hashes by their first 16 hex digits; no dataset label before the data set is known."""
    facts = {RUN: run, STEP: step, ATTEMPT: str(attempt), GIT_SHA: git_sha[:SHORT], CONFIG: config[:SHORT]}
    if dataset is not None:
        facts[DATASET] = dataset[:SHORT]
    return {key: label_value(key, value) for key, value in facts.items()}


def annotations(
    run: str, *, step: str, attempt: int, git_sha: str, config: str, dataset: str | None = None
) -> dict[str, str]:
    """The same facts in full."""
    facts = {RUN: run, STEP: step, ATTEMPT: str(attempt), GIT_SHA: git_sha, CONFIG: config}
    if dataset is not None:
        facts[DATASET] = dataset
    return facts
