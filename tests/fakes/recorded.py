"""Values and documents of the code before its packages were reordered, in tests/unit/recorded/.

values.json has hashes and short values; run_in_flight.zip has the documents of runs that were not finished.
Code that cannot reproduce the values, or cannot read the documents, breaks runs in flight and
reproducibility.
"""

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parents[1] / "unit" / "recorded"
VALUES: dict[str, Any] = json.loads((FOLDER / "values.json").read_text())
BUCKET = "recorded"
"""Bucket of the recorded runs; it is part of configuration hashes and dataset ids."""


def documents() -> dict[str, bytes]:
    """Content of every document of the runs in flight, by path."""
    with zipfile.ZipFile(FOLDER / "run_in_flight.zip") as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def canonical(value: Any) -> bytes:
    """The JSON that was hashed: sorted keys, no spaces, UTF-8; arrays as lists, other objects as text."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=_plain)
    return text.encode()


def sha256(value: Any) -> str:
    """sha256 of bytes, or of a value's canonical JSON."""
    return hashlib.sha256(value if isinstance(value, bytes) else canonical(value)).hexdigest()


def plain(value: Any) -> Any:
    """The value after a round trip through JSON."""
    return json.loads(canonical(value))


def _plain(value: Any) -> Any:
    if hasattr(value, "model_dump"):
        return value.dump() if hasattr(value, "dump") else value.model_dump(mode="json", by_alias=True)
    if hasattr(value, "__dataclass_fields__"):
        return {name: getattr(value, name) for name in value.__dataclass_fields__}
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, range):
        return list(value)
    return str(value)  # a Fraction


def small_run(**spec: Any) -> dict[str, Any]:
    """The recorded DistillRun, with parts of its spec replaced. Its endpoint exists only by
    AWS_ENDPOINT_URL."""
    optimizer = {"learningRate": 3.0e-3, "minLearningRate": 1.0e-4, "warmupTokens": 4096}
    source = f"s3://{BUCKET}/input/*.parquet"
    return {
        "apiVersion": "vpmoe.dev/v1alpha1",
        "kind": "DistillRun",
        "metadata": {"name": "tiny-run", "namespace": "default"},
        "spec": {
            "dataset": {"source": source, "maxLength": 512, "validFraction": 0.15, "workers": 1},
            "teacher": {"model": f"s3://{BUCKET}/models/teacher"},
            "student": {"shape": "tiny", "gpus": 1},
            "training": {
                "sequenceLength": 512,
                "globalBatchTokens": 2048,
                "optimizer": optimizer,
                "checkpoint": {"everyTokens": 8192, "keep": 3},
            },
            "stages": [{"name": "vanilla", "kind": "Vanilla", "tokens": 16384}],
            "evaluation": {"everyTokens": 8192, "documents": 16, "completions": 0},
            "storage": {"endpoint": "http://s3.invalid:9000", "bucket": BUCKET, "credentialsSecret": None},
            **spec,
        },
    }
