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
from vpmoe.api.metrics import line_time
from vpmoe.api.termination import TerminationRecord
from vpmoe.checkpoint.train_state import list_iterations, load_stage_end
from vpmoe.data.packing import PackedDocument
from vpmoe.failure import Permanent, Terminated, classify_error
from vpmoe.model.batch import Batch
from vpmoe.model.learner import Learner
from vpmoe.model.router import routers
from vpmoe.model.shapes import SHAPES
from vpmoe.storage import Bucket, paths
from vpmoe.trainer.data import collate
from vpmoe.trainer.reporting import router_monitor
from vpmoe.trainer.stages import teacher_forced
from vpmoe.trainer.teacher_forced.client import WaitMeter
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
    documents = [datasets.random_documents(random, 60), datasets.random_documents(random, 40)]
    dataset = datasets.write_dataset(bucket, documents, [datasets.random_documents(random, 9)])
    scores = datasets.write_scores(bucket, dataset, documents, random)

    def make(uploader: RecordingReporter, learner: Learner | None = None) -> Trainer:
        of_stage = scores if spec["spec"]["stages"][0]["kind"] == "Rescored" else None
        context = datasets.context(bucket, spec, tmp_path, dataset, scores=of_stage)
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


def test_after_three_skipped_steps_the_next_is_an_error_and_no_weight_has_changed(
    make_trainer: MakeTrainer, bucket: Bucket, device: torch.device
) -> None:
    learner = students.learner(device)
    with torch.no_grad():
        learner.student.output[7] = torch.inf
    before = copy_slices(learner)
    trainer = make_trainer(RecordingReporter(), learner)
    trainer.held_out = None
    message = (
        r"NonFinite: the loss \(nan\) is not finite after 3 steps, and neither were those of the 3 steps "
        "before, which were skipped; the weights were not touched. In a new run"
    )
    with pytest.raises(Permanent, match=message):
        trainer.run()
    assert all(
        torch.equal(after[1], before_step[1])
        for name, slices in copy_slices(learner).items()
        for after, before_step in zip(slices, before[name], strict=True)
    )
    assert learner.steps == 0
    # The next attempt counts on: it begins after two skipped steps.
    assert list_iterations(bucket, paths.checkpoints(trainer.context.run, "vanilla")) == [2]
    again = make_trainer(RecordingReporter())
    again.held_out = None
    assert again.start.state.skipped_in_a_row == 2 and again.learner.steps == 0
    with pytest.raises(Permanent, match=message):
        again.run()


def token_of_one_step(trainer: Trainer, step: int) -> int:
    """A token that only the batch of this step has, and no held-out document."""
    assert trainer.held_out is not None and trainer.stage.plan.steps is not None
    others = [
        batch.tokens[~batch.padding]
        for other in range(trainer.stage.plan.steps)
        if other != step
        for batch in trainer.stage.plan.batches(other)
    ] + [batch.tokens[~batch.padding] for batch in trainer.held_out.batches]
    own = [batch.tokens[~batch.padding] for batch in trainer.stage.plan.batches(step)]
    return min(set(torch.cat(own).tolist()) - set(torch.cat(others).tolist()))


def with_embedding(
    device: torch.device, token: int, value: float, teacher_width: int | None = None
) -> Learner:
    """A student whose embedding of a token is `value`: infinite, it spoils the batches that have the token,
    and those alone."""
    learner = students.learner(device, teacher_width=teacher_width)
    with torch.no_grad():
        learner.student.embedding.weight[token] = value
    return learner


def train_by_hand(trainer: Trainer, learner: Learner, bad: int) -> int:
    """Train a learner on the steps of a trainer that has not begun, but for the step `bad`. Returns the
    stage's tokens."""
    seen, state = 0, trainer.start.state
    assert trainer.stage.plan.steps is not None
    for step in range(trainer.stage.plan.steps):
        batches = trainer.stage.batches(state.model_copy(update={"steps": step}), lambda message: None)
        assert batches is not None
        counts = torch.stack([batch.counts for batch in batches]).sum(0)
        seen += int(counts[0])
        if step != bad:
            objective = trainer.stage.objective(step, counts)
            learner.forward_backward(batches, objective, int(counts[0]))
            learner.step(trainer._learning_rate(seen))
    return seen


def test_a_bad_step_is_skipped_and_recorded_and_training_is_as_if_it_had_no_batch(
    make_trainer: MakeTrainer, spec: dict[str, Any], device: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    """The reference trains by hand on the other steps. A resumed stage ends with the same bits and state."""
    spec["metadata"]["name"] = "alone"
    reporter = RecordingReporter()
    bad, probe = 2, make_trainer(RecordingReporter())
    token, steps = token_of_one_step(probe, bad), probe.stage.plan.steps
    assert steps is not None
    trainer = make_trainer(reporter, with_embedding(device, token, torch.inf))
    trainer.run()

    reference = with_embedding(device, token, torch.inf)
    seen = train_by_hand(probe, reference, bad)
    assert equal_states(trainer.learner, reference) and trainer.learner.steps == steps - 1

    # What is recorded: the step's documents, in the state, in its line, and as a condition.
    end = load_stage_end(trainer.context.bucket, paths.checkpoints(trainer.context.run, "vanilla"))
    assert end is not None
    (skipped,) = end[1].skipped
    assert (end[1].steps, end[1].iteration, end[1].updates, end[1].tokens) == (steps, steps, steps - 1, seen)
    batches = probe.stage.plan.batches(bad)
    assert (skipped.step, skipped.number, skipped.kind) == (bad + 1, 1, "Vanilla")
    assert (skipped.loss, skipped.loss_by_rank, skipped.gradient_norm) == ("nan", ("nan",), "nan")
    assert skipped.tokens == sum(int(batch.counts[0]) for batch in batches)
    documents = probe.stage.documents
    read = [
        documents.read_document(PackedDocument(part, number, int(documents.lengths[part][number])))[0]
        for part in range(2)
        for number in skipped.batch.documents.get(documents.stem(part), ())
    ]
    trained = torch.cat([batch.tokens[~batch.padding] for batch in batches])
    assert sorted(np.concatenate(read).tolist()) == sorted(trained.tolist())
    assert (skipped.batch.first_sequence, skipped.batch.sequences) == (bad * 4, 4)
    lines = [line for line in reporter.lines if line["event"] in ("step", "skipped")]
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    (line,) = (line for line in lines if line["event"] == "skipped")
    assert line["step"] == bad + 1 and line["batch"]["documents"] == skipped.dump()["batch"]["documents"]
    (condition,) = reporter.progress["conditions"]
    assert (condition.type, condition.reason) == ("StepSkipped", "NonFinite")
    assert condition.message == (
        "step 3 was skipped: loss nan (rank 0), gradient norm nan. No weight moved; the stage has skipped 1 "
        "so far"
    )
    samples = trainer.context.board.metrics.render(None).decode().splitlines()
    (value,) = (line.split()[-1] for line in samples if line.startswith("vpmoe_train_skipped_steps_total{"))
    assert float(value) == 1

    spec["metadata"]["name"] = "stopped"
    stopped: list[Trainer] = []
    stop = RecordingReporter(stop_after(bad + 1, lambda: stopped[0].context))
    stopped.append(make_trainer(stop, with_embedding(device, token, torch.inf)))
    with pytest.raises(Terminated):
        stopped[0].run()
    resumed = make_trainer(RecordingReporter())
    assert resumed.learner.steps == bad and resumed.start.state.steps == bad + 1
    resumed.run()
    resumed_end = load_stage_end(resumed.context.bucket, paths.checkpoints(resumed.context.run, "vanilla"))
    assert equal_states(resumed.learner, reference) and resumed_end is not None and resumed_end[1] == end[1]

    # Rank 0 alone says it.
    assert any("was skipped: loss nan (rank 0)" in message for message in caplog.messages)
    caplog.clear()
    resumed.reporter.uploader = None
    resumed.reporter.log_skipped(end[1], tokens=1, seconds=1.0, ended=line_time())
    assert not caplog.messages


class LocalTeacher:
    """In the place of a RemoteTeacher: its hidden states follow from the tokens. As with the remote one, each
    microbatch must have been announced and is asked for once, in that order."""

    width = 24

    def __init__(self) -> None:
        self._announced: list[Batch] = []
        self.meter = WaitMeter(torch.device("cpu"))
        generator = torch.Generator().manual_seed(5)
        self._hidden_VG = torch.randn(students.SMALL.vocabulary, self.width, generator=generator)

    def output(self, vocabulary: int) -> torch.Tensor:
        return self._hidden_VG.flip(0)

    def announce(self, batches: list[Batch], then: Batch | None = None) -> None:
        self._announced = list(batches)

    def hidden_of(self, batch: Batch) -> torch.Tensor:
        assert torch.equal(batch.tokens, self._announced.pop(0).tokens)
        return self._hidden_VG[batch.tokens.flatten()]

    def disconnect(self) -> None:
        assert not self._announced


@pytest.mark.parametrize(
    "stage, kind",
    [
        pytest.param({"kind": "Rescored", "mix": 0.5}, "Rescored", id="Rescored"),
        pytest.param({"kind": "Rescored", "mix": 0.5}, "Vanilla", id="Vanilla-step-of-Rescored"),
        pytest.param({"kind": "TeacherForced"}, "TeacherForced", id="TeacherForced"),
    ],
)
def test_every_kind_of_stage_on_the_dataset_skips_a_bad_step(
    make_trainer: MakeTrainer,
    bucket: Bucket,
    spec: dict[str, Any],
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    stage: dict[str, Any],
    kind: str,
) -> None:
    monkeypatch.setattr(teacher_forced, "connect", lambda context, device: LocalTeacher())
    monkeypatch.setitem(SHAPES, "tiny", students.SMALL)
    spec["spec"]["stages"] = [{"name": "vanilla", "tokens": 2000, **stage}]
    width = LocalTeacher.width if kind == "TeacherForced" else None
    probe = make_trainer(RecordingReporter(), students.learner(device, teacher_width=width))
    plan = probe.stage.plan
    assert plan.steps is not None
    bad = next(step for step in range(2, plan.steps) if plan.kind(step) == kind)
    token = token_of_one_step(probe, bad)
    trainer, reference = (with_embedding(device, token, torch.inf, width) for _ in range(2))
    run = make_trainer(RecordingReporter(), trainer)
    run.run()
    train_by_hand(probe, reference, bad)
    end = load_stage_end(bucket, paths.checkpoints(run.context.run, "vanilla"))
    assert end is not None and equal_states(trainer, reference)
    (skipped,) = end[1].skipped
    assert (skipped.kind, skipped.step, skipped.loss) == (kind, bad + 1, "nan")
    if kind == "Rescored":
        assert all(number % 2 == 0 for of in skipped.batch.documents.values() for number in of), "scored ones"


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


def test_a_stage_whose_required_validity_is_never_measured_uses_all_its_tokens(
    make_trainer: MakeTrainer, bucket: Bucket, spec: dict[str, Any]
) -> None:
    spec["spec"]["evaluation"] |= {"completions": 6}
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
