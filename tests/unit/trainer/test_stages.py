"""The loss that a stage reports: one quantity for each kind of stage, whatever its steps minimise."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.fakes import datasets
from vpmoe.api.metrics import Measures
from vpmoe.model.learner import Outcome
from vpmoe.objectives.onpolicy import BoundedShares, OnPolicyMeasures
from vpmoe.objectives.rescored import ConfidenceWeights, RescoredMeasures
from vpmoe.objectives.teacher_forced import TeacherForcedMeasures
from vpmoe.storage import Bucket
from vpmoe.trainer.stages.on_policy import OnPolicyStage
from vpmoe.trainer.stages.rescored import RescoredStage
from vpmoe.trainer.stages.stage_kind import StageKind
from vpmoe.trainer.stages.teacher_forced import TeacherForcedStage
from vpmoe.trainer.stages.vanilla import VanillaStage

WEIGHTS = {"reasoning": 0.5, "final": 2.0}
CROSS_ENTROPY = {"reasoning": 4.0, "final": 1.0}
BOTH: dict[str, float | None] = {"reasoning": 1.0, "final": 1.0}
REVERSE_KL: dict[str, float | None] = {"reasoning": 0.6, "final": 0.2}
RESCORED = RescoredMeasures(
    weight=ConfidenceWeights(mean=BOTH, saturation_low=BOTH, saturation_high=BOTH), teacher_logp=BOTH
)
ON_POLICY = OnPolicyMeasures(
    reverse_kl=REVERSE_KL, sampler_kl=BOTH, bounded=BoundedShares(advantage=BOTH, ratio=BOTH)
)


@pytest.mark.parametrize(
    "kind, step_kind, measures, expected",
    [
        pytest.param(VanillaStage, "Vanilla", None, ("loss", 4.0, True), id="Vanilla"),
        pytest.param(RescoredStage, "Rescored", RESCORED, ("loss", 4.0, True), id="Rescored"),
        pytest.param(RescoredStage, "Vanilla", None, ("loss", 4.0, True), id="Vanilla-step-of-Rescored"),
        pytest.param(
            TeacherForcedStage,
            "TeacherForced",
            TeacherForcedMeasures(kl=BOTH, cosine=BOTH),
            ("loss", 4.0, True),
            id="TeacherForced",
        ),
        pytest.param(OnPolicyStage, "OnPolicy", ON_POLICY, ("reverse KL", 0.7, True), id="OnPolicy"),
        pytest.param(OnPolicyStage, "Vanilla", None, ("anchor loss", 4.0, False), id="anchor-of-OnPolicy"),
    ],
)
def test_the_reported_loss_of_each_kind_of_stage(
    bucket: Bucket,
    run_spec: dict[str, Any],
    tmp_path: Path,
    kind: type[StageKind],
    step_kind: str,
    measures: Measures | None,
    expected: tuple[str, float, bool],
) -> None:
    """It is not what the step minimises, here 99."""
    run_spec["spec"]["training"]["spanWeights"] = WEIGHTS
    context = datasets.context(bucket, run_spec, tmp_path, datasets.write_dataset(bucket, [[]], [[]]))
    stage = kind.__new__(kind)
    StageKind.__init__(stage, context, None)  # type: ignore[arg-type]
    stage.plan = SimpleNamespace(kind=lambda step: step_kind)  # type: ignore[assignment]
    outcome = Outcome(99.0, CROSS_ENTROPY, {"reasoning": 1, "final": 1}, None, measures)
    name, value, reported = stage.step_loss(0, outcome)
    assert (name, reported) == (expected[0], expected[2]) and value == pytest.approx(expected[1])
