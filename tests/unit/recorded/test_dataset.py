"""The sample's dataset equals the recorded one: its id, all files, and the records of its parts."""

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from demo import sample
from tests.fakes.recorded import BUCKET, VALUES, sha256, small_run
from tests.fakes.store import S3
from vpmoe.api import DistillRun
from vpmoe.clock import timestamp
from vpmoe.data.dataset import load_dataset
from vpmoe.data.preprocess.encode import EncoderPool
from vpmoe.data.preprocess.step import preprocess
from vpmoe.process.board import ProgressBoard
from vpmoe.provenance import Provenance
from vpmoe.rollout.prompts import completion_spans, completion_validity
from vpmoe.storage import Bucket, paths
from vpmoe.teacher.scores import training_content

RECORDED = VALUES["data"]


@pytest.fixture(scope="module")
def run(s3: S3) -> DistillRun:
    (s3.folder / BUCKET).mkdir(exist_ok=True)
    stages = [
        {"name": "vanilla", "kind": "Vanilla", "tokens": 4000},
        {
            "name": "rescored",
            "kind": "Rescored",
            "tokens": 4000,
            "subset": {"tokens": 6000, "fraction": 0.7},
        },
    ]
    spec: dict[str, Any] = small_run(stages=stages)
    spec["spec"]["dataset"] |= {"sampling": {"nonEnglishMax": 0.6}}
    return DistillRun.parse(spec)


def test_the_dataset_of_the_sample(run: DistillRun, tmp_path: Path) -> None:
    assert "AWS_ENDPOINT_URL" in os.environ  # overrides the endpoint of the recorded run
    bucket = Bucket.open(run.spec.storage)
    for file in sample.write(tmp_path, shards=3):
        bucket.put_file(f"input/{file.name}", file, {})
    meta = run.metadata
    step_provenance = Provenance(
        None, None, run.config_hash, meta.namespace, meta.name, run.uid8, "preprocess", 1, timestamp()
    )
    with EncoderPool(1) as encoders:
        preprocess(run, bucket, step_provenance, threading.Event(), ProgressBoard(), None, encoders)
    dataset = load_dataset(run, bucket)
    assert dataset.facts["id"] == RECORDED["id"]
    assert {name: subject.sha256 for name, subject in dataset.subjects.items()} == RECORDED["subjects"]
    assert sha256(bucket.get(paths.inputs(run))) == RECORDED["inputsJson"]
    census = [sha256(bucket.get(paths.census(dataset.facts["id"], part))) for part in range(3)]
    assert census == RECORDED["census"]
    records = [sha256(bucket.get(paths.part_record(dataset.facts["id"], part))) for part in range(3)]
    assert records == RECORDED["records"]
    assert training_content(dataset) == RECORDED["contentOf"]


def test_validity_and_spans_of_completions() -> None:
    import numpy as np

    for validity, spans, ids in RECORDED["completions"].values():
        ids_C = np.asarray(ids, np.int32)
        assert completion_validity(ids_C) == validity
        assert completion_spans(ids_C).tolist() == spans
