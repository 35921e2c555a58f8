"""Where a stage starts: at its newest usable checkpoint, the end of the stage before, another run's
checkpoint, the initial weights that the step init has made, or random weights.

A damaged checkpoint of the stage is rejected with an error in the log, and the one before it is used:
repeating some steps is better than continuing from something unknown. A stage that has to begin from one
particular checkpoint has no second choice. reader.py loads them.
"""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from vpmoe.api.student import InitSpec
from vpmoe.checkpoint.format import CheckpointRejected
from vpmoe.checkpoint.train_state import TrainState, initial_state, list_iterations
from vpmoe.failure import Permanent
from vpmoe.model import distributed
from vpmoe.model.learner import Learner
from vpmoe.storage import Bucket, paths
from vpmoe.storage.manifest import Input, Manifest
from vpmoe.trainer.checkpoint.reader import CheckpointReader
from vpmoe.trainer.context import StageContext
from vpmoe.trainer.stages.stage_kind import StageKind

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """Where an attempt starts."""

    state: TrainState
    origin: str
    """For people: what it starts from."""
    sources: tuple[Input, ...] = ()
    """The checkpoint that the weights come from, if any."""
    rejected: Mapping[int, str] = field(default_factory=dict)
    """By iteration, newest first, checkpoints of the stage that could not be used, and why."""
    own: Manifest | None = None
    """The stage's own checkpoint that it resumes from."""


def load_start(context: StageContext, stage: StageKind, learner: Learner) -> Start:
    """Load the learner with the state that the attempt starts from. Every rank calls it and gets the same
    answer.

    The state has the microbatch of `stage`, with which the attempt goes on. Raises Permanent if checkpoints
    exist but none can be used, or if the one from which the stage has to start cannot be used.
    """
    name, bucket = context.stage.name, context.bucket
    reader = CheckpointReader(context.scratch, learner)
    folder = paths.checkpoints(context.run, name)
    rejected: dict[int, str] = {}
    for iteration in list_iterations(bucket, folder):
        try:
            found, state = reader.restore(bucket, f"{folder}/{iteration}", moments=True)
        except CheckpointRejected as rejection:
            log.error("REJECTED: %s", rejection)
            rejected[iteration] = str(rejection)
            continue
        stage.check_resumed(state)
        return Start(
            _with_microbatch(state, stage),
            f"from its checkpoint {iteration}",
            _sources(bucket, found),
            rejected,
            found,
        )
    if rejected:
        raise Permanent(
            f"stage {name}: none of its {len(rejected)} checkpoints can be used. "
            f"{' '.join(rejected.values())} "
            f"Restore their objects, or delete {bucket.url(folder)} to train the stage from its beginning."
        )
    try:
        start = _beginning(context, reader)
    except CheckpointRejected as rejection:
        raise Permanent(f"stage {name} cannot begin: {rejection}") from rejection
    seed_random(context.run.spec.training.seed, name, distributed.rank())
    return replace(start, state=_with_microbatch(stage.first_state(start.state), stage))


def _with_microbatch(state: TrainState, stage: StageKind) -> TrainState:
    return state.model_copy(update={"microbatch": stage.microbatch})


def _beginning(context: StageContext, reader: CheckpointReader) -> Start:
    """The start of a stage that has no checkpoint yet."""
    run, stage = context.run, context.stage
    number = [one.name for one in run.spec.stages].index(stage.name)
    if number:
        return _after_stage(context, reader, run.spec.stages[number - 1].name)
    if run.spec.resume_from:
        return _from_run(context, reader, run.spec.resume_from)
    if run.spec.student.init is not None:
        return _from_weights(context, reader, run.spec.student.init)
    return Start(initial_state(stage.name), f"from random weights of seed {run.spec.training.seed}")


def _from_weights(context: StageContext, reader: CheckpointReader, init: InitSpec) -> Start:
    """From the weights alone of another run's checkpoint, or from those that the step init has made."""
    state, run = initial_state(context.stage.name), context.run
    if init.checkpoint is not None:
        name, key = paths.split_url(init.checkpoint)
        source = context.bucket.other(name, "student.init.checkpoint")
        found, _ = reader.restore(source, key.removesuffix("/"), moments=False, begins=True)
        return Start(state, f"from the weights of {init.checkpoint}", _sources(source, found))
    folder = paths.init(run)
    if not context.bucket.exists(paths.manifest(folder)):
        raise Permanent(
            f"{context.bucket.url(folder)}: the run's initial weights are not made yet. Run python -m "
            "jobs.init first."
        )
    found, _ = reader.restore(context.bucket, folder, moments=False, begins=True)
    model = found.inputs["model"]
    commit = {name: digest for name, digest in model.digest.items() if name == "gitCommit"}
    facts = {"model": model.uri, **commit}
    own = Input("init", context.bucket.url(found.key), {"sha256": found.sha256}, facts)
    return Start(state, f"from the dense model {model.uri}", (own,))


def _after_stage(context: StageContext, reader: CheckpointReader, before: str) -> Start:
    """From the end of the stage before."""
    folder = paths.checkpoints(context.run, before)
    found = list_iterations(context.bucket, folder)[:1]
    if not found:
        raise Permanent(
            f"stage {context.stage.name} follows {before}, which has no checkpoint. Train that first: --step "
            f"{before}."
        )
    checkpoint, state = reader.restore(context.bucket, f"{folder}/{found[0]}", moments=True, begins=True)
    if not state.finished:
        raise Permanent(
            f"stage {context.stage.name} follows {before}, which has not finished: it is at {state.tokens} "
            f"tokens. Train that first: --step {before}."
        )
    return Start(
        next_stage_state(state, context.stage.name),
        f"from the end of stage {before}",
        _sources(context.bucket, checkpoint),
    )


def _from_run(context: StageContext, reader: CheckpointReader, url: str) -> Start:
    """Start from another run's newest checkpoint. Its data position is kept only if both runs have the same
    dataset."""
    name, key = paths.split_url(url)
    bucket, folder = context.bucket.other(name, "resumeFrom"), f"{key.rstrip('/')}/checkpoints"
    stages = {found.key.removeprefix(folder + "/").split("/")[0] for found in bucket.list(folder + "/")}
    newest = max(
        (
            (iteration, stage)
            for stage in stages
            for iteration in list_iterations(bucket, f"{folder}/{stage}")
        ),
        default=None,
    )
    if newest is None:
        raise Permanent(
            f"resumeFrom: {url} has no checkpoint. Name the folder of a run that has trained, "
            "s3://…/runs/namespace/name-uid."
        )
    found, state = reader.restore(bucket, f"{folder}/{newest[1]}/{newest[0]}", moments=True, begins=True)
    if found.inputs["dataset"].digest != {"sha256": context.dataset.sha256}:
        state = state.model_copy(update={"next_sequence": 0, "epoch": 0, "scored": None, "windows": None})
    return Start(
        next_stage_state(state, context.stage.name),
        f"from the newest checkpoint of {url}",
        _sources(bucket, found),
    )


def next_stage_state(before: TrainState, stage: str) -> TrainState:
    """The state in which a stage begins after another: the count of optimizer steps and the data streams
    continue."""
    return TrainState(
        stage=stage,
        steps=0,
        tokens=0,
        iteration=before.iteration,
        skipped_iterations=before.skipped_iterations,
        first_sequence=before.next_sequence,
        next_sequence=before.next_sequence,
        epoch=before.epoch,
        scored=before.scored,
        windows=before.windows,
    )


def seed_random(seed: int, stage: str, rank: int) -> None:
    """Reseed this process's generators for a stage: each rank and each stage draws its own numbers."""
    digest = hashlib.blake2b(f"{seed}/{stage}/{rank}".encode(), digest_size=7).digest()
    torch.manual_seed(int.from_bytes(digest))


def _sources(bucket: Bucket, found: Manifest) -> tuple[Input, ...]:
    return (Input("checkpoint", bucket.url(found.key), {"sha256": found.sha256}, {}),)
