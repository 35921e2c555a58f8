"""The rules between the fields of spec. Python evaluates each rule with `broken`, the API server with `cel`.

The class Rule is in base.py; invalid.py puts the field in front of a message.
"""

from vpmoe.api.base import Rule
from vpmoe.api.layout import EXPERTS, pod_size, ranks
from vpmoe.api.quantities import cel_is_tokens, cel_tokens
from vpmoe.api.spec_fields import SpecFields
from vpmoe.api.stages import OPTIMIZER_OF_KIND, Require, Stage, StageFields
from vpmoe.api.training import Optimizer

# CEL for what layout.py computes, over `self` (the spec) and `s` (a stage as the API server stores it).
_SAMPLER = "(has(s.sampler) && has(s.sampler.gpus) ? s.sampler.gpus : (self.student.gpus + 1) / 2)"
_RANKS = f"(self.student.gpus - (s.kind == 'OnPolicy' ? {_SAMPLER} : 0))"
_POD = (
    f"(has(self.student.gpusPerPod) && self.student.gpusPerPod < {_RANKS} "
    f"? self.student.gpusPerPod : {_RANKS})"
)
_EXPERTS = (
    "("
    + " : ".join(f"self.student.shape == '{shape}' ? {experts}" for shape, experts in EXPERTS.items())
    + " : 0)"
)
_IS_BATCH = cel_is_tokens("self.training.globalBatchTokens")
_BATCH = cel_tokens("self.training.globalBatchTokens")
_COMMON_LOW, _COMMON_PEAK = "self.training.optimizer.minLearningRate", "self.training.optimizer.learningRate"
_PEAK = (
    "(has(s.optimizer) && has(s.optimizer.learningRate) ? s.optimizer.learningRate : "
    + "".join(
        f"s.kind == '{kind}' ? {changed['learningRate']} : " for kind, changed in OPTIMIZER_OF_KIND.items()
    )
    + f"{_COMMON_PEAK})"
)
_LOW = f"(has(s.optimizer) && has(s.optimizer.minLearningRate) ? s.optimizer.minLearningRate : {_COMMON_LOW})"
_REQUIRED = (
    "(s.kind != 'OnPolicy' ? 0.0 : has(s.require) && has(s.require.validity) "
    f"? s.require.validity : {Require().validity})"
)


def _too_low(optimizer: Optimizer) -> dict[str, object] | None:
    low, peak = optimizer.min_learning_rate, optimizer.learning_rate
    return {"low": low, "peak": peak} if low > peak else None


def _too_low_for_stage(spec: SpecFields, stage: StageFields) -> dict[str, object] | None:
    terms = None if _too_low(spec.training.optimizer) else _too_low(stage.optimizer)
    return {"stage": stage.name, **terms} if terms else None


def _repeated(spec: SpecFields) -> dict[str, object] | None:
    names = [stage.name for stage in spec.stages]
    twice = [name for i, name in enumerate(names) if name in names[:i]]
    return {"name": twice[0]} if twice else None


def _uneven_experts(spec: SpecFields) -> dict[str, object] | None:
    shape, parallel = spec.student.shape, spec.student.expert_parallel
    return (
        {"parallel": parallel, "experts": EXPERTS[shape], "shape": shape}
        if EXPERTS[shape] % parallel
        else None
    )


def _no_ranks(spec: SpecFields, stage: StageFields) -> dict[str, object] | None:
    if not stage.samples or ranks(spec.student, stage) >= 1:
        return None
    return {"stage": stage.name, "gpus": spec.student.gpus, "sampler": stage.sampler_gpus}


def _uneven_ranks(spec: SpecFields, stage: StageFields) -> dict[str, object] | None:
    world, parallel = ranks(spec.student, stage), spec.student.expert_parallel
    return (
        {"stage": stage.name, "ranks": world, "parallel": parallel}
        if world > 0 and world % parallel
        else None
    )


def _uneven_pods(spec: SpecFields, stage: StageFields) -> dict[str, object] | None:
    world, size = ranks(spec.student, stage), pod_size(spec.student, stage)
    return {"stage": stage.name, "ranks": world, "size": size} if world > 0 and world % size else None


def _several_pods(spec: SpecFields, stage: StageFields) -> dict[str, object] | None:
    world, size = ranks(spec.student, stage), pod_size(spec.student, stage)
    return (
        {"stage": stage.name, "ranks": world, "size": size}
        if spec.runtime.backend == "Job" and world > size
        else None
    )


def _small_batch(spec: SpecFields, stage: StageFields) -> dict[str, object] | None:
    world, length, batch = (
        ranks(spec.student, stage),
        spec.training.sequence_length,
        spec.training.global_batch_tokens,
    )
    if world < 1 or batch >= world * length:
        return None
    return {"batch": batch, "stage": stage.name, "ranks": world, "length": length, "least": world * length}


def _nothing_sampled(spec: SpecFields, stage: Stage) -> dict[str, object] | None:
    broken = stage.stop is not None and stage.stop.min_validity > 0 and not stage.samples
    return {"stage": stage.name, "kind": stage.kind} if broken else None


def _nothing_held_out(spec: SpecFields, stage: Stage) -> dict[str, object] | None:
    needs_loss = stage.stop is not None and not stage.samples
    return {"stage": stage.name} if needs_loss and spec.evaluation.documents == 0 else None


def _no_teacher(spec: SpecFields, stage: Stage) -> dict[str, object] | None:
    return (
        {"stage": stage.name, "kind": stage.kind} if spec.teacher.gpus == 0 and stage.needs_teacher else None
    )


def _nothing_before(spec: SpecFields, stage: StageFields) -> dict[str, object] | None:
    required = stage.required_validity
    return (
        {"stage": stage.name, "validity": required}
        if required and stage.name == spec.stages[0].name
        else None
    )


def _not_measured(spec: SpecFields, stage: StageFields) -> dict[str, object] | None:
    required = stage.required_validity
    return (
        {"stage": stage.name, "validity": required} if required and spec.evaluation.completions == 0 else None
    )


_STAGE = {"stage": "s.name"}

RULES = (
    Rule(
        "dataset.maxLength",
        "{longest} is more than training.sequenceLength {length}: a document must fit into one sequence. "
        "Lower "
        "it, or raise training.sequenceLength.",
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
        terms={
            "parallel": "self.student.expertParallel",
            "experts": f"{_EXPERTS}",
            "shape": "self.student.shape",
        },
    ),
    Rule(
        "training.optimizer",
        "minLearningRate {low} is above learningRate {peak}. Lower minLearningRate or raise learningRate.",
        cel=f"{_COMMON_LOW} <= {_COMMON_PEAK}",
        broken=lambda spec, _: _too_low(spec.training.optimizer),
        terms={"low": _COMMON_LOW, "peak": _COMMON_PEAK},
    ),
    Rule(
        "stages",
        "two stages have the name {name}. A stage's name is its folder in the bucket: give each stage its "
        "own "
        "name.",
        cel="self.stages.all(s, self.stages.exists_one(t, t.name == s.name))",
        broken=lambda spec, _: _repeated(spec),
        terms={"name": "self.stages.filter(s, !self.stages.exists_one(t, t.name == s.name))[0].name"},
    ),
    Rule(
        "stages",
        "stage {stage}: minLearningRate {low} is above learningRate {peak}. Lower minLearningRate or raise "
        "learningRate.",
        cel=f"{_COMMON_LOW} > {_COMMON_PEAK} || {_LOW} <= {_PEAK}",
        broken=_too_low_for_stage,
        terms={**_STAGE, "low": f"{_LOW}", "peak": f"{_PEAK}"},
        each="stages",
    ),
    Rule(
        "stages",
        "stage {stage}: student.gpus {gpus} − sampler.gpus {sampler} leaves no GPU for training. Lower "
        "sampler.gpus.",
        cel=f"s.kind != 'OnPolicy' || {_RANKS} >= 1",
        broken=_no_ranks,
        terms={**_STAGE, "gpus": "self.student.gpus", "sampler": f"self.student.gpus - {_RANKS}"},
        each="stages",
    ),
    Rule(
        "stages",
        "stage {stage}: {ranks} ranks are not a multiple of student.expertParallel {parallel}. Lower "
        "student.expertParallel, or change the number of GPUs.",
        cel=f"{_RANKS} < 1 || {_RANKS} % self.student.expertParallel == 0",
        broken=_uneven_ranks,
        terms={**_STAGE, "ranks": f"{_RANKS}", "parallel": "self.student.expertParallel"},
        each="stages",
    ),
    Rule(
        "stages",
        "stage {stage}: {ranks} GPUs do not divide into pods of {size}. Set student.gpusPerPod to a divisor "
        "of the "
        "ranks of every stage.",
        cel=f"{_RANKS} < 1 || {_RANKS} % {_POD} == 0",
        broken=_uneven_pods,
        terms={**_STAGE, "ranks": f"{_RANKS}", "size": f"{_POD}"},
        each="stages",
    ),
    Rule(
        "stages",
        "stage {stage}: {ranks} GPUs in pods of {size} need several pods, but runtime.backend Job has one "
        "pod. Use "
        "PyTorchJob.",
        cel=f"self.runtime.backend != 'Job' || {_RANKS} <= {_POD}",
        broken=_several_pods,
        terms={**_STAGE, "ranks": f"{_RANKS}", "size": f"{_POD}"},
        each="stages",
    ),
    Rule(
        "training.globalBatchTokens",
        "{batch} is less than one sequence on every rank of stage {stage}: {ranks} × {length} = {least}. "
        "Raise it, "
        "or lower training.sequenceLength.",
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
        "stages",
        "stage {stage}: require.validity {validity} needs the evaluation of a stage before, but this is the "
        "first "
        "stage. Add a stage before it, or set require.validity to 0.",
        cel=f"{_REQUIRED} == 0.0 || s.name != self.stages[0].name",
        broken=_nothing_before,
        terms={**_STAGE, "validity": f"{_REQUIRED}"},
        each="stages",
    ),
    Rule(
        "stages",
        "stage {stage}: require.validity {validity} is not measured if evaluation.completions is 0. Raise "
        "evaluation.completions, or set require.validity to 0.",
        cel=f"{_REQUIRED} == 0.0 || self.evaluation.completions > 0",
        broken=_not_measured,
        terms={**_STAGE, "validity": f"{_REQUIRED}"},
        each="stages",
    ),
    Rule(
        "stages",
        "stage {stage}: stop.minValidity is above 0, but a stage of kind {kind} does not sample and cannot "
        "measure "
        "validity. Set it to 0.",
        cel="s.kind == 'OnPolicy' || !has(s.stop) || !has(s.stop.minValidity) || s.stop.minValidity == 0.0",
        broken=_nothing_sampled,
        terms={**_STAGE, "kind": "s.kind"},
        each="stages",
    ),
    Rule(
        "stages",
        "stage {stage}: stop needs the held-out loss, but evaluation.documents is 0. Raise "
        "evaluation.documents, or "
        "remove stop.",
        cel="s.kind == 'OnPolicy' || !has(s.stop) || self.evaluation.documents > 0",
        broken=_nothing_held_out,
        terms=_STAGE,
        each="stages",
    ),
    Rule(
        "teacher.gpus",
        "0 leaves no GPU for the teacher, which stage {stage} of kind {kind} needs. Raise it, or use Vanilla "
        "stages "
        "only.",
        cel="s.kind == 'Vanilla' || self.teacher.gpus >= 1",
        broken=_no_teacher,
        terms={**_STAGE, "kind": "s.kind"},
        each="stages",
    ),
)
