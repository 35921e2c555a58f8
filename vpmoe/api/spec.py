"""spec: the whole of what a user may ask for.

`fill` gives each field that takes its default from another field, or from its stage's kind, that value before anything is
validated; so a Spec never holds a "none: see elsewhere". The rules that cross its parts are in rules.py.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, Strict, model_validator

from vpmoe.api.base import Model, Rule
from vpmoe.api.dataset import Dataset
from vpmoe.api.quantities import Duration
from vpmoe.api.rules import RULES
from vpmoe.api.runtime import Runtime
from vpmoe.api.stages import OPTIMIZER_OF_KIND, Stage
from vpmoe.api.storage import Evaluation, Storage
from vpmoe.api.student import S3_FOLDER, Student, Teacher
from vpmoe.api.training import Training

MUTABLE = ("suspend", "ttlAfterFinished", "deletionPolicy")
"""Fields of the spec that may change after the first step has started, and so are no part of the configuration."""
MUTABLE_RUNTIME = ("attempts",)
"""The same of spec.runtime."""


def fill(spec: dict[str, Any]) -> dict[str, Any]:
    """A specification as it was written, with the defaults filled in that no schema can know. Malformed parts stay as they are."""
    training = _mapping(spec.get("training"))
    filled = dict(spec)
    if isinstance(spec.get("dataset"), dict):
        length = training.get("sequenceLength", Training.model_fields["sequence_length"].default)
        filled["dataset"] = {"maxLength": length} | spec["dataset"]
    if isinstance(spec.get("stages"), list):
        gpus = _mapping(spec.get("student")).get("gpus", Student.model_fields["gpus"].default)
        filled["stages"] = [_fill_sampler(_fill_optimizer(stage, _mapping(training.get("optimizer"))), gpus) for stage in spec["stages"]]
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


class Spec(Model):
    """What to distil from what, on what, and how."""

    suspend: bool = False
    """true stops the run at a checkpoint and frees its GPUs; false goes on from there. May be changed at any time."""
    dataset: Dataset
    """The training text, and how it becomes tokens."""
    teacher: Teacher
    """The model that is distilled from."""
    student: Student = Student()
    """The model that is trained, and how it is spread over GPUs."""
    training: Training = Training()
    """What all training stages share."""
    stages: Annotated[tuple[Stage, ...], Strict(False), Field(min_length=1, max_length=8)]
    """Training stages, run in this order. Each goes on from the weights, optimizer state and data position of the one before."""
    evaluation: Evaluation = Evaluation()
    """How progress is measured."""
    storage: Storage
    """The bucket that everything is kept in."""
    runtime: Runtime = Runtime()
    """How the run's pods are made, and when the operator gives up."""
    resume_from: Annotated[str, S3_FOLDER] | None = None
    """Another run to go on from, s3://bucket/…/runs/namespace/name-uid: its last checkpoint, optimizer state and data position. null starts
    anew."""
    deletion_policy: Literal["Retain", "Delete"] = "Retain"
    """What becomes of the run's folder in the bucket when the DistillRun is deleted: Retain keeps it, Delete removes it. Data sets and
    scores are kept either way, for other runs use them. May be changed at any time."""
    ttl_after_finished: Duration | None = None
    """Time after which a finished run is deleted, as "7d"; null keeps it. May be changed at any time."""

    rules: ClassVar[tuple[Rule, ...]] = RULES

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, spec: Any) -> Any:
        return fill(spec) if isinstance(spec, dict) else spec
