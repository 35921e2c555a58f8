"""spec: the whole of what a user may ask for.

`fill` gives each field that takes its default from another field, or from its stage's kind, that value before anything is
validated; so a Spec never holds a "none: see elsewhere". The rules that cross its parts are in rules.py.
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
"""Fields of the spec that may change after the first step has started, and so are no part of the configuration."""
MUTABLE_RUNTIME = ("attempts",)
"""The same of spec.runtime."""


def fill(spec: dict[str, Any]) -> dict[str, Any]:
    """A specification as it was written, with the defaults filled in that no schema can know. Malformed parts stay as they are."""
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
    return filled


def _mapping(written: Any) -> dict[str, Any]:
    return written if isinstance(written, dict) else {}


def _fill_optimizer(stage: Any, common: dict[str, Any]) -> Any:
    if not isinstance(stage, dict) or not isinstance(stage.get("optimizer", {}), dict):
        return stage
    of_kind = OPTIMIZER_OF_KIND.get(str(stage.get("kind")), {})
    return stage | {"optimizer": common | of_kind | stage.get("optimizer", {})}


def _fill_sampler(stage: Any, gpus: Any) -> Any:
    """Sampler and trainer keep each other busy where each has about half of the GPUs (benchmarks/pipeline.py)."""
    if not isinstance(stage, dict) or stage.get("kind") != "OnPolicy" or not isinstance(gpus, int):
        return stage
    sampler = stage.get("sampler", {})
    return stage | {"sampler": {"gpus": (gpus + 1) // 2} | sampler} if isinstance(sampler, dict) else stage


class Spec(SpecFields):
    """What to distil from what, on what, and how."""

    rules: ClassVar[tuple[Rule, ...]] = RULES

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, spec: Any) -> Any:
        return fill(spec) if isinstance(spec, dict) else spec
