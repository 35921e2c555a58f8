"""spec: the specification of a run, with derived defaults and the rules between its fields.

Some defaults come from another field or from the stage's kind. `fill` sets them before validation, so no
field of a Spec refers to another for its value. The fields are in spec_fields.py and the rules in rules.py.
"""

from typing import Any, ClassVar

from pydantic import model_validator

from vpmoe.api.base import Rule
from vpmoe.api.rules import RULES
from vpmoe.api.spec_fields import SpecFields
from vpmoe.api.stages import OPTIMIZER_OF_KIND
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
    if isinstance(spec.get("dataset"), dict):
        length = training.get("sequenceLength", TrainingSpec.model_fields["sequence_length"].default)
        filled["dataset"] = {"maxLength": length} | spec["dataset"]
    if isinstance(spec.get("stages"), list):
        gpus = _mapping(spec.get("student")).get("gpus", StudentSpec.model_fields["gpus"].default)
        filled["stages"] = [
            _fill_sampler(_fill_optimizer(stage, _mapping(training.get("optimizer"))), gpus)
            for stage in spec["stages"]
        ]
    if isinstance(spec.get("export", {}), dict):
        filled["export"] = default_export(spec.get("stages")) | spec.get("export", {})
    return filled


def default_export(stages: Any) -> dict[str, Any]:
    """spec.export if it is not written: the last stage. None of stages that are malformed."""
    last = stages[-1] if isinstance(stages, list) and stages else None
    name = _mapping(last).get("name")
    return {"stages": [name] if isinstance(name, str) else []}


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
