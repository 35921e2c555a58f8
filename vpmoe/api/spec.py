"""spec: the whole of what a user may ask for, and the rules that cross its parts.

`fill` gives each field that takes its default from another field, or from its stage's kind, that value before anything is
validated; so a Spec never holds a "none: see elsewhere". How a problem is worded for people is invalid.py's business.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, Strict, model_validator

from vpmoe.api.base import Model, Rule
from vpmoe.api.dataset import Dataset
from vpmoe.api.layout import EXPERTS, pod_size, ranks
from vpmoe.api.quantities import Duration, cel_is_tokens, cel_tokens
from vpmoe.api.runtime import Runtime
from vpmoe.api.stages import OPTIMIZER_OF_KIND, OnPolicy, Sampler, Stage, StageFields, Vanilla
from vpmoe.api.storage import Evaluation, Storage
from vpmoe.api.student import S3_FOLDER, Student, Teacher
from vpmoe.api.training import Optimizer, Training

MUTABLE = ("suspend", "ttlAfterFinished", "deletionPolicy")
"""Fields of the spec that may change after the first step has started, and so are no part of the configuration."""
MUTABLE_RUNTIME = ("attempts",)
"""The same of spec.runtime."""

# CEL for what layout.py computes, over `self` (the spec) and `s` (a stage as the API server stores it).
_RANKS = f"(self.student.gpus - (s.kind == 'OnPolicy' ? (has(s.sampler) && has(s.sampler.gpus) ? s.sampler.gpus : {Sampler().gpus}) : 0))"
_POD = f"(has(self.student.gpusPerPod) && self.student.gpusPerPod < {_RANKS} ? self.student.gpusPerPod : {_RANKS})"
_EXPERTS = "(" + " : ".join(f"self.student.shape == '{shape}' ? {experts}" for shape, experts in EXPERTS.items()) + " : 0)"
_IS_BATCH = cel_is_tokens("self.training.globalBatchTokens")
_BATCH = cel_tokens("self.training.globalBatchTokens")
_COMMON_LOW, _COMMON_PEAK = "self.training.optimizer.minLearningRate", "self.training.optimizer.learningRate"
_PEAK = (
    "(has(s.optimizer) && has(s.optimizer.learningRate) ? s.optimizer.learningRate : "
    + "".join(f"s.kind == '{kind}' ? {changed['learningRate']} : " for kind, changed in OPTIMIZER_OF_KIND.items())
    + f"{_COMMON_PEAK})"
)
_LOW = f"(has(s.optimizer) && has(s.optimizer.minLearningRate) ? s.optimizer.minLearningRate : {_COMMON_LOW})"


def fill(spec: dict[str, Any]) -> dict[str, Any]:
    """A specification as it was written, with the defaults filled in that no schema can know. Malformed parts stay as they are."""
    training = _mapping(spec.get("training"))
    filled = dict(spec)
    if isinstance(spec.get("dataset"), dict):
        length = training.get("sequenceLength", Training.model_fields["sequence_length"].default)
        filled["dataset"] = {"maxLength": length} | spec["dataset"]
    if isinstance(spec.get("stages"), list):
        filled["stages"] = [_fill_optimizer(stage, _mapping(training.get("optimizer"))) for stage in spec["stages"]]
    return filled


def _mapping(written: Any) -> dict[str, Any]:
    return written if isinstance(written, dict) else {}


def _fill_optimizer(stage: Any, common: dict[str, Any]) -> Any:
    if not isinstance(stage, dict) or not isinstance(stage.get("optimizer", {}), dict):
        return stage
    of_kind = OPTIMIZER_OF_KIND.get(str(stage.get("kind")), {})
    return stage | {"optimizer": common | of_kind | stage.get("optimizer", {})}


def _too_low(optimizer: Optimizer) -> dict[str, object] | None:
    low, peak = optimizer.min_learning_rate, optimizer.learning_rate
    return {"low": low, "peak": peak} if low > peak else None


def _too_low_for_stage(spec: "Spec", stage: StageFields) -> dict[str, object] | None:
    terms = None if _too_low(spec.training.optimizer) else _too_low(stage.optimizer)
    return {"stage": stage.name, **terms} if terms else None


def _repeated(spec: "Spec") -> dict[str, object] | None:
    names = [stage.name for stage in spec.stages]
    twice = [name for i, name in enumerate(names) if name in names[:i]]
    return {"name": twice[0]} if twice else None


def _uneven_experts(spec: "Spec") -> dict[str, object] | None:
    shape, parallel = spec.student.shape, spec.student.expert_parallel
    return {"parallel": parallel, "experts": EXPERTS[shape], "shape": shape} if EXPERTS[shape] % parallel else None


def _no_ranks(spec: "Spec", stage: StageFields) -> dict[str, object] | None:
    if not isinstance(stage, OnPolicy) or ranks(spec, stage) >= 1:
        return None
    return {"stage": stage.name, "gpus": spec.student.gpus, "sampler": stage.sampler.gpus}


def _uneven_ranks(spec: "Spec", stage: StageFields) -> dict[str, object] | None:
    world, parallel = ranks(spec, stage), spec.student.expert_parallel
    return {"stage": stage.name, "ranks": world, "parallel": parallel} if world > 0 and world % parallel else None


def _uneven_pods(spec: "Spec", stage: StageFields) -> dict[str, object] | None:
    world, size = ranks(spec, stage), pod_size(spec, stage)
    return {"stage": stage.name, "ranks": world, "size": size} if world > 0 and world % size else None


def _several_pods(spec: "Spec", stage: StageFields) -> dict[str, object] | None:
    world, size = ranks(spec, stage), pod_size(spec, stage)
    return {"stage": stage.name, "ranks": world, "size": size} if spec.runtime.backend == "Job" and world > size else None


def _small_batch(spec: "Spec", stage: StageFields) -> dict[str, object] | None:
    world, length, batch = ranks(spec, stage), spec.training.sequence_length, spec.training.global_batch_tokens
    if world < 1 or batch >= world * length:
        return None
    return {"batch": batch, "stage": stage.name, "ranks": world, "length": length, "least": world * length}


def _no_teacher(spec: "Spec", stage: Stage) -> dict[str, object] | None:
    return {"stage": stage.name, "kind": stage.kind} if spec.teacher.gpus == 0 and not isinstance(stage, Vanilla) else None


_STAGE = {"stage": "s.name"}

RULES = (
    Rule(
        "dataset.maxLength",
        "{longest} is more than training.sequenceLength {length}: a document must fit into one sequence.",
        cel="!has(self.dataset.maxLength) || self.dataset.maxLength <= self.training.sequenceLength",
        broken=lambda spec, _: (
            {"longest": spec.dataset.max_length, "length": spec.training.sequence_length}
            if spec.dataset.max_length > spec.training.sequence_length
            else None
        ),
        terms={"longest": "self.dataset.maxLength", "length": "self.training.sequenceLength"},
    ),
    Rule(
        "student.expertParallel",
        "{parallel} does not divide the {experts} experts of {shape}. Use 1, 2, 4, …, {experts}.",
        cel=f"{_EXPERTS} % self.student.expertParallel == 0",
        broken=lambda spec, _: _uneven_experts(spec),
        terms={"parallel": "self.student.expertParallel", "experts": f"{_EXPERTS}", "shape": "self.student.shape"},
    ),
    Rule(
        "training.optimizer",
        "minLearningRate {low} is above learningRate {peak}. Lower the one or raise the other.",
        cel=f"{_COMMON_LOW} <= {_COMMON_PEAK}",
        broken=lambda spec, _: _too_low(spec.training.optimizer),
        terms={"low": _COMMON_LOW, "peak": _COMMON_PEAK},
    ),
    Rule(
        "stages",
        "two stages are called {name}. A stage's name is its folder in the bucket: give each its own.",
        cel="self.stages.all(s, self.stages.exists_one(t, t.name == s.name))",
        broken=lambda spec, _: _repeated(spec),
        terms={"name": "self.stages.filter(s, !self.stages.exists_one(t, t.name == s.name))[0].name"},
    ),
    Rule(
        "stages",
        "stage {stage}: minLearningRate {low} is above learningRate {peak}. Lower the one or raise the other.",
        cel=f"{_COMMON_LOW} > {_COMMON_PEAK} || {_LOW} <= {_PEAK}",
        broken=_too_low_for_stage,
        terms={**_STAGE, "low": f"{_LOW}", "peak": f"{_PEAK}"},
        each="stages",
    ),
    Rule(
        "stages",
        "stage {stage}: student.gpus {gpus} − sampler.gpus {sampler} leaves no GPU to train on. Lower sampler.gpus.",
        cel=f"s.kind != 'OnPolicy' || {_RANKS} >= 1",
        broken=_no_ranks,
        terms={**_STAGE, "gpus": "self.student.gpus", "sampler": f"self.student.gpus - {_RANKS}"},
        each="stages",
    ),
    Rule(
        "stages",
        "stage {stage}: {ranks} ranks are not a multiple of student.expertParallel {parallel}.",
        cel=f"{_RANKS} < 1 || {_RANKS} % self.student.expertParallel == 0",
        broken=_uneven_ranks,
        terms={**_STAGE, "ranks": f"{_RANKS}", "parallel": "self.student.expertParallel"},
        each="stages",
    ),
    Rule(
        "stages",
        "stage {stage}: {ranks} GPUs do not divide into pods of {size}. Let student.gpusPerPod divide the ranks of every stage.",
        cel=f"{_RANKS} < 1 || {_RANKS} % {_POD} == 0",
        broken=_uneven_pods,
        terms={**_STAGE, "ranks": f"{_RANKS}", "size": f"{_POD}"},
        each="stages",
    ),
    Rule(
        "stages",
        "stage {stage}: {ranks} GPUs in pods of {size} are several pods, and runtime.backend Job makes one. Use PyTorchJob.",
        cel=f"self.runtime.backend != 'Job' || {_RANKS} <= {_POD}",
        broken=_several_pods,
        terms={**_STAGE, "ranks": f"{_RANKS}", "size": f"{_POD}"},
        each="stages",
    ),
    Rule(
        "training.globalBatchTokens",
        "{batch} is less than one sequence on every rank of stage {stage}: {ranks} × {length} = {least}.",
        cel=f"{_RANKS} < 1 || !{_IS_BATCH} || {_BATCH} >= double({_RANKS} * self.training.sequenceLength)",
        broken=_small_batch,
        terms={
            **_STAGE,
            "batch": f"int({_BATCH})",
            "ranks": f"{_RANKS}",
            "length": "self.training.sequenceLength",
            "least": f"{_RANKS} * self.training.sequenceLength",
        },
        each="stages",
    ),
    Rule(
        "teacher.gpus",
        "0 leaves no GPU for the teacher of stage {stage} of kind {kind}. Only Vanilla stages do without.",
        cel="s.kind == 'Vanilla' || self.teacher.gpus >= 1",
        broken=_no_teacher,
        terms={**_STAGE, "kind": "s.kind"},
        each="stages",
    ),
)


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
