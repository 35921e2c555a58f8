"""The training loop with a small student: what stops it, what it reports, and that a pause changes no bit."""

import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.fakes import datasets, students, trainers
from tests.fakes.checkpoints import same
from tests.fakes.reporters import RecordingReporter, stop_after
from tests.fakes.students import saved
from vpmoe.checkpoint.train_state import list_iterations, load_stage_end
from vpmoe.failure import Permanent, Terminated
from vpmoe.model.learner import Learner
from vpmoe.model.router import routers
from vpmoe.process.launcher import free_port
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


Make = Callable[..., Trainer]


@pytest.fixture
def trainer(
    bucket: Bucket,
    spec: dict[str, Any],
    tmp_path: Path,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> Make:
    """A trainer that stands where the bucket says the stage stands."""
    monkeypatch.setattr(collate, "PADDING", 0)  # the small vocabulary has no other
    random = np.random.default_rng(11)
    dataset = datasets.write(
        bucket,
        [datasets.random_documents(random, 60), datasets.random_documents(random, 40)],
        [datasets.random_documents(random, 9)],
    )

    def make(uploader: RecordingReporter, learner: Learner | None = None) -> Trainer:
        context = datasets.context(bucket, spec, tmp_path, dataset)
        return trainers.trainer(context, device, learner or students.learner(device), uploader, held_out=9)

    return make


def test_a_stage_that_was_stopped_goes_on_to_the_same_bits(
    trainer: Make, bucket: Bucket, spec: dict[str, Any]
) -> None:
    spec["metadata"]["name"] = "alone"
    whole = trainer(RecordingReporter())
    whole.run()
    spec["metadata"]["name"] = "stopped"
    stopped: list[Trainer] = []
    stopped.append(trainer(RecordingReporter(stop_after(3, lambda: stopped[0].context))))
    with pytest.raises(
        Terminated, match=f"Stopped after step 3 of {whole.stage.plan.steps}, all of it saved"
    ):
        stopped[0].run()
    assert list_iterations(bucket, paths.checkpoints(stopped[0].context.run, "vanilla"))[0] == 3
    resumed = trainer(RecordingReporter())
    resumed.run()
    assert resumed.start.state.steps == 3 and same(resumed.learner, whole.learner)
    assert isinstance(resumed.reporter.uploader, RecordingReporter) and isinstance(
        whole.reporter.uploader, RecordingReporter
    )
    assert resumed.reporter.uploader.progress["held_out"] == whole.reporter.uploader.progress["held_out"], (
        "the loss before the first step is remembered"
    )
    last = [line for line in whole.reporter.uploader.lines if line["event"] == "step"][-1]
    assert whole.reporter.uploader.progress["loss"] == pytest.approx(last["loss"], rel=1e-5), (
        "the cross-entropy, which is what a Vanilla step minimises"
    )
    ends = [load_stage_end(bucket, paths.checkpoints(one.context.run, "vanilla")) for one in (whole, resumed)]
    assert ends[0] is not None and ends[1] is not None and ends[0][1] == ends[1][1]


def test_a_loss_that_is_not_finite_stops_before_any_weight_has_moved(
    trainer: Make, bucket: Bucket, device: torch.device
) -> None:
    learner = students.learner(device)
    with torch.no_grad():
        learner.student.output[7] = torch.inf
    before = saved(learner)
    it = trainer(RecordingReporter(), learner)
    it.held_out = None
    with pytest.raises(
        Permanent, match=r"NonFinite: the loss .* is not finite at step 1; the weights were not touched"
    ):
        it.run()
    assert all(
        torch.equal(now[1], then[1])
        for name, of in saved(learner).items()
        for now, then in zip(of, before[name], strict=True)
    )
    assert learner.steps == 0 and not list_iterations(bucket, paths.checkpoints(it.context.run, "vanilla"))


def test_a_collapsed_router_is_a_condition_that_names_the_layer(
    trainer: Make, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router_monitor, "PATIENCE", 2)
    learner = students.learner(device)
    routers(learner.student)["layers.2"].expert_bias[3] = -1e6
    it = trainer(RecordingReporter(), learner)
    it.run()
    assert isinstance(it.reporter.uploader, RecordingReporter)
    found = {
        condition.message.split(":")[0]: condition
        for condition in it.reporter.uploader.progress["conditions"]
    }
    assert found["layers.2"].type == "RouterCollapse" and found["layers.2"].reason == "DeadExpert"
    assert all(
        line["router"]["dead"]["layers.2"] >= 1
        for line in it.reporter.uploader.lines
        if line["event"] == "step"
    )


def test_a_stage_ends_early_where_its_evaluations_bring_too_little(
    trainer: Make, bucket: Bucket, spec: dict[str, Any]
) -> None:
    spec["spec"]["stages"][0]["stop"] = {"evaluations": 1, "minImprovement": 0.9, "minValidity": 0.0}
    it = trainer(RecordingReporter())
    it.run()
    reached = load_stage_end(bucket, paths.checkpoints(it.context.run, "vanilla"))
    assert reached is not None and 800 <= reached[1].tokens < 2000
    assert (
        isinstance(it.reporter.uploader, RecordingReporter)
        and it.reporter.uploader.progress["state"] == "Succeeded"
    )
    assert (
        it.reporter.uploader.progress["tokens"].done
        == it.reporter.uploader.progress["tokens"].total
        == reached[1].tokens
    )


def test_prometheus_shows_the_latest_step_where_it_is_asked_to(
    trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    monkeypatch.setenv("VPMOE_METRICS_PORT", str(port))
    it = trainer(RecordingReporter())
    it.run()
    shown = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    assert (
        f'vpmoe_train_step{{namespace="default",run="tiny-run",stage="vanilla"}} {it.stage.plan.steps}.0'
        in shown
    )
    assert (
        'vpmoe_train_held_out_loss{namespace="default",run="tiny-run",span="final",stage="vanilla"}' in shown
    )
    assert "vpmoe_train_gpu_utilisation_ratio{" not in shown, "no GPU, no number"
