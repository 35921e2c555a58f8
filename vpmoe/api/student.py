"""spec.teacher and spec.student: the two models, and the GPUs that each may use."""

from typing import Annotated, Literal

from pydantic import Field

from vpmoe.api.base import ApiModel, TextPattern
from vpmoe.api.dataset import Effort

ShapeName = Literal["vpmoe-6b", "tiny"]

S3_FOLDER = TextPattern(r"s3://[^/]+/.+", "must be s3://bucket/path", max_length=1024)
MODEL = TextPattern(
    r"s3://[^/]+/.+|hf://[^/@]+/[^/@]+(@[^/@]+)?",
    "must be s3://bucket/path of a Hugging Face model directory, or hf://owner/name@revision",
    max_length=1024,
)


class TeacherSpec(ApiModel):
    """The model that is distilled from. Stages of kind Vanilla train on the data set alone and never start it."""

    model: Annotated[str, MODEL]
    """A Hugging Face model directory of GPT-OSS: s3://bucket/path on the endpoint of spec.storage, or hf://owner/name@revision."""
    effort: Effort = "medium"
    """Reasoning effort that the teacher is told when it scores: low, medium or high. It does not apply to TeacherForced stages,
    where teacher and student read the same tokens."""
    gpus: Annotated[int, Field(ge=0, le=1024)] = 1
    """GPUs that serve the teacher, one replica each. More score faster. 0 only where every stage is Vanilla."""


class StudentSpec(ApiModel):
    """The model that is trained, and how it is spread over GPUs."""

    shape: ShapeName = "vpmoe-6b"
    """Architecture: vpmoe-6b (80 layers, 256 experts, 6.0 billion parameters), or tiny, of the same code, for trial runs."""
    init: Annotated[str, S3_FOLDER] | None = None
    """Weights to start from, s3://bucket/path of another run's checkpoint; null starts from random weights."""
    gpus: Annotated[int, Field(ge=1, le=4096)] = 7
    """GPUs of the student, one data-parallel rank each. OnPolicy stages give some of them to the sampler (sampler.gpus)."""
    gpus_per_pod: Annotated[int, Field(ge=1, le=64)] | None = None
    """GPUs of one training pod at most; it must divide the ranks of every stage. null puts all of them in one pod; less than gpus
    makes a PyTorchJob of one Master and Workers, which may stand on several nodes."""
    expert_parallel: Annotated[int, Field(ge=1, le=256)] = 1
    """Ranks that share one set of experts. It must divide the experts of the shape and the ranks of every stage. Higher saves
    memory on each GPU and adds all-to-all traffic."""
