"""The training loop with a small student: what stops it, what it reports, and exact resumption."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.fakes import datasets, students, trainers
from tests.fakes.checkpoints import equal_states
from tests.fakes.reporters import RecordingReporter, stop_after
from tests.fakes.students import copy_slices
from vpmoe.api.termination import TerminationRecord
from vpmoe.checkpoint.train_state import list_iterations, load_stage_end
from vpmoe.failure import Permanent, Terminated, classify_error
from vpmoe.model.learner import Learner
from vpmoe.model.router import routers
from vpmoe.storage import Bucket, paths
from vpmoe.trainer.data import collate
from vpmoe.trainer.reporting import router_monitor
from vpmoe.trainer.trainer import Trainer

pytestmark = pytest.mark.usefixtures("device")


@pytest.fixture
def spec(run_spec: dict[str, Any]) -> dict[str, Any]:
    run_spec["spec"]["dataset"]["maxLength"] = 64
    run_spec["spec"]["training"] |= {
        "sequenceLength": 64,
        "globalBatchTokens": 256,
        "checkpoint": {"everyTokens": 400, "keep": 9},
    }
    run_spec["spec"]["stages"] = [{"name": "vanilla", "kind": "Vanilla", "tokens": 2000}]
    run_spec["spec"]["evaluation"] |= {"everyTokens": 800}
    return run_spec


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
    dataset = datasets.write_dataset(
        bucket,
        [datasets.random_documents(random, 60), datasets.random_documents(random, 40)],
        [datasets.random_documents(random, 9)],
    )

    def make(uploader: RecordingReporter, learner: Learner | None = None) -> Trainer:
        context = datasets.context(bucket, spec, tmp_path, dataset)
        return trainers.trainer(context, device, learner or students.learner(device), uploader, held_out=9)

    return make


def test_a_stopped_stage_resumes_to_the_same_bits(
    make_trainer: MakeTrainer, bucket: Bucket, spec: dict[str, Any]
) -> None:
    spec["metadata"]["name"] = "alone"
    uninterrupted = make_trainer(RecordingReporter())
    uninterrupted.run()
    spec["metadata"]["name"] = "stopped"
    stopped: list[Trainer] = []
    stopped.append(make_trainer(RecordingReporter(stop_after(3, lambda: stopped[0].context))))
    with pytest.raises(
        Terminated, match=f"Stopped after step 3 of {uninterrupted.stage.plan.steps}, all of it saved"
    ):
        stopped[0].run()
    assert list_iterations(bucket, paths.checkpoints(stopped[0].context.run, "vanilla"))[0] == 3
    resumed = make_trainer(RecordingReporter())
    resumed.run()
    assert resumed.start.state.steps == 3 and equal_states(resumed.learner, uninterrupted.learner)
    assert isinstance(resumed.reporter.uploader, RecordingReporter) and isinstance(
        uninterrupted.reporter.uploader, RecordingReporter
    )
    assert (
        resumed.reporter.uploader.progress["held_out"] == uninterrupted.reporter.uploader.progress["held_out"]
    ), "the held-out loss before the first step is kept"
    last = [line for line in uninterrupted.reporter.uploader.lines if line["event"] == "step"][-1]
    assert uninterrupted.reporter.uploader.progress["loss"] == pytest.approx(last["loss"], rel=1e-5), (
        "the cross-entropy, which a Vanilla step minimises"
    )
    ends = [
        load_stage_end(bucket, paths.checkpoints(trainer.context.run, "vanilla"))
        for trainer in (uninterrupted, resumed)
    ]
    assert ends[0] is not None and ends[1] is not None and ends[0][1] == ends[1][1]


def test_a_loss_that_is_not_finite_is_an_error_and_changes_no_weight(
    make_trainer: MakeTrainer, bucket: Bucket, device: torch.device
) -> None:
    learner = students.learner(device)
    with torch.no_grad():
        learner.student.output[7] = torch.inf
    before = copy_slices(learner)
    trainer = make_trainer(RecordingReporter(), learner)
    trainer.held_out = None
    with pytest.raises(
        Permanent, match=r"NonFinite: the loss .* is not finite at step 1; the weights were not touched"
    ):
        trainer.run()
    assert all(
        torch.equal(after[1], before_step[1])
        for name, slices in copy_slices(learner).items()
        for after, before_step in zip(slices, before[name], strict=True)
    )
    assert learner.steps == 0 and not list_iterations(
        bucket, paths.checkpoints(trainer.context.run, "vanilla")
    )


def test_a_collapsed_router_is_a_condition_that_names_the_layer(
    make_trainer: MakeTrainer, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router_monitor, "PATIENCE", 2)
    learner = students.learner(device)
    routers(learner.student)["layers.2"].expert_bias[3] = -1e6
    trainer = make_trainer(RecordingReporter(), learner)
    trainer.run()
    assert isinstance(trainer.reporter.uploader, RecordingReporter)
    found = {
        condition.message.split(":")[0]: condition
        for condition in trainer.reporter.uploader.progress["conditions"]
    }
    assert found["layers.2"].type == "RouterCollapse" and found["layers.2"].reason == "DeadExpert"
    assert all(
        line["router"]["dead"]["layers.2"] >= 1
        for line in trainer.reporter.uploader.lines
        if line["event"] == "step"
    )


def test_a_router_that_stays_collapsed_ends_the_stage_with_a_checkpoint_and_the_layers_name(
    make_trainer: MakeTrainer, bucket: Bucket, spec: dict[str, Any], device: torch.device
) -> None:
    """A real collapse: expert 3 is never chosen, because its bias is far below what balancing can correct.

    The other experts get enough of the 200 tokens of a step never to be without one for three steps.
    """
    spec["spec"]["training"] |= {"maxCollapsedSteps": 3, "checkpoint": {"everyTokens": 100_000, "keep": 9}}
    learner = students.learner(device)
    routers(learner.student)["layers.2"].expert_bias[3] = -1e6
    trainer = make_trainer(RecordingReporter(), learner)
    with pytest.raises(Permanent) as caught:
        trainer.run()
    steps = trainer.stage.plan.steps
    assert steps is not None and steps > 6
    assert str(caught.value).startswith(
        "RouterCollapse: layers.2: 1 experts without a token, for up to 3 steps: 3. That is "
        f"training.maxCollapsedSteps (3), so the stage ends after step 3 of {steps}; checkpoint 3 has its "
    )
    assert isinstance(trainer.reporter.uploader, RecordingReporter)
    (condition,) = trainer.reporter.uploader.progress["conditions"]
    assert (condition.type, condition.reason) == ("RouterCollapse", "DeadExpert")
    assert condition.message.startswith("layers.2: ")

    # What the operator reads of the pod: no retry, and the layer.
    record = TerminationRecord.parse(classify_error(caught.value, rank=0).to_json_line().decode())
    assert record is not None and (record.kind, record.exit) == ("Permanent", 65)
    assert "RouterCollapse: layers.2" in record.message

    # The checkpoint is whole and not the end of the stage; an attempt that continues counts anew.
    folder = paths.checkpoints(trainer.context.run, "vanilla")
    assert list_iterations(bucket, folder) == [3] and load_stage_end(bucket, folder) is None
    again = make_trainer(RecordingReporter())
    assert again.start.state.steps == 3 and equal_states(again.learner, trainer.learner)
    with pytest.raises(Permanent, match=r"RouterCollapse: layers\.2: .* the stage ends after step 6 of"):
        again.run()


def test_a_collapse_that_is_shorter_than_the_limit_or_without_one_does_not_end_the_stage(
    make_trainer: MakeTrainer, bucket: Bucket, spec: dict[str, Any], device: torch.device
) -> None:
    for name, limit in (("none", 0), ("long", 100)):
        spec["metadata"]["name"] = name
        spec["spec"]["training"]["maxCollapsedSteps"] = limit
        learner = students.learner(device)
        routers(learner.student)["layers.2"].expert_bias[3] = -1e6
        trainer = make_trainer(RecordingReporter(), learner)
        trainer.run()
        assert load_stage_end(bucket, paths.checkpoints(trainer.context.run, "vanilla")) is not None


def test_a_stage_ends_early_if_its_evaluations_improve_too_little(
    make_trainer: MakeTrainer, bucket: Bucket, spec: dict[str, Any]
) -> None:
    spec["spec"]["stages"][0]["stop"] = {"evaluations": 1, "minImprovement": 0.9, "minValidity": 0.0}
    trainer = make_trainer(RecordingReporter())
    trainer.run()
    stage_end = load_stage_end(bucket, paths.checkpoints(trainer.context.run, "vanilla"))
    assert stage_end is not None and 800 <= stage_end[1].tokens < 2000
    assert (
        isinstance(trainer.reporter.uploader, RecordingReporter)
        and trainer.reporter.uploader.progress["state"] == "Succeeded"
    )
    assert (
        trainer.reporter.uploader.progress["tokens"].done
        == trainer.reporter.uploader.progress["tokens"].total
        == stage_end[1].tokens
    )


def test_a_stage_that_does_not_measure_the_required_validity_uses_all_its_tokens(
    make_trainer: MakeTrainer, bucket: Bucket, spec: dict[str, Any]
) -> None:
    spec["spec"]["stages"][0]["stop"] = {"evaluations": 1, "minImprovement": 0.9, "minValidity": 0.01}
    trainer = make_trainer(RecordingReporter())
    trainer.run()
    stage_end = load_stage_end(bucket, paths.checkpoints(trainer.context.run, "vanilla"))
    assert stage_end is not None and stage_end[1].tokens >= 2000


class Killed(BaseException):
    """Ends a trainer as a kill does: nothing more is reported or saved."""


def put_validity(trainer: Trainer, number: int, valid: int) -> None:
    """The record of the step validity: `valid` of 6 completions."""
    run = trainer.context.run
    record = {
        "run": run.identity,
        "config": run.config_hash,
        "stage": "vanilla",
        "iteration": number,
        "checkpoint": "c" * 64,
        "completions": 6,
        "validity": {"valid": valid, "truncated": 6 - valid},
    }
    trainer.context.bucket.write_json(paths.validity(run, "vanilla", number), record, {})


def evaluations(trainer: Trainer) -> list[tuple[int, Any, Any]]:
    """Of each evaluation the multiple of everyTokens, the validity and the checkpoint that has it."""
    assert isinstance(trainer.reporter.uploader, RecordingReporter)
    return [
        (line["tokens"] // 800, line["validity"], line["validityIteration"])
        for line in trainer.reporter.uploader.lines
        if line["event"] == "evaluation"
    ]


def test_a_stage_ends_early_when_a_measured_checkpoint_is_valid_enough(
    make_trainer: MakeTrainer, bucket: Bucket, spec: dict[str, Any]
) -> None:
    spec["spec"]["evaluation"] |= {"everyTokens": 800, "completions": 6}
    spec["spec"]["stages"][0]["stop"] = {"evaluations": 1, "minImprovement": 0.9, "minValidity": 0.5}
    trainer = make_trainer(RecordingReporter())
    put_validity(trainer, 1, 2)
    put_validity(trainer, 2, 3)
    put_validity(trainer, 3, 0)  # of a checkpoint that this stage never reaches
    trainer.run()
    assert evaluations(trainer) == [(0, None, None), (1, 2 / 6, 1), (2, 3 / 6, 2)]
    stage_end = load_stage_end(bucket, paths.checkpoints(trainer.context.run, "vanilla"))
    assert stage_end is not None and stage_end[1].tokens < 2000
    assert stage_end[1].validity is not None and stage_end[1].validity.share == 0.5


def test_a_resumed_stage_decides_by_the_validity_that_it_knew_before(
    make_trainer: MakeTrainer, bucket: Bucket, spec: dict[str, Any]
) -> None:
    spec["spec"]["evaluation"] |= {"everyTokens": 800, "completions": 6}
    spec["spec"]["stages"][0]["stop"] = {"evaluations": 1, "minImprovement": 0.9, "minValidity": 0.5}
    reporter = RecordingReporter()

    def kill_after_the_first_evaluation(step: int) -> None:
        if sum(line["event"] == "evaluation" for line in reporter.lines) == 2:
            raise Killed

    reporter._after = kill_after_the_first_evaluation
    killed = make_trainer(reporter)
    with pytest.raises(Killed):
        killed.run()
    assert evaluations(killed) == [(0, None, None), (1, None, None)]
    put_validity(killed, 1, 6)  # measured between the attempts
    resumed = make_trainer(RecordingReporter())
    resumed.run()
    assert evaluations(resumed)[-2:] == [(1, None, None), (2, 1.0, 1)], "the first decision is the same"
    assert isinstance(resumed.reporter.uploader, RecordingReporter)
    assert resumed.reporter.uploader.progress["state"] == "Succeeded"


def test_prometheus_metrics_of_the_latest_step_are_on_the_board(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(RecordingReporter())
    trainer.run()
    prometheus = trainer.context.board.metrics.render(None).decode()
    steps, tokens = trainer.stage.plan.steps, trainer.stage.plan.total
    for series in (
        f'vpmoe_train_step{{role="",run="",stage=""}} {steps}.0',
        f'vpmoe_train_step_seconds_count{{kind="Vanilla",role="",run="",stage=""}} {steps}.0',
        f'vpmoe_tokens_total{{role="",run="",stage=""}} {tokens}.0',
        'vpmoe_train_held_out_loss_nats{role="",run="",span="final",stage=""} ',
        'vpmoe_train_checkpoint_upload_seconds_count{role="",run="",stage=""} ',
    ):
        assert f"\n{series}" in prometheus
    assert "vpmoe_gpu_utilisation_ratio{" not in prometheus, "there is no GPU metric without a GPU"
