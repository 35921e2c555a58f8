"""Reporting: each step has one line despite kills, an unreachable store loses nothing, keys are
unchanged."""

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
from vpmoe.checkpoint.train_state import StepBatch
from vpmoe.clock import now
from vpmoe.data.spans import SPANS
from vpmoe.model.router import ExpertLoad
from vpmoe.model.spans import weighted_sum
from vpmoe.objectives.onpolicy import BoundedShares, OnPolicyMeasures
from vpmoe.objectives.rescored import ConfidenceWeights, RescoredMeasures
from vpmoe.objectives.teacher_forced import TeacherForcedMeasures
from vpmoe.process.gpu import GpuUse
from vpmoe.rollout.evaluation_record import CanaryResult
from vpmoe.storage import Bucket, Patience, paths
from vpmoe.trainer.context import StageContext
from vpmoe.trainer.onpolicy.window_metrics import FirstWindow, Lengths, WindowMetrics
from vpmoe.trainer.onpolicy.window_stats import WindowEvaluation
from vpmoe.trainer.onpolicy.window_wait import WindowBuffer
from vpmoe.trainer.reporting import uploader
from vpmoe.trainer.reporting.gpu import as_vector, read_gpu, use_of_ranks
from vpmoe.trainer.reporting.lines import (
    EvaluationLine,
    HeldOutLoss,
    SkippedLine,
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
    return datasets.context(bucket, run_spec, tmp_path, datasets.write_dataset(bucket, [[]], [[]]))


def new_uploader(context: StageContext) -> ProgressUploader:
    return ProgressUploader(
        context,
        Progress(step="vanilla", attempt=1, state="Running", message="Starting", updated=now()),
    )


def trainer_line(event: str, step: int) -> TrainerLine:
    return TrainerLine(event=event, attempt=1, step=step, iteration=step, tokens=100 * step, epoch=0)


def metrics_lines(context: StageContext) -> list[dict[str, Any]]:
    keys = [found.key for found in context.bucket.list(f"{paths.run(context.run)}/steps/vanilla/metrics/")]
    return [json.loads(text) for key in keys for text in context.bucket.get(key).decode().splitlines()]


def progress(context: StageContext) -> Progress:
    return Progress.model_validate(context.bucket.get_json(paths.progress(context.run, "vanilla")))


def test_each_step_has_one_line_after_any_number_of_kills(context: StageContext) -> None:
    """The first attempt is killed with unwritten lines, the second before the step that the first reached.

    The third finishes.
    """
    for first, flushed, last in ((0, 4, 6), (2, 3, 3), (4, 9, 9)):
        attempt = new_uploader(context)
        attempt.log(trainer_line("start", first))
        for step in range(first + 1, last + 1):
            attempt.log(
                trainer_line("step", step), *([trainer_line("evaluation", step)] if step % 2 == 0 else [])
            )
            if step == flushed:
                attempt.flush_metrics()
        attempt._stop()  # as a kill: nothing more is written
    found = metrics_lines(context)
    assert [line["step"] for line in found if line["event"] == "step"] == list(range(1, 10))
    assert [line["step"] for line in found if line["event"] == "evaluation"] == [2, 4, 6, 8]
    assert [line["step"] for line in found if line["event"] == "start"] == [0, 2, 4]


def test_progress_is_updated_and_its_final_message_is_kept(context: StageContext) -> None:
    progress_uploader = new_uploader(context)
    progress_uploader.update(message="Training, step 1 of 2", tokens=Amount(done=5, total=10))
    wait_until(
        lambda: (
            context.bucket.exists(paths.progress(context.run, "vanilla"))
            and progress(context).tokens is not None
        ),
        "progress is written",
    )
    updated = progress(context).updated
    progress_uploader.log(trainer_line("step", 1))
    assert metrics_lines(context) == []
    progress_uploader.finish(state="Succeeded", message="Finished")
    assert (
        progress(context).state == "Succeeded"
        and progress(context).updated > updated
        and len(metrics_lines(context)) == 1
    )
    progress_uploader.close()
    assert progress(context).message == "Finished"


def test_a_temporarily_unavailable_store_loses_nothing(
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
        progress_uploader = new_uploader(away)
        proxy.faults = [Fault("503", "PUT", times=4)]
        progress_uploader.log(trainer_line("step", 1))
        progress_uploader.update(message="Training, step 1 of 2")
        assert away.board.progress is not None
        assert away.board.progress.message == "Training, step 1 of 2", "published while the store is away"
        wait_until(lambda: not proxy.faults[0].times, "four writes failed")
        progress_uploader.check()
        progress_uploader.finish(message="Finished")
    assert len(metrics_lines(context)) == 1 and progress(context).message == "Finished"


def test_a_permanent_error_of_the_store_stops_training(
    context: StageContext, s3: S3, run_spec: dict[str, Any]
) -> None:
    progress_uploader = new_uploader(context)
    (s3.folder / context.bucket.name).rename(s3.folder / f"{context.bucket.name}-gone")
    progress_uploader.update(message="Training, step 1 of 2")
    wait_until(lambda: progress_uploader._fault is not None, "the store has rejected a write")
    with pytest.raises(Exception, match="the bucket does not exist"):
        progress_uploader.check()
    progress_uploader.close()


def test_a_line_has_null_for_what_was_not_measured() -> None:
    weights = {"reasoning": 1.0, "final": 0.5}
    assert weighted_sum({"reasoning": 2.0, "final": 3.0}, weights) == 3.5
    assert weighted_sum({"reasoning": None, "final": 3.0}, weights) == 1.5
    gpu = use_of_ranks(as_vector(read_gpu(torch.device("cpu")), 0, 1))
    line = step_line(step=7, gpu=gpu, loss_by_span={"reasoning": None, "final": 3.0})
    found = json.loads(json.dumps(line.dump(), allow_nan=False))
    assert (found["event"], found["step"], found["attempt"]) == ("step", 7, 1)
    assert found["gpu"] == {"utilisation": None, "memoryHeadroom": None, "reason": "computed on the CPU"}
    assert found["lossBySpan"] == {"reasoning": None, "final": 3.0}


LOAD = ExpertLoad(
    ("layers.1", "layers.2"),
    torch.tensor([[10] * 64, [0] * 63 + [640]]),
    torch.ones(2, dtype=torch.float64),
)


def step_line(**fields: Any) -> StepLine:
    loss_by_span = {"reasoning": 2.0, "final": 1.0}
    defaults: dict[str, Any] = {
        "attempt": 1,
        "step": 1,
        "iteration": 1,
        "tokens": 100,
        "epoch": 0,
        "kind": "Vanilla",
        "loss": 3.0,
        "loss_by_span": loss_by_span,
        "targets": {"reasoning": 60, "final": 40},
        "learning_rate": 1e-3,
        "gradient_norm": 1.0,
        "seconds": 2.0,
        "tokens_per_second": 50.0,
        "router": router_load(LOAD),
        "exercises": {"rag": 1.0},
        "gpu": GpuUse(utilisation=None, memory_headroom=None, reason="computed on the CPU"),
    }
    return StepLine(**defaults | fields)


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
START = ALWAYS | {"from", "refused", "skipped", "ranks", "steps", "sequencesPerStep", "stageTokens", "centre"}
SKIPPED = ALWAYS | {"number", "kind", "batchTokens", "seconds", "loss", "lossByRank", "gradientNorm"}
SKIPPED |= {"batch", "batch.documents", "batch.firstSequence", "batch.sequences", "batch.window"}
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
    wait_upload=0.3,
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
    "waitUpload",
    "buffer",
    "buffer.sampled",
    "buffer.scored",
}
OPEN_OBJECTS = {
    "targets",
    "exercises",
    "router.maxOverMean",
    "router.dead",
    "rollouts",
    "validity",
    "lengths",
    "batch.documents",
}
"""Objects whose keys are spans, layers, exercises, efforts or parts."""


def start_line(**fields: Any) -> StartLine:
    return StartLine(
        attempt=1,
        step=0,
        iteration=0,
        tokens=0,
        epoch=0,
        origin="from random weights",
        refused=(),
        skipped=0,
        ranks=1,
        steps=None,
        sequences_per_step=4,
        stage_tokens=100,
        centre=None,
        **fields,
    )


def skipped_line() -> SkippedLine:
    return SkippedLine(
        attempt=1,
        step=1,
        iteration=1,
        tokens=100,
        epoch=0,
        number=1,
        kind="Vanilla",
        batch_tokens=100,
        loss="nan",
        loss_by_rank=(1.0, "nan"),
        gradient_norm="inf",
        batch=StepBatch(documents={"train/part-00000": (3,)}, first_sequence=0, sequences=4),
        seconds=1.0,
    )


def evaluation_line(loss: HeldOutLoss | None, of_kind: Measures | None) -> EvaluationLine:
    return EvaluationLine(
        attempt=1, step=1, iteration=1, tokens=100, epoch=0, seconds=1.0, loss=loss, of_kind=of_kind
    )


HELD_OUT = HeldOutLoss(held_out=SpanLoss(reasoning=1.0), weighted=1.0, documents=9)
WINDOWS = WindowEvaluation(
    reverse_kl=0.5, validity=0.9, canary=CanaryResult(bits_per_byte=2.0, bytes=100, sha256="e" * 64)
)


@pytest.mark.parametrize(
    "line, keys",
    [
        pytest.param(step_line(), STEP, id="step-of-Vanilla"),
        pytest.param(
            step_line(measures=RESCORED),
            STEP | {"weight", "weight.mean", "weight.saturationLow", "weight.saturationHigh", "teacherLogp"},
            id="step-of-Rescored",
        ),
        pytest.param(
            step_line(measures=TeacherForcedMeasures(kl=BOTH, cosine=BOTH)),
            STEP | {"kl", "cosine"},
            id="step-of-TeacherForced",
        ),
        pytest.param(
            step_line(measures=ON_POLICY, of_kind=WINDOW),
            STEP | {"reverseKl", "samplerKl", "bounded", "bounded.advantage", "bounded.ratio"} | WINDOW_KEYS,
            id="step-of-OnPolicy",
        ),
        pytest.param(start_line(), START, id="start"),
        pytest.param(
            start_line(of_kind=FirstWindow(windows=0, first_prompt=0)),
            START | {"windows", "firstPrompt"},
            id="start-of-OnPolicy",
        ),
        pytest.param(skipped_line(), SKIPPED, id="skipped"),
        pytest.param(
            evaluation_line(HELD_OUT, None),
            ALWAYS | {"heldOut", "weighted", "documents", "seconds"},
            id="evaluation",
        ),
        pytest.param(
            evaluation_line(HELD_OUT, WINDOWS),
            ALWAYS
            | {"heldOut", "weighted", "documents", "reverseKl", "validity", "seconds", "canary"}
            | {"canary.bitsPerByte", "canary.bytes", "canary.sha256"},
            id="evaluation-of-OnPolicy",
        ),
        pytest.param(
            evaluation_line(None, None), ALWAYS | {"seconds"}, id="evaluation-before-the-first-window"
        ),
    ],
)
def test_the_keys_of_a_line_are_those_recorded(line: TrainerLine, keys: set[str]) -> None:
    """Keys are a file format for readers of metrics. They were recorded before lines were typed."""

    def names(value: dict[str, Any], prefix: str = "") -> set[str]:
        found = set()
        for key, inner in value.items():
            found.add(prefix + key)
            if isinstance(inner, dict) and prefix + key not in OPEN_OBJECTS and set(inner) - set(SPANS):
                found |= names(inner, f"{prefix}{key}.")
        return found

    dumped = json.loads(json.dumps(line.dump(), allow_nan=False))
    assert names(dumped) == keys
    if "heldOut" in dumped:
        assert dumped["heldOut"] == {"reasoning": 1.0, "final": None}
