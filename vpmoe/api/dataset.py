"""spec.dataset: the source of the training text and how it becomes tokens.

Every field except `workers` is part of the dataset's id.
"""

from typing import Annotated

from pydantic import Field

from vpmoe.api.base import ApiModel, TextPattern
from vpmoe.api.effort import EffortMix

Share = Annotated[float, Field(ge=0, le=1)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]

SOURCE = TextPattern(
    r"s3://[^/*?\[]+/.+|hf://[^/@]+/[^/@]+(@[^/@]+)?",
    "must be s3://bucket/path/*.parquet, s3://bucket/**/*.parquet for a whole bucket, or hf://owner/name or "
    "hf://owner/name@revision of a Hugging Face dataset",
    max_length=1024,
)
MONTH = TextPattern(r"[0-9]{4}-(0[1-9]|1[0-2])", "must be a month as a string, such as 2024-06")
DAY = TextPattern(
    r"[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])", 'must be a day as a string, such as "2026-01-01"'
)


class Sampling(ApiModel):
    """Which documents are kept. A hash of each document's id decides, so the choice is the same every
    time."""

    keep: PositiveShare = 1.0
    """Share of all documents to keep, between 0 and 1. Lower it for a small trial run on the same mixture."""
    memorization_max: Share = 0.70
    """Largest share of memorization exercises among the kept documents, between 0 and 1. A row without an
    exercise does not count as one. Lower favours reasoning over recall and keeps fewer documents."""
    non_english_max: Share = 0.30
    """Largest share of documents in other languages than English among the kept documents, between 0 and 1. A
    row without a language counts as English. Lower keeps fewer documents in other languages, and fewer in
    total."""


class Conversation(ApiModel):
    """The system message of the documents. The student must be served with the same system message."""

    identity: Annotated[str, Field(max_length=1024)] = "You are vpMoE, a large language model."
    """First line of the system message: the name and role of the student."""
    knowledge_cutoff: Annotated[str, MONTH] = "2024-06"
    """Month in the system message that ends the student's knowledge, as YYYY-MM."""
    date: Annotated[str, DAY] | None = "2026-01-01"
    """Current date in the system message, as YYYY-MM-DD; null omits the line. Client-side `kubectl apply`
    drops nulls: use --server-side. The date is fixed because it is part of the dataset."""
    effort: Annotated[EffortMix, Field(json_schema_extra={"inherits": "stages"})] = "high"
    """Reasoning effort in the system message: low, medium or high for all documents, or the share of each as
    a text such as "low=0.3,medium=0.4,high=0.3"; the shares must add up to 1. With shares, a hash of a
    document's id draws its effort, which its system message has from then on. OnPolicy stages replace it for
    each prompt. The default is the mix of the whole curriculum, phases weighted by their share and stages by
    their tokens, so that the student knows every effort before it samples at it; without an OnPolicy stage it
    is high."""


class DatasetSpec(ApiModel):
    """The source of the training text and how it becomes tokens. Runs with the same settings and the same
    input share one dataset, which is built once."""

    source: Annotated[str, SOURCE]
    """Parquet files with the columns of SYNTH: s3://bucket/path/*.parquet on the endpoint of spec.storage, or
    hf://owner/name@revision for all *.parquet files of a Hugging Face dataset. Without a revision the newest
    commit is resolved once and recorded in the run. An S3 path is a pattern for whole keys: * is any
    characters within a folder, ** any across folders, ? one character, [abc] or [0-9] one of a set.
    Everything else stands for itself, braces and backslashes too; [*], [?] and [[] stand for the characters *
    ? and [. Sets that are negated ([!a], [^a]) and folders without a pattern are refused. Another source is
    another dataset."""
    max_length: Annotated[
        int, Field(ge=16, le=1_048_576, json_schema_extra={"inherits": "training.sequenceLength"})
    ]
    """Longest document in tokens, including its end-of-document token. Longer documents are dropped and
    counted. The default and the maximum is training.sequenceLength. Lower drops more text."""
    valid_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.001
    """Share of documents held out from training, below 1, chosen by a hash of their id. Higher makes held-out
    losses less noisy and leaves less training data."""
    unreadable_max: Share = 0.01
    """Largest share of input rows that may be unreadable (damaged row groups, text that is not UTF-8),
    between 0 and 1. Unreadable rows are logged and counted in the manifest; above this share preprocessing
    fails. Five rows are always tolerated."""
    sampling: Sampling = Sampling()
    """Which documents are kept."""
    conversation: Conversation = Conversation()
    """The system message of the documents."""
    workers: Annotated[int, Field(ge=1, le=1024)] = 8
    """Number of parallel preprocessing pods. More is faster, up to the number of input files; the result is
    byte-identical."""
