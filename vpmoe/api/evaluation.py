"""spec.evaluation: what is measured during a stage and after it."""

from typing import Annotated

from pydantic import Field

from vpmoe.api.base import ApiModel
from vpmoe.api.quantities import Tokens
from vpmoe.api.student import S3_FOLDER


class EvaluationSpec(ApiModel):
    """How progress is measured while a stage trains, and after it."""

    every_tokens: Tokens = 100_000_000
    """Tokens between evaluations of the held-out loss while a stage trains. Lower shows more and trains less."""
    documents: Annotated[int, Field(ge=0, le=1_000_000)] = 2048
    """Held-out documents scored each time, the same ones in every stage. More is steadier and slower; 0 measures no held-out loss."""
    completions: Annotated[int, Field(ge=0, le=1_000_000)] = 256
    """Completions sampled after each stage to measure Harmony validity and lengths, a third at each effort. More is steadier and slower:
    with 256 a share is known to about 0.03. 0 measures none."""
    canary: Annotated[str, S3_FOLDER] | None = None
    """Text that is never trained on, measured in bits per byte after each stage: s3://bucket/path of a UTF-8 text on the endpoint of
    spec.storage, or of a folder of such. null measures none."""
