"""Checkpoints that are written while training goes on: their bytes, what they leave to training, and faults
of the store, of the machine and of the process."""

import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from tests.fakes import checkpoint_ranks, datasets, students, trainers
from tests.fakes.checkpoints import equal_states, filled, save_checkpoints, state_at
from tests.fakes.fault_proxy import Fault, FaultProxy, faulty
from tests.fakes.ranks import run_ranks
from tests.fakes.reporters import RecordingReporter
from tests.fakes.store import S3
from tests.fakes.students import new_seed
from tests.fakes.trainers import start_of
from tests.fakes.waiting import wait_until
from vpmoe.api import DistillRun
from vpmoe.api.memory import OPTIMIZER
from vpmoe.checkpoint.train_state import TrainState, list_iterations, load_stage_end
from vpmoe.failure import Terminated
from vpmoe.model import state
from vpmoe.model.batch import Batch
from vpmoe.model.learner import Learner
from vpmoe.storage import Bucket, Patience, StorageError, manifest, paths
from vpmoe.trainer.checkpoint.state_copy import BUFFERS, StateCopy, rank_file
from vpmoe.trainer.checkpoint.writer import CheckpointWriter
from vpmoe.trainer.context import StageContext
from vpmoe.trainer.data import collate
from vpmoe.trainer.trainer import Trainer

pytestmark = pytest.mark.usefixtures("device")
UPLOADS = r"PUT .*/checkpoints/vanilla/.*rank-00000"
"""Requests that write a rank's file."""


@pytest.fixture
def spec(run_spec: dict[str, Any]) -> dict[str, Any]:
    run_spec["spec"]["dataset"]["maxLength"] = 64
    run_spec["spec"]["training"] |= {
        "sequenceLength": 64,
        "globalBatchTokens": 256,
        "checkpoint": {"everyTokens": 1, "keep": 9},
    }
    run_spec["spec"]["stages"] = [{"name": "vanilla", "kind": "Vanilla", "tokens": 2000}]
    return run_spec


@pytest.fixture
def proxy(s3: S3) -> Iterator[FaultProxy]:
    with faulty(s3.endpoint) as it:
        yield it


@pytest.fixture
def behind(spec: dict[str, Any], proxy: FaultProxy) -> Bucket:
    """The bucket behind the proxy, through a client that gives up soon."""
    patience = Patience(attempts=2, connect=1, read=30, first_pause=0.05)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        return Bucket.open(DistillRun.parse(spec).spec.storage, patience=patience)


MakeTrainer = Callable[..., Trainer]


@pytest.fixture
def make_trainer(
    bucket: Bucket,
    spec: dict[str, Any],
    tmp_path: Path,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> MakeTrainer:
    """Makes trainers at the stage's state according to the bucket."""
    monkeypatch.setattr(collate, "PADDING", 0)  # the small vocabulary has no other
    random = np.random.default_rng(11)
    dataset = datasets.write_dataset(bucket, [datasets.random_documents(random, 100)], [[]])

    def make(reporter: RecordingReporter, other: Bucket | None = None) -> Trainer:
        context = replace(datasets.context(bucket, spec, tmp_path, dataset), bucket=other or bucket)
        return trainers.trainer(context, device, students.learner(device), reporter)

    return make


def before_each_step(trainer: Trainer, then: Callable[[int], None]) -> None:
    """Before a step, wait until no checkpoint is being written, and call `then` with the steps so far."""
    batches = trainer.stage.batches

    def waiting(state: TrainState, tell: Callable[[str], None]) -> list[Batch] | None:
        wait_until(lambda: not trainer.checkpoints.writing, "the checkpoint is written")
        then(state.steps)
        return batches(state, tell)

    trainer.stage.batches = waiting  # type: ignore[method-assign]


def iterations(trainer: Trainer, bucket: Bucket) -> list[int]:
    return list_iterations(bucket, paths.checkpoints(trainer.context.run, "vanilla"))


@pytest.fixture
def uninterrupted(make_trainer: MakeTrainer, spec: dict[str, Any]) -> Learner:
    """The student of a stage that nothing disturbed and that wrote one checkpoint, its last."""
    policy = spec["spec"]["training"]["checkpoint"]
    spec["metadata"]["name"] = "alone"
    spec["spec"]["training"]["checkpoint"] = {"everyTokens": 100_000}
    trainer = make_trainer(RecordingReporter())
    trainer.run()
    spec["metadata"]["name"] = "tiny-run"
    spec["spec"]["training"]["checkpoint"] = policy
    return trainer.learner


@pytest.fixture
def context(bucket: Bucket, spec: dict[str, Any], tmp_path: Path) -> StageContext:
    return datasets.context(bucket, spec, tmp_path, datasets.write_dataset(bucket, [[]], [[]]))


def test_the_files_are_those_of_the_safetensors_library(context: StageContext, device: torch.device) -> None:
    """Byte for byte, so a checkpoint has the same hashes whichever version wrote it."""
    learner = filled(device, 1.0, students.COMPLETE)
    save_checkpoints(context, learner, state_at(1))
    folder = paths.checkpoint(context.run, "vanilla", 1)
    found = manifest.load(context.bucket, paths.manifest(folder)).subjects
    expected: dict[str, dict[str, torch.Tensor]] = {rank_file(0): {}, BUFFERS: {}}
    for held in state.slices(learner):
        file = BUFFERS if held.name.startswith("buffer/") else rank_file(0)
        expected[file][f"{held.name}[{held.start}:{held.stop}]"] = held.tensor.detach().clone()
    for name, values in state.random_state().items():
        expected[rank_file(0)][f"random/0/{name}[0:{values.numel()}]"] = values
    assert found.keys() == expected.keys()
    for name, tensors in expected.items():
        content = save(tensors, metadata={"format": "pt"})
        assert context.bucket.read(found[name], 0, found[name].size) == content


def test_a_copy_has_the_bytes_that_the_plan_counts(device: torch.device) -> None:
    """Weights and moments of every parameter, in a rank's memory once; biases and random state are small."""
    learner = students.learner(device)
    parameters = sum(weight.numel() for weight in learner.student.parameters())
    beside = sum(values.numel() for values in state.random_state().values())
    beside += sum(
        4 * held.tensor.numel() for held in state.slices(learner) if held.name.startswith("buffer/")
    )
    assert OPTIMIZER * parameters + beside <= StateCopy(learner).nbytes < OPTIMIZER * parameters + beside + 16


def test_what_training_does_after_a_save_is_not_in_the_checkpoint(
    context: StageContext, device: torch.device, behind: Bucket, proxy: FaultProxy
) -> None:
    proxy.faults = [Fault("held", UPLOADS)]
    learner = filled(device, 1.0)
    writer = CheckpointWriter(
        replace(context, bucket=behind), learner, trainers.INPUTS, (), RecordingReporter()
    )
    writer.save(state_at(1))
    for piece in state.slices(learner):
        piece.tensor.fill_(7.0)
    assert writer.writing and not list_iterations(context.bucket, paths.checkpoints(context.run, "vanilla"))
    proxy.release.set()
    writer.wait()
    writer.close()
    loaded = students.learner(device)
    start_of(context, loaded)
    assert equal_states(loaded, filled(device, 1.0))


def test_a_checkpoint_needs_no_disk(context: StageContext, device: torch.device, tmp_path: Path) -> None:
    """A full one cannot keep it from being written."""
    learner = filled(device, 1.0)
    save_checkpoints(replace(context, scratch=tmp_path / "there" / "is" / "none"), learner, state_at(1))
    assert list_iterations(context.bucket, paths.checkpoints(context.run, "vanilla")) == [1]


@pytest.mark.parametrize("request_", [UPLOADS, r"PUT .*/checkpoints/vanilla/2/manifest.json"])
def test_a_checkpoint_that_the_store_refuses_ends_the_stage_at_the_next_step(
    make_trainer: MakeTrainer,
    bucket: Bucket,
    behind: Bucket,
    proxy: FaultProxy,
    uninterrupted: Learner,
    request_: str,
) -> None:
    """The previous checkpoint is valid, what there is of the next one is not taken, and another attempt ends
    with the same bits."""
    reporter = RecordingReporter()
    trainer = make_trainer(reporter, behind)

    def fail_second(steps: int) -> None:
        if steps == 1:
            proxy.faults = [Fault("503", request_)]

    before_each_step(trainer, fail_second)
    with pytest.raises(StorageError, match="rank 0 could not write its part of a checkpoint: ") as caught:
        trainer.run()
    trainer.checkpoints.close()
    assert caught.value.reason == "Unreachable", "an interruption, after which the next attempt goes on"
    assert [line["step"] for line in reporter.lines if line["event"] == "step"] == [1, 2]
    assert iterations(trainer, bucket) == [1]
    resumed = make_trainer(RecordingReporter())
    assert resumed.start.state.steps == 1
    resumed.run()
    assert equal_states(resumed.learner, uninterrupted)


def test_training_goes_on_while_a_checkpoint_is_written_and_says_that_the_next_is_late(
    make_trainer: MakeTrainer,
    bucket: Bucket,
    behind: Bucket,
    proxy: FaultProxy,
    uninterrupted: Learner,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The first of a checkpoint a step is held until four more steps are done: none of those is written, and
    the one that is due then is. It is held too: the step after, at whose end the next is due, does not wait
    for it."""
    proxy.faults = [Fault("held", r"PUT .*/checkpoints/vanilla/(1|5)/rank")]
    trainer: list[Trainer] = []

    def after(step: int) -> None:
        if step == 5:
            assert trainer[0].checkpoints.writing and iterations(trainer[0], bucket) == []
            proxy.release.set()
            trainer[0].checkpoints.wait()
            proxy.release.clear()
        if step == 7:
            assert trainer[0].checkpoints.writing and trainer[0].checkpoints.saved == 5
            proxy.release.set()
            trainer[0].checkpoints.wait()

    trainer.append(make_trainer(RecordingReporter(after), behind))
    with caplog.at_level(logging.WARNING, "vpmoe.trainer.trainer"):
        trainer[0].run()
    written = sorted(iterations(trainer[0], bucket))
    assert written[:2] == [1, 5] and 6 not in written and written[-1] == trainer[0].stage.plan.steps
    first = caplog.messages[0]
    assert first.startswith("Checkpoint 2 is due, but checkpoint 1 is still being written, for ")
    assert sum("checkpoint 1 is still" in message for message in caplog.messages) == 1, "said once"
    assert equal_states(trainer[0].learner, uninterrupted)


def test_a_trainer_that_is_asked_to_stop_while_a_checkpoint_is_written_saves_its_last_step(
    make_trainer: MakeTrainer, bucket: Bucket, behind: Bucket, proxy: FaultProxy, uninterrupted: Learner
) -> None:
    proxy.faults = [Fault("held", r"PUT .*/checkpoints/vanilla/1/rank")]
    trainer: list[Trainer] = []

    def after(step: int) -> None:
        if step == 3:
            trainer[0].context.stopping.set()
            threading.Timer(0.2, proxy.release.set).start()

    trainer.append(make_trainer(RecordingReporter(after), behind))
    with pytest.raises(Terminated, match=r"Stopped after step 3 of .*, all of it saved"):
        trainer[0].run()
    assert iterations(trainer[0], bucket) == [3, 1]
    resumed = make_trainer(RecordingReporter())
    assert resumed.start.state.steps == 3
    resumed.run()
    assert equal_states(resumed.learner, uninterrupted)


def test_a_checkpoint_is_due_by_time_too_and_changes_no_bit(
    make_trainer: MakeTrainer,
    bucket: Bucket,
    spec: dict[str, Any],
    uninterrupted: Learner,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The clock is a stand-in: between two steps pass 20 minutes, and the interval is 40."""
    spec["spec"]["training"]["checkpoint"] = {"everyTokens": 100_000, "interval": "40m", "keep": 9}
    now = [0.0]
    monkeypatch.setattr("vpmoe.trainer.checkpoint.writer.monotonic", lambda: now[0])
    trainer = make_trainer(RecordingReporter())

    def tick(steps: int) -> None:
        now[0] = 1200.0 * steps

    before_each_step(trainer, tick)
    trainer.run()
    steps = trainer.stage.plan.steps
    assert steps is not None
    assert sorted(iterations(trainer, bucket)) == sorted({*range(3, steps, 2), steps})
    assert equal_states(trainer.learner, uninterrupted)


def test_two_ranks_that_are_killed_while_they_write_end_with_the_same_bits(
    make_trainer: MakeTrainer, bucket: Bucket, spec: dict[str, Any], tmp_path: Path
) -> None:
    """Real processes that write a checkpoint a step and kill themselves at a random moment, several times: no
    half-written checkpoint is taken."""
    seed = new_seed()
    spec["spec"]["student"]["gpus"] = 2
    dataset = make_trainer(RecordingReporter()).context.dataset
    results = {}
    for name, kills in (("alone", 0), ("killed", 2)):
        spec["metadata"]["name"] = name
        folder = tmp_path / name
        checkpoint_ranks.prepare(folder, spec, dataset)
        for number in range(kills):
            codes = run_ranks(checkpoint_ranks.main, folder, KILL=str(seed + number))
            assert any(codes), "at least one was killed"
        assert run_ranks(checkpoint_ranks.main, folder) == [0, 0]
        results[name] = [torch.load(folder / f"rank-{rank}.pt") for rank in range(2)]
    for alone, killed in zip(results["alone"], results["killed"], strict=True):
        assert alone["position"] == killed["position"]
        assert alone["state"].keys() == killed["state"].keys()
        for name, slices in alone["state"].items():
            for one, other in zip(slices, killed["state"][name], strict=True):
                assert one[0] == other[0] and torch.equal(one[1], other[1]), name
    run = datasets.context(bucket, spec, tmp_path, dataset).run
    assert load_stage_end(bucket, paths.checkpoints(run, "vanilla")) is not None
