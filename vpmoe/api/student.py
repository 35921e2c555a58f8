"""spec.teacher and spec.student: the two models, the GPUs of each, and where the student begins."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from vpmoe.api.base import ApiModel, Rule, TextPattern, invalid_text
from vpmoe.api.effort import Effort

ShapeName = Literal["vpmoe-6b", "tiny"]

S3_FOLDER = TextPattern(r"s3://[^/]+/.+", "must be s3://bucket/path", max_length=1024)
MODEL = TextPattern(
    r"s3://[^/]+/.+|hf://[^/@]+/[^/@]+(@[^/@]+)?",
    "must be s3://bucket/path of a Hugging Face model directory, or hf://owner/name@revision",
    max_length=1024,
)


class TeacherSpec(ApiModel):
    """The model to distill from. Stages of kind Vanilla do not use it."""

    model: Annotated[str, MODEL]
    """Hugging Face model directory of a GPT-OSS model: s3://bucket/path on the endpoint of spec.storage, or
    hf://owner/name@revision."""
    effort: Effort = "medium"
    """Reasoning effort in the teacher's system message when it scores: low, medium or high. It has no effect
    in TeacherForced stages, where teacher and student read the same tokens."""
    gpus: Annotated[int, Field(ge=0, le=1024)] = 1
    """GPUs of the teacher, one replica on each. More score faster, and in a TeacherForced stage keep the
    students busier: there each replica serves its share of the students, at most one a student, and all of
    them run in the first training pod. vpmoe plan prints which number suits the students. 0 is allowed only
    if every stage is Vanilla."""


class RescoreSpec(ApiModel):
    """How documents are scored for Rescored stages."""

    gpus: Annotated[int, Field(ge=1, le=5120)] | None = None
    """GPUs of the step rescore, one replica of the teacher on each; null takes those of the teacher
    (teacher.gpus), beside Vanilla stages. More, up to teacher.gpus + student.gpus, also take GPUs of the
    student: then every stage waits until rescoring has ended. That is faster if rescoring beside the Vanilla
    stages would take much longer than they do; `vpmoe plan` says which is faster."""


class UpcycleSpec(ApiModel):
    """A dense model that becomes the student's initial weights."""

    model: Annotated[str, MODEL]
    """Hugging Face model directory of a dense model like Qwen3 or Llama, of the student's hidden width:
    s3://bucket/path on the endpoint of spec.storage, or hf://owner/name@revision. Without a revision the
    newest commit is resolved once and recorded in the run."""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    """Seed of what the dense model does not give: noise of the experts, routers, tensor products. Change it
    to begin with other random numbers; training.seed does not change these weights."""


class InitSpec(ApiModel):
    """Initial weights of the student: one of checkpoint and upcycle. The optimizer begins anew."""

    checkpoint: Annotated[str, S3_FOLDER] | None = None
    """Weights and expert biases of a checkpoint of another run, or of its init folder: s3://bucket/path on
    the endpoint of spec.storage. It must be of the same shape."""
    upcycle: UpcycleSpec | None = None
    """Make the weights from a dense model, in the step init before the first stage, without GPUs."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "",
            "needs one of checkpoint and upcycle, and not both.",
            cel="has(self.checkpoint) != has(self.upcycle)",
            broken=lambda init, _: {} if (init.checkpoint is None) == (init.upcycle is None) else None,
        ),
    )


class StudentSpec(ApiModel):
    """The model to train and its GPUs."""

    shape: ShapeName = "vpmoe-6b"
    """Architecture: vpmoe-6b (80 layers, 256 experts, 6.0 billion parameters), or tiny, which runs the same
    code, for trial runs."""
    init: InitSpec | None = None
    """Initial weights: a checkpoint of another run, or a dense model; null starts from random weights."""
    gpus: Annotated[int, Field(ge=1, le=4096)] = 7
    """GPUs of the student, one data-parallel rank on each. OnPolicy stages give some of them to the sampler
    (sampler.gpus)."""
    gpus_per_pod: Annotated[int, Field(ge=1, le=64)] | None = None
    """Most GPUs of one training pod; it must divide the ranks of every stage. null puts all ranks in one pod.
    A value below gpus makes a PyTorchJob with one Master and several Workers, which can run on several
    nodes."""
    expert_parallel: Annotated[int, Field(ge=1, le=256)] = 1
    """Number of ranks that share one set of experts. It must divide the experts of the shape and the ranks of
    every stage. Higher uses less memory for weights and gradients on each GPU; in every layer these ranks
    gather each other's tokens."""

    @field_validator("init", mode="before")
    @classmethod
    def _no_address(cls, init: Any) -> Any:
        """Rejects what earlier versions had here, and says how it is written now."""
        if isinstance(init, str):
            raise invalid_text("is no mapping: write the address of a checkpoint as init.checkpoint")
        return init
