"""One rank of a Vanilla stage that writes a checkpoint a step; test_checkpoint_writer.py starts two
(ranks.py).

FOLDER/task.json names the run and the dataset. With KILL=seed both ranks send themselves SIGKILL, each at its
own random moment after its first step. Rank r writes its state to FOLDER/rank-<r>.pt.
"""

import json
import os
import random
import signal
import threading
from pathlib import Path
from typing import Any

import torch

from tests.fakes import datasets, students, trainers
from tests.fakes.reporters import RecordingReporter
from tests.fakes.students import copy_slices
from vpmoe.api import DistillRun
from vpmoe.checkpoint.train_state import load_stage_end
from vpmoe.model import distributed
from vpmoe.model.device import choose
from vpmoe.storage import Bucket, manifest, paths
from vpmoe.storage.manifest import Manifest
from vpmoe.trainer.data import collate

LATEST = 0.25
"""Seconds after the first step within which a rank is killed: as long as the stage takes, about."""


def prepare(folder: Path, spec: dict[str, Any], dataset: Manifest) -> None:
    """Write the task of the ranks."""
    folder.mkdir()
    (folder / "task.json").write_text(json.dumps({"spec": spec, "dataset": dataset.key}))


def kill_soon(seed: int) -> None:
    """Let this process kill itself at a random moment."""
    delay = random.Random(f"{seed}/{distributed.rank()}").uniform(0, LATEST)
    print(f"rank {distributed.rank()} is killed {delay:.3f} s after its first step", flush=True)
    threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()


def main(folder: Path) -> None:
    """Train the stage, as the rank that the environment names."""
    collate.PADDING = 0  # type: ignore[attr-defined] # the small vocabulary has no other
    task = json.loads((folder / "task.json").read_text())
    run = DistillRun.parse(task["spec"])
    bucket = Bucket.open(run.spec.storage)
    scratch = folder / f"{os.getpid()}"
    scratch.mkdir()
    device = choose()
    distributed.start(device)
    context = datasets.context(bucket, task["spec"], scratch, manifest.load(bucket, task["dataset"]))
    learner = students.learner(device)
    trainer = trainers.trainer(
        context, device, learner, RecordingReporter() if distributed.rank() == 0 else None
    )
    if "KILL" in os.environ:
        step = learner.step

        def step_and_kill(rate: float) -> float:
            kill_soon(int(os.environ["KILL"]))
            learner.step = step  # type: ignore[method-assign]
            return step(rate)

        learner.step = step_and_kill  # type: ignore[method-assign]
    trainer.run()
    end = load_stage_end(bucket, paths.checkpoints(run, "vanilla"))
    if "KILL" in os.environ:  # the stage was faster
        os.kill(os.getpid(), signal.SIGKILL)
    assert end is not None
    torch.save(
        {"state": copy_slices(learner), "position": end[1].dump()}, folder / f"rank-{distributed.rank()}.pt"
    )
    distributed.stop()
