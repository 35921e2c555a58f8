"""The rules between the fields of spec. Python evaluates each rule with `broken`, the API server with `cel`.

The class Rule is in base.py; invalid.py puts the field in front of a message.
"""

from vpmoe.api.base import Rule
from vpmoe.api.card import CARD_MEMORY, GIB, cel_card_memory, parse_card_memory
from vpmoe.api.layout import EXPERTS, pod_size, ranks
from vpmoe.api.memory import cel_least_memory, stage_memory
from vpmoe.api.quantities import cel_is_tokens, cel_tokens
from vpmoe.api.spec_fields import SpecFields
from vpmoe.api.stages import OPTIMIZER_OF_KIND, Require, Stage, StageFields
from vpmoe.api.training import Optimizer

# CEL for what layout.py computes, over `self` (the spec) and `s` (a stage as the API server stores it).
_SAMPLER = "(has(s.sampler) && has(s.sampler.gpus) ? s.sampler.gpus : (self.student.gpus + 1) / 2)"
_RANKS = f"(self.student.gpus - (s.kind == 'OnPolicy' ? {_SAMPLER} : 0))"


def _pod(ranks: str) -> str:
    return (
        f"(has(self.student.gpusPerPod) && self.student.gpusPerPod < {ranks} "
        f"? self.student.gpusPerPod : {ranks})"
    )


def _let(name: str, value: str, condition: str) -> str:
    """CEL: the condition, in which `name` is the value. Each look at a field costs the API server much more
    than the list.
    """
    return f"[{value}].all({name}, {condition})"


_POD = _pod(_RANKS)
_EXPERTS = (
    "("
    + " : ".join(f"self.student.shape == '{shape}' ? {experts}" for shape, experts in EXPERTS.items())
    + " : 0)"
)
_COMMON = "self.training.optimizer"
_BATCH = "self.training.globalBatchTokens"


def _peak(common: str) -> str:
    return (
        "(has(s.optimizer) && has(s.optimizer.learningRate) ? s.optimizer.learningRate : "
        + "".join(
            f"s.kind == '{kind}' ? {changed['learningRate']} : "
            for kind, changed in OPTIMIZER_OF_KIND.items()
        )
        + f"{common}.learningRate)"
    )


def _low(common: str) -> str:
    return (
        "(has(s.optimizer) && has(s.optimizer.minLearningRate) ? s.optimizer.minLearningRate : "
        f"{common}.minLearningRate)"
    )


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


def _not_a_stage(spec: SpecFields) -> dict[str, object] | None:
    stages = [stage.name for stage in spec.stages]
    unknown = [name for name in spec.export.stages if name not in stages]
    return {"name": unknown[0]} if unknown else None


def _exported_twice(spec: SpecFields) -> dict[str, object] | None:
    names = spec.export.stages
    twice = [name for i, name in enumerate(names) if name in names[:i]]
    return {"name": twice[0]} if twice else None


def _nothing_held_out(spec: SpecFields, stage: Stage) -> dict[str, object] | None:
    needs_loss = stage.stop is not None and not stage.samples
    return {"stage": stage.name} if needs_loss and spec.evaluation.documents == 0 else None


def _no_teacher(spec: SpecFields, stage: Stage) -> dict[str, object] | None:
    return (
        {"stage": stage.name, "kind": stage.kind} if spec.teacher.gpus == 0 and stage.needs_teacher else None
    )


def _too_many_to_rescore(spec: SpecFields) -> dict[str, object] | None:
    gpus, teacher, student = spec.rescoring_gpus, spec.teacher.gpus, spec.student.gpus
    return {"gpus": gpus, "teacher": teacher, "student": student} if gpus > teacher + student else None


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


def _no_validity(spec: SpecFields, stage: StageFields) -> dict[str, object] | None:
    return (
        {"stage": stage.name, "validity": stage.min_validity}
        if stage.needs_measured_validity and spec.evaluation.completions == 0
        else None
    )


def _too_little_memory(spec: SpecFields, stage: StageFields) -> dict[str, object] | None:
    memory, world = spec.runtime.gpu_memory, ranks(spec.student, stage)
    if memory is None or world < 1:
        return None
    need = stage_memory(spec.student, stage, spec.training.sequence_length).total
    if need <= parse_card_memory(memory):
        return None
    return {
        "stage": stage.name,
        "shape": spec.student.shape,
        "ranks": world,
        "need": -(-need // GIB),
        "memory": memory,
    }


_MEMORY = "self.runtime.gpuMemory"
_NEED = cel_least_memory(
    "self.student.shape", "r", "self.student.expertParallel", "self.training.sequenceLength"
)
_STAGE = {"stage": "s.name"}
_EXPORTED = "self.export.stages"
_EXPORTS_NONE = f"!has(self.export) || !has({_EXPORTED})"

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
        cel=_let("o", _COMMON, "o.minLearningRate <= o.learningRate"),
        broken=lambda spec, _: _too_low(spec.training.optimizer),
        terms={"low": f"{_COMMON}.minLearningRate", "peak": f"{_COMMON}.learningRate"},
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
        cel=_let("o", _COMMON, f"o.minLearningRate > o.learningRate || {_low('o')} <= {_peak('o')}"),
        broken=_too_low_for_stage,
        terms={**_STAGE, "low": _low(_COMMON), "peak": _peak(_COMMON)},
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
        cel=_let("r", _RANKS, "r < 1 || r % self.student.expertParallel == 0"),
        broken=_uneven_ranks,
        terms={**_STAGE, "ranks": f"{_RANKS}", "parallel": "self.student.expertParallel"},
        each="stages",
    ),
    Rule(
        "stages",
        "stage {stage}: {ranks} GPUs do not divide into pods of {size}. Set student.gpusPerPod to a divisor "
        "of the "
        "ranks of every stage.",
        cel=_let("r", _RANKS, f"r < 1 || r % {_pod('r')} == 0"),
        broken=_uneven_pods,
        terms={**_STAGE, "ranks": f"{_RANKS}", "size": f"{_POD}"},
        each="stages",
    ),
    Rule(
        "stages",
        "stage {stage}: {ranks} GPUs in pods of {size} need several pods, but runtime.backend Job has one "
        "pod. Use "
        "PyTorchJob.",
        cel=f"self.runtime.backend != 'Job' || {_let('r', _RANKS, 'r <= ' + _pod('r'))}",
        broken=_several_pods,
        terms={**_STAGE, "ranks": f"{_RANKS}", "size": f"{_POD}"},
        each="stages",
    ),
    Rule(
        "training.globalBatchTokens",
        "{batch} is less than one sequence on every rank of stage {stage}: {ranks} × {length} = {least}. "
        "Raise it, "
        "or lower training.sequenceLength.",
        cel=_let(
            "r",
            _RANKS,
            "r < 1 || "
            + _let(
                "b",
                _BATCH,
                f"!{cel_is_tokens('b')} || {cel_tokens('b')} >= double(r * self.training.sequenceLength)",
            ),
        ),
        broken=_small_batch,
        terms={
            **_STAGE,
            "batch": f"int({cel_tokens(_BATCH)})",
            "ranks": f"{_RANKS}",
            "length": "self.training.sequenceLength",
            "least": f"{_RANKS} * self.training.sequenceLength",
        },
        each="stages",
    ),
    Rule(
        "runtime.gpuMemory",
        "stage {stage}: training {shape} on {ranks} GPUs takes at least {need} GiB of each, more than "
        "{memory}. Give the stage more GPUs (raise student.gpus or lower sampler.gpus), raise "
        "student.expertParallel, lower training.sequenceLength, or use GPUs with more memory and name it "
        "here. `vpmoe plan` shows the items.",
        cel=f"!has({_MEMORY}) || "
        + _let(
            "m",
            _MEMORY,
            f"!m.matches('^(?:{CARD_MEMORY})$') || "
            + _let("r", _RANKS, f"r < 1 || {_NEED} <= {cel_card_memory('m')}"),
        ),
        broken=_too_little_memory,
        terms={
            **_STAGE,
            "shape": "self.student.shape",
            "ranks": _RANKS,
            "need": f"[{_RANKS}].map(r, ({_NEED} + {GIB - 1}) / {GIB})[0]",
            "memory": _MEMORY,
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
        "stage {stage}: stop needs the held-out loss, but evaluation.documents is 0. Raise "
        "evaluation.documents, or "
        "remove stop.",
        cel="s.kind == 'OnPolicy' || !has(s.stop) || self.evaluation.documents > 0",
        broken=_nothing_held_out,
        terms=_STAGE,
        each="stages",
    ),
    Rule(
        "stages",
        "stage {stage}: stop.minValidity {validity} is not measured if evaluation.completions is 0. Raise "
        "evaluation.completions, or set stop.minValidity to 0.",
        cel="s.kind in ['TeacherForced', 'OnPolicy'] || !has(s.stop) || s.stop.minValidity == 0.0 "
        "|| self.evaluation.completions > 0",
        broken=_no_validity,
        terms={**_STAGE, "validity": "s.stop.minValidity"},
        each="stages",
        at_apply=True,
        unchanged=("stages", "evaluation"),
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
    Rule(
        "rescore.gpus",
        "{gpus} are more than the run has: teacher.gpus {teacher} + student.gpus {student}. Lower it.",
        cel="!has(self.rescore) || !has(self.rescore.gpus) || self.rescore.gpus <= self.teacher.gpus + "
        "self.student.gpus",
        broken=lambda spec, _: _too_many_to_rescore(spec),
        terms={
            "gpus": "self.rescore.gpus",
            "teacher": "self.teacher.gpus",
            "student": "self.student.gpus",
        },
    ),
    Rule(
        "export.stages",
        "{name} is not the name of a stage. Name stages of spec.stages, or write [] to export none.",
        cel=f"{_EXPORTS_NONE} || {_EXPORTED}.all(e, self.stages.exists(s, s.name == e))",
        broken=lambda spec, _: _not_a_stage(spec),
        terms={"name": f"{_EXPORTED}.filter(e, !self.stages.exists(s, s.name == e))[0]"},
    ),
    Rule(
        "export.stages",
        "{name} is named twice. Remove one.",
        cel=f"{_EXPORTS_NONE} || {_EXPORTED}.all(e, {_EXPORTED}.exists_one(f, f == e))",
        broken=lambda spec, _: _exported_twice(spec),
        terms={"name": f"{_EXPORTED}.filter(e, !{_EXPORTED}.exists_one(f, f == e))[0]"},
    ),
    Rule(
        "student.init",
        "is given beside resumeFrom, which brings weights of its own. Remove one.",
        cel="!has(self.student.init) || !has(self.resumeFrom)",
        broken=lambda spec, _: {} if spec.student.init and spec.resume_from else None,
        at_apply=True,
    ),
)
