"""spec.teacher and spec.student: the two models and the GPUs of each."""

from typing import Annotated, Literal

from pydantic import Field

from vpmoe.api.base import ApiModel, TextPattern
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
    """GPUs of the teacher, one replica on each. More score faster. 0 is allowed only if every stage is
    Vanilla."""


class StudentSpec(ApiModel):
    """The model to train and its GPUs."""

    shape: ShapeName = "vpmoe-6b"
    """Architecture: vpmoe-6b (80 layers, 256 experts, 6.0 billion parameters), or tiny, which runs the same
    code, for trial runs."""
    init: Annotated[str, S3_FOLDER] | None = None
    """Initial weights: s3://bucket/path of a checkpoint of another run; null starts from random weights."""
    gpus: Annotated[int, Field(ge=1, le=4096)] = 7
    """GPUs of the student, one data-parallel rank on each. OnPolicy stages give some of them to the sampler
    (sampler.gpus)."""
    gpus_per_pod: Annotated[int, Field(ge=1, le=64)] | None = None
    """Most GPUs of one training pod; it must divide the ranks of every stage. null puts all ranks in one pod.
    A value below gpus makes a PyTorchJob with one Master and several Workers, which can run on several
    nodes."""
    expert_parallel: Annotated[int, Field(ge=1, le=256)] = 1
    """Number of ranks that share one set of experts. It must divide the experts of the shape and the ranks of
    every stage. Higher uses less memory on each GPU and adds all-to-all communication."""
