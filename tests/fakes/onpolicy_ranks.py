"""One rank of an OnPolicy stage; test_onpolicy.py starts two (ranks.py).

FOLDER/task.json names the run, the dataset and the documents. With KILL=rank:step that rank kills itself
during that step. Rank r writes its weights, train state and lines to FOLDER/rank-<r>.pt.
"""

import json
import os
import pickle
import signal
from pathlib import Path
from typing import Any

import torch

from tests.fakes import datasets, students, trainers
from tests.fakes.fake_onpolicy_peers import FakePeers
from tests.fakes.reporters import RecordingReporter
from tests.fakes.students import copy_slices
from vpmoe.api import DistillRun
from vpmoe.checkpoint.train_state import TrainState
from vpmoe.data import canary
from vpmoe.model import distributed
from vpmoe.model.device import choose
from vpmoe.storage import Bucket, manifest
from vpmoe.storage.manifest import Input
from vpmoe.trainer.data import collate
from vpmoe.trainer.onpolicy import window_wait

INPUTS = [datasets.TOKENIZER, Input("dataset", "s3://x", {"sha256": datasets.HEX}, {})]


class PeerReporter(RecordingReporter):
    """Makes the peers sample and score the next window while the trainer waits."""

    peers: FakePeers

    def update(self, **changes: Any) -> None:
        super().update(**changes)
        if changes.get("message", "").startswith("Waiting"):
            self.peers.advance()


def main(folder: Path) -> None:
    """Train the stage, as the rank that the environment names."""
    collate.PADDING = 0  # type: ignore[attr-defined] # the small vocabulary has no other
    canary.load_texts = students.load_canary  # nor the ids of real texts
    window_wait.POLL = 0.02
    task = json.loads((folder / "task.json").read_text())
    run = DistillRun.parse(task["spec"])
    bucket = Bucket.open(run.spec.storage)
    scratch = folder / f"{os.getpid()}"
    scratch.mkdir()
    device = choose()
    distributed.start(device, run.spec.student.expert_parallel)
    context = datasets.context(
        bucket, task["spec"], scratch, manifest.load(bucket, task["dataset"]), "onpolicy"
    )
    uploader = PeerReporter() if distributed.rank() == 0 else None
    if uploader:
        uploader.peers = FakePeers(context, pickle.loads((folder / "documents").read_bytes()), scratch)
    learner = students.learner(device, expert_parallel=run.spec.student.expert_parallel)
    trainer = trainers.trainer(context, device, learner, uploader)
    states: list[TrainState] = []
    advance, step = trainer._advance, learner.step

    def recording_advance(state: TrainState, tokens: int) -> TrainState:
        states.append(advance(state, tokens))
        return states[-1]

    def step_or_kill(rate: float) -> float:
        if os.environ.get("KILL") == f"{distributed.rank()}:{learner.steps}":
            os.kill(os.getpid(), signal.SIGKILL)
        return step(rate)

    trainer._advance, learner.step = recording_advance, step_or_kill  # type: ignore[method-assign]
    trainer.run()
    lines = [line for line in uploader.lines if line["event"] == "step"] if uploader else []
    torch.save(
        {"state": copy_slices(learner), "position": states[-1].dump(), "lines": lines},
        folder / f"rank-{distributed.rank()}.pt",
    )
    distributed.stop()
