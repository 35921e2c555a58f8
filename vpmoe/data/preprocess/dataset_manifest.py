"""Builds a dataset's manifest from the records of all its parts."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict

from pydantic import ConfigDict

from vpmoe.data.dataset import SPLITS, WRITER, DatasetRef, sum_counts
from vpmoe.data.inputs import InputShard
from vpmoe.data.preprocess.part_writer import LISTED_CONTRADICTIONS, LISTED_UNREADABLE
from vpmoe.data.preprocess.sampling import Thresholds
from vpmoe.data.vocabulary import TOKENIZER, VOCABULARY_SHA256
from vpmoe.data.vocabulary_file import PACKAGE
from vpmoe.provenance import Provenance
from vpmoe.storage import Bucket, manifest
from vpmoe.storage.manifest import Input, Manifest, SubjectEntry


class UnreadableCounts(TypedDict):
    """Of the rows of a part that cannot be read."""

    rows: int
    first: list[tuple[int, int, str]]


class SplitCounts(TypedDict):
    """Of a split of a part."""

    documents: int
    tokens: int
    reasoning: int
    final: int
    languages: dict[str, dict[str, int]]
    exercises: dict[str, dict[str, int]]
    efforts: NotRequired[dict[str, dict[str, int]]]
    """Only if efforts were drawn."""


class CountsOfSplits(TypedDict):
    """Of both splits of a part."""

    train: SplitCounts
    valid: SplitCounts


class ListedContradiction(TypedDict):
    """A row that was dropped as contradictedResult."""

    row: int
    id: str
    result: str
    answer: str


class PartRecord(TypedDict):
    """The record of a finished part, as part_writer.PartWriter.counts makes it. Other fields are kept."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    rows: int
    dropped: dict[str, int]
    unreadable: UnreadableCounts
    surrogates: int
    emptyQueries: int
    contradictions: list[ListedContradiction]
    splits: CountsOfSplits
    files: list[SubjectEntry]


def merge_records(records: Sequence[Mapping[str, Any]], shards: Sequence[InputShard]) -> dict[str, Any]:
    """The counts of all rows: the sum of the parts' records, which are in the order of their shards."""
    first = [
        {"file": shard.url, "rows": [start, stop], "why": reason}
        for record, shard in zip(records, shards, strict=True)
        for start, stop, reason in record["unreadable"]["first"]
    ]
    contradictions = [
        {"file": shard.url, **listed}
        for record, shard in zip(records, shards, strict=True)
        for listed in record["contradictions"]
    ]
    splits = {split: sum_counts(record["splits"][split] for record in records) for split in SPLITS}
    return {
        "rows": sum(record["rows"] for record in records),
        "dropped": dict(sum((Counter(record["dropped"]) for record in records), Counter())),
        "unreadable": {
            "rows": sum(record["unreadable"]["rows"] for record in records),
            "first": first[:LISTED_UNREADABLE],
        },
        "surrogates": sum(record["surrogates"] for record in records),
        "emptyQueries": sum(record["emptyQueries"] for record in records),
        "contradictions": contradictions[:LISTED_CONTRADICTIONS],
        "splits": splits,
        **sum_counts(splits.values()),
    }


def summary(facts: Mapping[str, Any]) -> str:
    """The counts of a dataset's rows, for the step's last line."""
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in facts["dropped"].items()) or "none"
    ids, queries = facts["duplicates"]["ids"], facts["duplicates"]["queries"]
    return (
        f"{facts['documents']:,} documents of {facts['rows']:,} rows; {facts['tokens']:,} tokens; "
        f"unreadable rows: {facts['unreadable']['rows']:,}; dropped rows: {dropped}; "
        f"duplicates: {ids:,} ids, {queries:,} queries; empty queries: {facts['emptyQueries']:,}"
    )


def write_manifest(
    dataset: DatasetRef,
    settings: Mapping[str, Any],
    thresholds: Thresholds,
    facts: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    provenance: Provenance,
    bucket: Bucket,
) -> Manifest:
    """Write the dataset's manifest, which completes the dataset. Returns the stored manifest, this worker's
    or another's.

    `facts`: the counts of all rows, from merge_records and duplicates.py.
    """
    subjects = [manifest.subject_of(entry, dataset.folder) for record in records for entry in record["files"]]
    facts = {
        **facts,
        "id": dataset.id,
        "parts": len(records),
        "settings": dict(settings),
        "tokenizer": {"id": TOKENIZER, "sha256": VOCABULARY_SHA256},
        "writer": WRITER,
        "kept": thresholds.shares(),
    }
    commit = {"gitCommit": dataset.inputs.commit} if dataset.inputs.commit else {}
    inputs = [
        Input("tokenizer", PACKAGE, {"sha256": VOCABULARY_SHA256}, {"id": TOKENIZER}),
        *(
            Input(shard.url, shard.url, commit, {"size": shard.size, "etag": shard.etag})
            for shard in dataset.inputs.shards
        ),
    ]
    return manifest.write(
        bucket, dataset.manifest, manifest.statement("dataset", subjects, facts, provenance, inputs)
    )
