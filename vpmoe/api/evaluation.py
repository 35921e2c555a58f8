"""spec.evaluation: what is measured while a stage trains and after it."""

from typing import Annotated

from pydantic import Field

from vpmoe.api.base import ApiModel
from vpmoe.api.quantities import Tokens
from vpmoe.api.student import S3_FOLDER


class EvaluationSpec(ApiModel):
    """What is measured while a stage trains and after it."""

    every_tokens: Tokens = 100_000_000
    """Tokens between two evaluations of the held-out loss, and in OnPolicy of the canary. Lower measures more
    often and slows training down."""
    documents: Annotated[int, Field(ge=0, le=1_000_000)] = 2048
    """Number of held-out documents per evaluation, the same in every stage. More is less noisy and slower; 0
    measures no held-out loss."""
    completions: Annotated[int, Field(ge=0, le=1_000_000)] = 256
    """Number of completions sampled after each stage to measure Harmony validity and lengths, a third at each
    effort. More is less noisy and slower: with 256, the standard error of a share is about 0.03. 0 measures
    none."""
    canary: Annotated[str, S3_FOLDER] | None = None
    """Text that is never trained on, measured in bits per byte after each stage, and in OnPolicy every
    everyTokens: s3://bucket/path of a UTF-8 text or of a folder of texts on the endpoint of spec.storage.
    null measures the texts that come with vpMoE: prompts and plain text in eleven languages."""
