"""Labels and annotations that record the origin of an object: run, step, attempt, configuration and dataset.

Labels are for selectors and have shortened hashes; annotations have the full values.
"""

import re

RUN = "vpmoe.dev/run"
RUN_UID = "vpmoe.dev/run-uid"
RUN_DOCUMENT = "vpmoe.dev/run-document"
STEP = "vpmoe.dev/step"
ATTEMPT = "vpmoe.dev/attempt"
CONFIG = "vpmoe.dev/config"
DATASET = "vpmoe.dev/dataset"
FINALIZER = "vpmoe.dev/delete-from-bucket"
KUEUE_QUEUE = "kueue.x-k8s.io/queue-name"
"""Label of an object that Kueue admits."""

SHORT = 16
"""Number of hex digits of a hash in a label."""

_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")


def label_value(key: str, value: str) -> str:
    """`value`, if it is a valid label value. Raises ValueError otherwise."""
    if _VALUE.fullmatch(value) is None:
        raise ValueError(
            f"label {key}: {value!r} is not a label value. Use at most 63 letters, digits, '-', '_' and '.', "
            f"from a "
            "letter or digit to a letter or digit."
        )
    return value


def labels(run: str, *, step: str, attempt: int, config: str, dataset: str | None = None) -> dict[str, str]:
    """Labels of an object of a step, with hashes shortened to 16 hex digits. `dataset` is None before its id
    is known."""
    values = {RUN: run, STEP: step, ATTEMPT: str(attempt), CONFIG: config[:SHORT]}
    if dataset is not None:
        values[DATASET] = dataset[:SHORT]
    return {key: label_value(key, value) for key, value in values.items()}


def annotations(
    run: str, *, step: str, attempt: int, config: str, dataset: str | None = None
) -> dict[str, str]:
    """Annotations of an object of a step: the values of `labels` with full hashes."""
    values = {RUN: run, STEP: step, ATTEMPT: str(attempt), CONFIG: config}
    if dataset is not None:
        values[DATASET] = dataset
    return values
