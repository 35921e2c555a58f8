"""A run by hand whose only stage has finished: its dataset and its last checkpoint are in a bucket."""

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.fakes.checkpoints import save_checkpoints, state_at
from tests.fakes.store import S3, small_run
from vpmoe.api import DistillRun
from vpmoe.api.progress import SpanLoss
from vpmoe.data import dataset
from vpmoe.data.preprocess.encode import EncoderPool
from vpmoe.data.preprocess.step import preprocess
from vpmoe.model.learner import Learner
from vpmoe.process.board import ProgressBoard
from vpmoe.provenance import Provenance
from vpmoe.storage import Bucket, paths
from vpmoe.storage.bucket import json_bytes
from vpmoe.trainer.context import StageContext

BEFORE, LATEST = SpanLoss(reasoning=12.5, final=12.25), SpanLoss(reasoning=8.125, final=9.0)
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass(frozen=True)
class FinishedStage:
    """The run, and where it is."""

    run: DistillRun
    bucket: Bucket
    folder: Path
    """The bucket's objects as files."""

    @property
    def url(self) -> str:
        return self.bucket.url(paths.run(self.run))

    def provenance(self, attempt: int = 1, step: str = "vanilla-export") -> Provenance:
        run = self.run
        image = "registry.example.com/vpmoe/trainer:1"
        of_run = (run.config_hash, "default", run.metadata.name, run.uid8, step, attempt)
        return Provenance(COMMIT, image, *of_run, "2026-01-01T00:00:00Z")


def finish_stage(s3: S3, rows: list[Path], learner: Learner, scratch: Path, **spec: Any) -> FinishedStage:
    """Write the dataset, run.json and a checkpoint of `learner` at the end of stage vanilla."""
    written = small_run(s3)
    written["spec"]["dataset"] |= {
        "sampling": {"nonEnglishMax": 0.6},
        "validFraction": 0.45,
        "conversation": {"effort": "low=0.7,high=0.3"},
    }
    written["spec"] |= spec
    run = DistillRun.parse(written)
    bucket = Bucket.open(run.spec.storage)
    for path in rows:
        bucket.put_file(f"input/{path.name}", path, {})
    found = FinishedStage(run, bucket, s3.folder / run.spec.storage.bucket)
    with EncoderPool(1) as encoders:
        made = found.provenance(step="preprocess")
        preprocess(run, bucket, made, threading.Event(), ProgressBoard(), None, encoders)
    bucket.create(paths.run_json(run), json_bytes(run.document()), {"config": run.config_hash})
    finish_again(found, learner, scratch, 3)
    return found


def finish_again(found: FinishedStage, learner: Learner, scratch: Path, iteration: int) -> None:
    """Write another checkpoint at the end of the stage."""
    context = StageContext(
        found.run,
        found.run.spec.stages[0],
        found.bucket,
        dataset.load_dataset(found.run, found.bucket),
        found.provenance(step="vanilla"),
        threading.Event(),
        scratch,
    )  # type: ignore[arg-type]
    end = state_at(iteration, finished=True, before=BEFORE, latest=LATEST)
    save_checkpoints(context, learner, end)
