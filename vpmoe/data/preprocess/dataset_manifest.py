"""A data set's manifest, made from the records of all its parts."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from vpmoe.data.dataset import SPLITS, WRITER, DatasetRef, sum_counts
from vpmoe.data.inputs import Shard
from vpmoe.data.preprocess.part import LISTED
from vpmoe.data.preprocess.sampling import Thresholds
from vpmoe.data.vocabulary import TOKENIZER, VOCABULARY_SHA256
from vpmoe.data.vocabulary_file import PACKAGE
from vpmoe.provenance import Provenance
from vpmoe.storage import Bucket, manifest
from vpmoe.storage.manifest import Input, Manifest


def merge(records: Sequence[Mapping[str, Any]], shards: Sequence[Shard]) -> dict[str, Any]:
    """What became of all rows: the sum of the parts' records, which are in the order of their shards."""
    first = [
        {"file": shard.url, "rows": [start, stop], "why": why}
        for record, shard in zip(records, shards, strict=True)
        for start, stop, why in record["unreadable"]["first"]
    ]
    splits = {split: sum_counts(record["splits"][split] for record in records) for split in SPLITS}
    return {
        "rows": sum(record["rows"] for record in records),
        "dropped": dict(sum((Counter(record["dropped"]) for record in records), Counter())),
        "unreadable": {
            "rows": sum(record["unreadable"]["rows"] for record in records),
            "first": first[:LISTED],
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
    """Make the data set exist: its manifest, from the records of all its parts. Returns the one that stands, ours or another worker's."""
    subjects = [manifest.subject_of(entry, dataset.folder) for record in records for entry in record["files"]]
    facts = {
        "id": dataset.id,
        "parts": len(records),
        "settings": dict(settings),
        "tokenizer": {"id": TOKENIZER, "sha256": VOCABULARY_SHA256},
        "writer": WRITER,
        "kept": thresholds.facts(),
        **merge(records, dataset.inputs.shards),
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
