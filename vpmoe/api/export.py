"""spec.export: which stages' students become models for transformers and vLLM."""

from typing import Annotated

from pydantic import Field, Strict

from vpmoe.api.base import ApiModel


class ExportSpec(ApiModel):
    """The stages whose student is written to the bucket as a model for transformers and vLLM."""

    stages: Annotated[
        tuple[Annotated[str, Field(max_length=16)], ...],
        Strict(False),
        Field(max_length=8, json_schema_extra={"inherits": "stages"}),
    ]
    """Names of the stages to export, each by a step <stage>-export without GPUs after the last stage. The
    default is the last stage; an empty list exports none."""
