"""Builds a dataset's manifest from the records of all its parts."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from vpmoe.data.dataset import SPLITS, WRITER, DatasetRef, sum_counts
from vpmoe.data.inputs import InputShard
from vpmoe.data.preprocess.part_writer import LISTED_UNREADABLE
from vpmoe.data.preprocess.sampling import Thresholds
from vpmoe.data.vocabulary import TOKENIZER, VOCABULARY_SHA256
from vpmoe.data.vocabulary_file import PACKAGE
from vpmoe.provenance import Provenance
from vpmoe.storage import Bucket, manifest
from vpmoe.storage.manifest import Input, Manifest


def merge_records(records: Sequence[Mapping[str, Any]], shards: Sequence[InputShard]) -> dict[str, Any]:
    """The counts of all rows: the sum of the parts' records, which are in the order of their shards."""
    first = [
        {"file": shard.url, "rows": [start, stop], "why": reason}
        for record, shard in zip(records, shards, strict=True)
        for start, stop, reason in record["unreadable"]["first"]
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
        "splits": splits,
        **sum_counts(splits.values()),
    }


def write_manifest(
    dataset: DatasetRef,
    settings: Mapping[str, Any],
    thresholds: Thresholds,
    records: Sequence[Mapping[str, Any]],
    provenance: Provenance,
    bucket: Bucket,
) -> Manifest:
    """Write the dataset's manifest, which completes the dataset. Returns the stored manifest, this worker's
    or another's."""
    subjects = [manifest.subject_of(entry, dataset.folder) for record in records for entry in record["files"]]
    facts = {
        "id": dataset.id,
        "parts": len(records),
        "settings": dict(settings),
        "tokenizer": {"id": TOKENIZER, "sha256": VOCABULARY_SHA256},
        "writer": WRITER,
        "kept": thresholds.shares(),
        **merge_records(records, dataset.inputs.shards),
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
