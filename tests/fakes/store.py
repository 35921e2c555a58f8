"""The S3 store of the tests, and the manifest of a small run with a bucket there."""

import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class S3:
    """A running versitygw. os.environ has its endpoint and credentials, for processes that a test starts."""

    endpoint: str
    access_key: str
    secret_key: str
    folder: Path
    """Objects as plain files, bucket/key. Tests that damage a stored object change its file."""


def small_run(s3: S3) -> dict[str, Any]:
    """A small valid DistillRun on a new bucket."""
    name = f"test-{secrets.token_hex(6)}"
    (s3.folder / name).mkdir()
    return {
        "apiVersion": "vpmoe.dev/v1alpha1",
        "kind": "DistillRun",
        "metadata": {"name": "tiny-run", "namespace": "default"},
        "spec": {
            "dataset": {
                "source": f"s3://{name}/input/*.parquet",
                "maxLength": 512,
                "validFraction": 0.15,
                "workers": 1,
            },
            "teacher": {"model": f"s3://{name}/models/teacher"},
            "student": {"shape": "tiny", "gpus": 1},
            "training": {
                "sequenceLength": 512,
                "globalBatchTokens": 2048,
                "optimizer": {"learningRate": 3.0e-3, "minLearningRate": 1.0e-4, "warmupTokens": 4096},
                "checkpoint": {"everyTokens": 8192, "keep": 3},
            },
            "stages": [{"name": "vanilla", "kind": "Vanilla", "tokens": 16384}],
            "evaluation": {"everyTokens": 8192, "documents": 16, "completions": 0},
            "storage": {"endpoint": s3.endpoint, "bucket": name, "credentialsSecret": None},
        },
    }
