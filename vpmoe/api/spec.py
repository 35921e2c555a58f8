"""spec: the specification of a run, with derived defaults and the rules between its fields.

Some defaults come from another field or from the stage's kind. `fill` sets them before validation, so no
field of a Spec refers to another for its value. The fields are in spec_fields.py and the rules in rules.py.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any, ClassVar

from pydantic import ValidationError, model_validator

from vpmoe.api.base import STORED, Rule
from vpmoe.api.effort import EFFORTS, write_mix
from vpmoe.api.rules import RULES
from vpmoe.api.spec_fields import SpecFields
from vpmoe.api.stages import OPTIMIZER_OF_KIND, OnPolicy
from vpmoe.api.student import StudentSpec
from vpmoe.api.training import TrainingSpec

MUTABLE = ("suspend", "ttlAfterFinished", "deletionPolicy")
"""Fields of spec that can change at any time. Neither they nor runtime are part of the configuration's
hash."""
MUTABLE_RUNTIME = ("attempts", "interruptions", "onStall", "scheduling")
"""Such fields of spec.runtime. Its other fields can change while nothing of the run is alive."""


def fill(spec: dict[str, Any]) -> dict[str, Any]:
    """A copy of the written specification with all derived defaults set. Malformed parts stay unchanged."""
    training = _mapping(spec.get("training"))
    filled = dict(spec)
    if isinstance(spec.get("stages"), list):
        gpus = _mapping(spec.get("student")).get("gpus", StudentSpec.model_fields["gpus"].default)
        filled["stages"] = [
            _fill_sampler(_fill_optimizer(stage, _mapping(training.get("optimizer"))), gpus)
            for stage in spec["stages"]
        ]
    if isinstance(spec.get("dataset"), dict):
        length = training.get("sequenceLength", TrainingSpec.model_fields["sequence_length"].default)
        filled["dataset"] = {"maxLength": length} | _fill_effort(spec["dataset"], filled.get("stages"))
    if isinstance(spec.get("export", {}), dict):
        filled["export"] = default_export(spec.get("stages")) | spec.get("export", {})
    return filled


def default_export(stages: Any) -> dict[str, Any]:
    """spec.export if it is not written: the last stage. None of stages that are malformed."""
    last = stages[-1] if isinstance(stages, list) and stages else None
    name = _mapping(last).get("name")
    return {"stages": [name] if isinstance(name, str) else []}


def _fill_effort(dataset: dict[str, Any], stages: Any) -> dict[str, Any]:
    conversation = dataset.get("conversation", {})
    if not isinstance(conversation, dict):
        return dataset
    return dataset | {"conversation": {"effort": default_effort(stages)} | conversation}


def default_effort(stages: Any) -> str:
    """dataset.conversation.effort if it is not written: the mix of all curricula together; high if no stage
    is OnPolicy.

    `stages` are filled. It is also high if an OnPolicy stage is malformed: the run is then rejected for that.
    """
    written = stages if isinstance(stages, list) else []
    sampling = [stage for stage in written if _mapping(stage).get("kind") == "OnPolicy"]
    try:
        found = [OnPolicy.model_validate(stage, context=STORED) for stage in sampling]
    except ValidationError:
        found = []
    return overall_mix(found) if found else "high"


def overall_mix(stages: Sequence[OnPolicy]) -> str:
    """The share of each effort in the curricula of the stages, at least one: phases weighted by their share,
    stages by their tokens."""
    weights = dict.fromkeys(EFFORTS, Fraction(0))
    for stage in stages:
        for phase in stage.curriculum:
            for effort in EFFORTS:
                share = Fraction(str(phase.share)) * Fraction(str(getattr(phase.effort, effort)))
                weights[effort] += stage.tokens * share
    total = sum(weights.values())
    return write_mix({effort: weight / total for effort, weight in weights.items()})


def _mapping(written: Any) -> dict[str, Any]:
    return written if isinstance(written, dict) else {}


def _fill_optimizer(stage: Any, common: dict[str, Any]) -> Any:
    if not isinstance(stage, dict) or not isinstance(stage.get("optimizer", {}), dict):
        return stage
    of_kind = OPTIMIZER_OF_KIND.get(str(stage.get("kind")), {})
    return stage | {"optimizer": common | of_kind | stage.get("optimizer", {})}


def _fill_sampler(stage: Any, gpus: Any) -> Any:
    """Half of the GPUs sample by default: then neither sampler nor trainer waits much
    (benchmarks/pipeline.py)."""
    if not isinstance(stage, dict) or stage.get("kind") != "OnPolicy" or not isinstance(gpus, int):
        return stage
    sampler = stage.get("sampler", {})
    return stage | {"sampler": {"gpus": (gpus + 1) // 2} | sampler} if isinstance(sampler, dict) else stage


class Spec(SpecFields):
    """The specification of a run: dataset, models, stages, storage and pods."""

    rules: ClassVar[tuple[Rule, ...]] = RULES

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, spec: Any) -> Any:
        return fill(spec) if isinstance(spec, dict) else spec
