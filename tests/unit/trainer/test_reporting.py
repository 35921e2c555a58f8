"""Reporting: every step has one line whatever was killed, an unreachable store loses nothing, keys stay."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.fakes import datasets
from tests.fakes.fault_proxy import Fault, faulty
from tests.fakes.store import S3
from tests.fakes.waiting import wait_until
from vpmoe.api.metrics import BySpan, Measures
from vpmoe.api.progress import Amount, Progress, SpanLoss
from vpmoe.api.storage import StorageSpec
from vpmoe.clock import now
from vpmoe.data.spans import SPANS
from vpmoe.model.router import ExpertLoad
from vpmoe.model.spans import weighted_sum
from vpmoe.objectives.onpolicy import BoundedShares, OnPolicyMeasures
from vpmoe.objectives.rescored import ConfidenceWeights, RescoredMeasures
from vpmoe.objectives.teacher_forced import TeacherForcedMeasures
from vpmoe.storage import Bucket, Patience, paths
from vpmoe.trainer.context import StageContext
from vpmoe.trainer.onpolicy.window_metrics import FirstWindow, Lengths, WindowMetrics
from vpmoe.trainer.onpolicy.window_stats import WindowEvaluation
from vpmoe.trainer.onpolicy.window_wait import WindowBuffer
from vpmoe.trainer.reporting import uploader
from vpmoe.trainer.reporting.gpu import GpuUse, as_vector, read_gpu
from vpmoe.trainer.reporting.lines import (
    EvaluationLine,
    HeldOutLoss,
    StartLine,
    StepLine,
    TrainerLine,
    router_load,
)
from vpmoe.trainer.reporting.uploader import ProgressUploader


@pytest.fixture
def context(
    bucket: Bucket, run_spec: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> StageContext:
    monkeypatch.setattr(uploader, "PROGRESS_SECONDS", 0.05)
    return datasets.context(bucket, run_spec, tmp_path, datasets.write(bucket, [[]], [[]]))


def started(context: StageContext) -> ProgressUploader:
    return ProgressUploader(
        context,
        Progress(step="vanilla", attempt=1, state="Running", message="Starting", updated=now()),
    )


def line(event: str, step: int) -> TrainerLine:
    return TrainerLine(event=event, attempt=1, step=step, iteration=step, tokens=100 * step, epoch=0)


def written(context: StageContext) -> list[dict[str, Any]]:
    keys = [found.key for found in context.bucket.list(f"{paths.run(context.run)}/steps/vanilla/metrics/")]
    return [json.loads(text) for key in keys for text in context.bucket.get(key).decode().splitlines()]


def progress(context: StageContext) -> Progress:
    return Progress.model_validate(context.bucket.get_json(paths.progress(context.run, "vanilla")))


def test_each_step_has_one_line_however_often_training_was_killed(context: StageContext) -> None:
    """The first attempt is killed with lines unwritten, the second too, before it is where the first was; the
    third ends."""
    for begun, flushed, reached in ((0, 4, 6), (2, 3, 3), (4, 9, 9)):
        attempt = started(context)
        attempt.log(line("start", begun))
        for step in range(begun + 1, reached + 1):
            attempt.log(line("step", step), *([line("evaluation", step)] if step % 2 == 0 else []))
            if step == flushed:
                attempt.flush_metrics()
        attempt._stop()  # a kill: nothing more is written
    found = written(context)
    assert [each["step"] for each in found if each["event"] == "step"] == list(range(1, 10))
    assert [each["step"] for each in found if each["event"] == "evaluation"] == [2, 4, 6, 8]
    assert [each["step"] for each in found if each["event"] == "start"] == [0, 2, 4]


def test_progress_follows_the_loop_and_ends_with_its_last_word(context: StageContext) -> None:
    said = started(context)
    said.update(message="Training, step 1 of 2", tokens=Amount(done=5, total=10))
    wait_until(
        lambda: (
            context.bucket.exists(paths.progress(context.run, "vanilla"))
            and progress(context).tokens is not None
        ),
        "progress is written",
    )
    at = progress(context).updated
    said.log(line("step", 1))
    assert written(context) == []
    said.finish(state="Succeeded", message="Finished")
    assert (
        progress(context).state == "Succeeded"
        and progress(context).updated > at
        and len(written(context)) == 1
    )
    said.close()
    assert progress(context).message == "Finished"


def test_a_store_that_is_away_for_a_while_loses_no_word(
    context: StageContext, s3: S3, run_spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with faulty(s3.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        patience = Patience(attempts=1, connect=1, read=5)
        away = StageContext(
            **{
                **vars(context),
                "bucket": Bucket.open(
                    StorageSpec.model_validate(run_spec["spec"]["storage"]), patience=patience
                ),
            }
        )
        said = started(away)
        proxy.faults = [Fault("503", "PUT", times=4)]
        said.log(line("step", 1))
        said.update(message="Training, step 1 of 2")
        wait_until(lambda: not proxy.faults[0].times, "four writes failed")
        said.check()
        said.finish(message="Finished")
    assert len(written(context)) == 1 and progress(context).message == "Finished"


def test_a_store_that_refuses_for_good_stops_training(
    context: StageContext, s3: S3, run_spec: dict[str, Any]
) -> None:
    said = started(context)
    (s3.folder / context.bucket.name).rename(s3.folder / f"{context.bucket.name}-gone")
    said.update(message="Training, step 1 of 2")
    wait_until(lambda: said._fault is not None, "the store rejected")
    with pytest.raises(Exception, match="the bucket does not exist"):
        said.check()
    said.close()


def test_a_line_says_what_was_measured_and_null_where_nothing_was() -> None:
    weights = {"reasoning": 1.0, "final": 0.5}
    assert weighted_sum({"reasoning": 2.0, "final": 3.0}, weights) == 3.5
    assert weighted_sum({"reasoning": None, "final": 3.0}, weights) == 1.5
    gpu = GpuUse.from_sum(as_vector(read_gpu(torch.device("cpu")), 0, 1))
    made = line_of_step(step=7, gpu=gpu, loss_by_span={"reasoning": None, "final": 3.0})
    found = json.loads(json.dumps(made.dump(), allow_nan=False))
    assert (found["event"], found["step"], found["attempt"]) == ("step", 7, 1)
    assert found["gpu"] == {"utilisation": None, "memoryHeadroom": None, "reason": "computed on the CPU"}
    assert found["lossBySpan"] == {"reasoning": None, "final": 3.0}


LOAD = ExpertLoad(
    ("layers.1", "layers.2"),
    torch.tensor([[10] * 64, [0] * 63 + [640]]),
    torch.ones(2, dtype=torch.float64),
)


def line_of_step(**fields: Any) -> StepLine:
    both = {"reasoning": 2.0, "final": 1.0}
    known: dict[str, Any] = {
        "attempt": 1,
        "step": 1,
        "iteration": 1,
        "tokens": 100,
        "epoch": 0,
        "kind": "Vanilla",
        "loss": 3.0,
        "loss_by_span": both,
        "targets": {"reasoning": 60, "final": 40},
        "learning_rate": 1e-3,
        "gradient_norm": 1.0,
        "seconds": 2.0,
        "tokens_per_second": 50.0,
        "router": router_load(LOAD),
        "exercises": {"rag": 1.0},
        "gpu": GpuUse(utilisation=None, memory_headroom=None, reason="computed on the CPU"),
    }
    return StepLine(**known | fields)


def test_the_histogram_counts_every_expert_of_every_layer() -> None:
    found = router_load(LOAD)
    assert found.max_over_mean == {"layers.1": 1.0, "layers.2": 64.0} and found.dead == {"layers.2": 63}
    bounds, counts = np.asarray(found.histogram.bounds), found.histogram.experts
    assert (
        sum(counts) == 128
        and counts[0] == 63
        and counts[-1] == 1
        and counts[int(np.searchsorted(bounds, 1.0))] == 64
    )


BOTH: BySpan = {"reasoning": 1.0, "final": 2.0}
ALWAYS = {"event", "time", "attempt", "step", "iteration", "tokens", "epoch"}
STEP = ALWAYS | {
    "kind",
    "loss",
    "lossBySpan",
    "targets",
    "learningRate",
    "gradientNorm",
    "seconds",
    "tokensPerSecond",
    "router",
    "router.maxOverMean",
    "router.dead",
    "router.auxLoss",
    "router.histogram",
    "router.histogram.bounds",
    "router.histogram.experts",
    "exercises",
    "gpu",
    "gpu.utilisation",
    "gpu.memoryHeadroom",
    "gpu.reason",
}
START = ALWAYS | {"from", "refused", "ranks", "steps", "sequencesPerStep", "stageTokens", "centre"}
RESCORED = RescoredMeasures(
    weight=ConfidenceWeights(mean=BOTH, saturation_low=BOTH, saturation_high=BOTH), teacher_logp=BOTH
)
ON_POLICY = OnPolicyMeasures(
    reverse_kl=BOTH, sampler_kl=BOTH, bounded=BoundedShares(advantage=BOTH, ratio=BOTH)
)
WINDOW = WindowMetrics(
    window=3,
    version=2,
    phase=1,
    turns=0,
    staleness=1,
    prompts=2,
    rollouts={"low": 2},
    validity={"low": {"valid": 1.0}},
    lengths={"low": Lengths(mean=2.0, max=3)},
    wait_rollouts=0.1,
    wait_scores=0.2,
    buffer=WindowBuffer(sampled=1, scored=0),
)
WINDOW_KEYS = {
    "window",
    "version",
    "phase",
    "turns",
    "staleness",
    "prompts",
    "rollouts",
    "validity",
    "lengths",
    "waitRollouts",
    "waitScores",
    "buffer",
    "buffer.sampled",
    "buffer.scored",
}
BY_NAME = {"targets", "exercises", "router.maxOverMean", "router.dead", "rollouts", "validity", "lengths"}
"""Objects whose keys are spans, layers, exercises or efforts."""


def line_of_start(**fields: Any) -> StartLine:
    return StartLine(
        attempt=1,
        step=0,
        iteration=0,
        tokens=0,
        epoch=0,
        origin="from random weights",
        refused=(),
        ranks=1,
        steps=None,
        sequences_per_step=4,
        stage_tokens=100,
        centre=None,
        **fields,
    )


def line_of_evaluation(loss: HeldOutLoss | None, of_kind: Measures | None) -> EvaluationLine:
    return EvaluationLine(
        attempt=1, step=1, iteration=1, tokens=100, epoch=0, seconds=1.0, loss=loss, of_kind=of_kind
    )


HELD_OUT = HeldOutLoss(held_out=SpanLoss(reasoning=1.0), weighted=1.0, documents=9)
WINDOWS = WindowEvaluation(reverse_kl=0.5, validity=0.9)


@pytest.mark.parametrize(
    "made, keys",
    [
        pytest.param(line_of_step(), STEP, id="step-of-Vanilla"),
        pytest.param(
            line_of_step(measures=RESCORED),
            STEP | {"weight", "weight.mean", "weight.saturationLow", "weight.saturationHigh", "teacherLogp"},
            id="step-of-Rescored",
        ),
        pytest.param(
            line_of_step(measures=TeacherForcedMeasures(kl=BOTH, cosine=BOTH)),
            STEP | {"kl", "cosine"},
            id="step-of-TeacherForced",
        ),
        pytest.param(
            line_of_step(measures=ON_POLICY, of_kind=WINDOW),
            STEP | {"reverseKl", "samplerKl", "bounded", "bounded.advantage", "bounded.ratio"} | WINDOW_KEYS,
            id="step-of-OnPolicy",
        ),
        pytest.param(line_of_start(), START, id="start"),
        pytest.param(
            line_of_start(of_kind=FirstWindow(windows=0, first_prompt=0)),
            START | {"windows", "firstPrompt"},
            id="start-of-OnPolicy",
        ),
        pytest.param(
            line_of_evaluation(HELD_OUT, None),
            ALWAYS | {"heldOut", "weighted", "documents", "seconds"},
            id="evaluation",
        ),
        pytest.param(
            line_of_evaluation(HELD_OUT, WINDOWS),
            ALWAYS | {"heldOut", "weighted", "documents", "reverseKl", "validity", "seconds"},
            id="evaluation-of-OnPolicy",
        ),
        pytest.param(
            line_of_evaluation(None, None), ALWAYS | {"seconds"}, id="evaluation-before-the-first-window"
        ),
    ],
)
def test_the_keys_of_a_line_are_the_recorded_ones(made: TrainerLine, keys: set[str]) -> None:
    """Recorded from the code before lines were typed. They are a file format: a reader of metrics knows no
    others."""

    def names(value: dict[str, Any], prefix: str = "") -> set[str]:
        found = set()
        for key, inner in value.items():
            found.add(prefix + key)
            if isinstance(inner, dict) and prefix + key not in BY_NAME and set(inner) - set(SPANS):
                found |= names(inner, f"{prefix}{key}.")
        return found

    written = json.loads(json.dumps(made.dump(), allow_nan=False))
    assert names(written) == keys
    if "heldOut" in written:
        assert written["heldOut"] == {"reasoning": 1.0, "final": None}
