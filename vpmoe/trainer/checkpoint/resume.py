"""Where a stage begins: at its own newest usable checkpoint, at the end of the stage before, at another run's state, or at random weights.

A damaged checkpoint of the stage is refused aloud and the one before it is used: better to repeat some steps than to go on from something
unknown. Where a stage has to begin from one certain checkpoint, there is no second choice. How one is read is restore.py's business.
"""

import hashlib
import logging
from dataclasses import dataclass, replace

import torch

from vpmoe.api.stages import OnPolicy, Rescored
from vpmoe.checkpoint.format import CheckpointRejected
from vpmoe.checkpoint.train_state import ConfidenceCentre, ScoredStream, TrainState, WindowStream, iterations
from vpmoe.data.spans import SPANS
from vpmoe.failure import Permanent
from vpmoe.model import distributed
from vpmoe.model.learner import Learner
from vpmoe.objectives.confidence import centre
from vpmoe.storage import Bucket, paths
from vpmoe.storage.manifest import Input, Manifest
from vpmoe.trainer.checkpoint.reader import Reader
from vpmoe.trainer.context import StageContext

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """How a stage begins."""

    position: TrainState
    words: str
    """For people: where from."""
    sources: tuple[Input, ...] = ()
    """The checkpoint that the weights come from, if any."""
    refused: tuple[str, ...] = ()
    """Checkpoints of the stage that had to be passed over, and why."""
    own: Manifest | None = None
    """The stage's own checkpoint that it goes on from."""


def begin(task: StageContext, learner: Learner) -> Start:
    """Bring the learner to where the stage stands. Every rank calls it and gets the same answer.

    Raises Permanent where checkpoints exist but none can be used, or where the one that the stage has to begin from cannot.
    """
    stage, bucket = task.stage, task.bucket
    reader = Reader(task.scratch, learner)
    folder = paths.checkpoints(task.run, stage.name)
    refused: list[str] = []
    for iteration in iterations(bucket, folder):
        try:
            found, position = reader.restore(bucket, f"{folder}/{iteration}", moments=True)
        except CheckpointRejected as refusal:
            log.error("REFUSED: %s", refusal)
            refused.append(str(refusal))
            continue
        check_scores(task, position)
        return Start(
            position, f"from its checkpoint {iteration}", _sources(bucket, found), tuple(refused), found
        )
    if refused:
        raise Permanent(
            f"stage {stage.name}: none of its {len(refused)} checkpoints can be used. {' '.join(refused)} Restore their objects, or delete "
            f"{bucket.url(folder)} to train the stage from its beginning."
        )
    try:
        start = _origin(task, reader)
    except CheckpointRejected as refusal:
        raise Permanent(f"stage {stage.name} cannot begin: {refusal}") from refusal
    seed_random(task.run.spec.training.seed, stage.name, distributed.rank())
    return replace(start, position=prepared(task, start.position))


def _origin(task: StageContext, reader: Reader) -> Start:
    """The beginning of a stage that has no checkpoint yet."""
    run, stage, bucket = task.run, task.stage, task.bucket
    number = [one.name for one in run.spec.stages].index(stage.name)
    if number:
        return _after(task, reader, run.spec.stages[number - 1].name)
    if run.spec.resume_from:
        return _go_on(task, reader, run.spec.resume_from)
    if run.spec.student.init:
        name, key = paths.split_url(run.spec.student.init)
        found, _ = reader.restore(bucket.other(name), key.rstrip("/"), moments=False, begins=True)
        return Start(
            first(stage.name),
            f"from the weights of {run.spec.student.init}",
            _sources(bucket.other(name), found),
        )
    return Start(first(stage.name), f"from random weights of seed {run.spec.training.seed}")


def _after(task: StageContext, reader: Reader, before: str) -> Start:
    """From the end of the stage before."""
    folder = paths.checkpoints(task.run, before)
    found = iterations(task.bucket, folder)[:1]
    if not found:
        raise Permanent(
            f"stage {task.stage.name} follows {before}, which has no checkpoint. Train that first: --step {before}."
        )
    checkpoint, position = reader.restore(task.bucket, f"{folder}/{found[0]}", moments=True, begins=True)
    if not position.finished:
        raise Permanent(
            f"stage {task.stage.name} follows {before}, which stands at {position.tokens} tokens. Train that first: --step {before}."
        )
    return Start(
        follow(position, task.stage.name), f"where stage {before} ended", _sources(task.bucket, checkpoint)
    )


def _go_on(task: StageContext, reader: Reader, url: str) -> Start:
    """From another run's newest checkpoint. Its data position is kept where it is of the same data set, of which it is a position."""
    name, key = paths.split_url(url)
    bucket, folder = task.bucket.other(name), f"{key.rstrip('/')}/checkpoints"
    stages = {found.key.removeprefix(folder + "/").split("/")[0] for found in bucket.list(folder + "/")}
    newest = max(
        ((iteration, stage) for stage in stages for iteration in iterations(bucket, f"{folder}/{stage}")),
        default=None,
    )
    if newest is None:
        raise Permanent(
            f"resumeFrom: {url} has no checkpoint. Name the folder of a run that has trained, s3://…/runs/namespace/name-uid."
        )
    found, position = reader.restore(bucket, f"{folder}/{newest[1]}/{newest[0]}", moments=True, begins=True)
    if found.inputs["dataset"].digest != {"sha256": task.dataset.sha256}:
        position = position.model_copy(
            update={"next_sequence": 0, "epoch": 0, "scored": None, "windows": None}
        )
    return Start(follow(position, task.stage.name), f"where {url} stands", _sources(bucket, found))


def first(stage: str) -> TrainState:
    """The beginning of a run's first stage."""
    return TrainState(stage=stage, steps=0, tokens=0, iteration=0, first_sequence=0, next_sequence=0, epoch=0)


def follow(before: TrainState, stage: str) -> TrainState:
    """The beginning of a stage after another: the count of optimizer steps and the data streams go on."""
    at = before.next_sequence
    return TrainState(
        stage=stage,
        steps=0,
        tokens=0,
        iteration=before.iteration,
        first_sequence=at,
        next_sequence=at,
        epoch=before.epoch,
        scored=before.scored,
        windows=before.windows,
    )


def prepared(task: StageContext, begins: TrainState) -> TrainState:
    """The beginning of a stage with what is fixed there: for Rescored, its place among the scored documents and what weighs 1; for
    OnPolicy its first prompt."""
    if isinstance(task.stage, OnPolicy):
        at = begins.windows.next_prompt if begins.windows else 0
        return begins.model_copy(update={"windows": WindowStream(first_prompt=at, next_prompt=at)})
    if task.scores is None or not isinstance(task.stage, Rescored):
        return begins
    scores, before = task.scores.facts["id"], begins.scored
    at = before.next_sequence if before is not None and before.scores == scores else 0
    found = {span: centre(task.scores.facts["histogram"][span], task.stage.confidence) for span in SPANS}
    log.info("Rescored: a token weighs 1 where the teacher's log-probability is %s", found)
    scored = ScoredStream(scores=scores, first_sequence=at, next_sequence=at)
    return begins.model_copy(update={"scored": scored, "objective": ConfidenceCentre(**found)})


def check_scores(task: StageContext, position: TrainState) -> None:
    """Raise Permanent where a stage that has begun would go on with other scores than it began with."""
    ours, began = (
        task.scores.facts["id"] if task.scores else None,
        position.scored.scores if position.scored else None,
    )
    if ours is not None and ours != began:
        raise Permanent(
            f"stage {task.stage.name} began with the teacher's scores {began}, and would go on with {ours}: what scores are made of has "
            "changed with the code. Go on with the image that the stage began with, or start a new run."
        )


def seed_random(seed: int, stage: str, rank: int) -> None:
    """Reseed this process's generators for a stage: each rank and each stage draws its own numbers."""
    digest = hashlib.blake2b(f"{seed}/{stage}/{rank}".encode(), digest_size=7).digest()
    torch.manual_seed(int.from_bytes(digest))


def _sources(bucket: Bucket, found: Manifest) -> tuple[Input, ...]:
    return (Input("checkpoint", bucket.url(found.key), {"sha256": found.sha256}, {}),)
