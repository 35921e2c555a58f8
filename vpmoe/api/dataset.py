"""spec.dataset: where the training text comes from, and how it becomes tokens. Every field but `workers` is part of the data set's id."""

from typing import Annotated, Literal

from pydantic import Field

from vpmoe.api.base import ApiModel, TextPattern

Effort = Literal["low", "medium", "high"]
Share = Annotated[float, Field(ge=0, le=1)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]

SOURCE = TextPattern(
    r"s3://[^/*?\[]+/.+|hf://[^/@]+/[^/@]+(@[^/@]+)?",
    "must be s3://bucket/path/*.parquet, or hf://owner/name or hf://owner/name@revision of a Hugging Face data set",
    max_length=1024,
)
MONTH = TextPattern(r"[0-9]{4}-(0[1-9]|1[0-2])", "must be a month as a string, such as 2024-06")
DAY = TextPattern(
    r"[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])", 'must be a day as a string, such as "2026-01-01"'
)


class Sampling(ApiModel):
    """Which documents are kept. Decided by a hash of each document's id, so the same documents are chosen every time."""

    keep: PositiveShare = 1.0
    """Share of all documents, between 0 and 1. Lower it for a small trial run on the same mixture."""
    memorization_max: Share = 0.70
    """Largest share of memorization exercises in what is kept, between 0 and 1. Rows without an exercise count as none. Lower
    favours reasoning over recall, and leaves less data."""
    non_english_max: Share = 0.30
    """Largest share of languages other than English in what is kept, between 0 and 1. Rows without a language count as English.
    Lower costs the other languages first, and leaves less data."""


class Conversation(ApiModel):
    """The system message that every document is rendered with. The student sees it at every step, so it must be the same when served."""

    identity: Annotated[str, Field(max_length=1024)] = "You are vpMoE, a large language model."
    """First line of the system message: who the student is told it is."""
    knowledge_cutoff: Annotated[str, MONTH] = "2024-06"
    """Month that the system message names as the end of the student's knowledge, as YYYY-MM."""
    date: Annotated[str, DAY] | None = "2026-01-01"
    """Day that the system message names as today, as YYYY-MM-DD; null leaves the line out (client-side `kubectl apply`
    drops nulls: use --server-side). Pinned, for it is part of the data."""
    effort: Effort = "high"
    """Reasoning effort that the system message names: low, medium or high. OnPolicy stages replace it prompt by prompt."""


class DatasetSpec(ApiModel):
    """The training text, and how it becomes tokens. The same settings over the same input are the same data set, built once."""

    source: Annotated[str, SOURCE]
    """Parquet shards in the SYNTH columns: s3://bucket/path/*.parquet on the endpoint of spec.storage, or hf://owner/name@revision of
    a Hugging Face data set (no revision: the newest, resolved to its commit once and written into the run)."""
    max_length: Annotated[
        int, Field(ge=16, le=1_048_576, json_schema_extra={"inherits": "training.sequenceLength"})
    ]
    """Longest document in tokens, its end-of-document token included; longer ones are dropped and counted. At most
    training.sequenceLength, which is the default. Lower drops more text."""
    valid_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.001
    """Share of documents held out from training, chosen by a hash of their id. Higher makes held-out losses steadier and training
    data less."""
    unreadable_max: Share = 0.01
    """Largest share of the input's rows that may be unreadable (damaged row groups, text that is not UTF-8). Each is named in the
    log and counted in the manifest; above this share preprocessing fails. Five rows are always tolerated."""
    sampling: Sampling = Sampling()
    """Which documents are kept."""
    conversation: Conversation = Conversation()
    """The system message that every document is rendered with."""
    workers: Annotated[int, Field(ge=1, le=1024)] = 8
    """Preprocessing pods that work side by side. More is faster, up to the number of input shards; the result is the same bytes."""
