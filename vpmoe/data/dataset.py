"""A data set in the bucket: its id, which input it was resolved to, the records of its parts and, last, its manifest.

The id is a hash of everything that decides the bytes, so equal runs share one data set and a finished one is never built again.
What stands in the parts is part.py's business, in what order they are made preprocess.py's.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vpmoe.api import DistillRun
from vpmoe.api.progress import DatasetStatus
from vpmoe.data.inputs import Inputs, discover
from vpmoe.data.vocabulary import VOCABULARY_SHA256
from vpmoe.failure import Permanent
from vpmoe.storage import Bucket, manifest, paths
from vpmoe.storage.bucket import json_bytes
from vpmoe.storage.manifest import Input, Manifest
from vpmoe.storage.paths import Split

SPLITS: tuple[Split, Split] = ("train", "valid")

UNKNOWN = "unknown"
"""What rows without a language or an exercise are counted under."""

WRITER = 2
"""Version of what turns rows into bytes. Raise it with every change of rendering, filters, sampling, order or file formats."""


@dataclass(frozen=True)
class DatasetRef:
    """A data set and what it is, or will be, made of; part i is made of shard i."""

    id: str
    inputs: Inputs

    @property
    def folder(self) -> str:
        return paths.dataset(self.id)

    @property
    def manifest(self) -> str:
        return paths.manifest(self.folder)


def settings(run: DistillRun) -> dict[str, Any]:
    """spec.dataset without `workers`: what of it decides the bytes."""
    return {name: value for name, value in run.config()["spec"]["dataset"].items() if name != "workers"}


def dataset_id(settings: Mapping[str, Any], inputs: Inputs) -> str:
    """sha256 (hex) of the settings, the tokenizer, the writer and the input: a commit, or each object's address, size and ETag."""
    content = inputs.commit or [[shard.url, shard.size, shard.etag] for shard in inputs.shards]
    decides = {"dataset": settings, "tokenizer": VOCABULARY_SHA256, "writer": WRITER, "input": content}
    return hashlib.sha256(json_bytes(decides)).hexdigest()


def resolve(run: DistillRun, bucket: Bucket) -> DatasetRef:
    """The run's data set. The first job to ask lists the source and writes what it found into the run; later ones read that.

    So input that is added or changed while the run goes on does not become part of it. Raises what `discover` raises.
    """
    key = paths.inputs(run)
    if not bucket.exists(key):
        inputs = discover(run.spec.dataset.source, bucket)
        found = {"dataset": dataset_id(settings(run), inputs), "inputs": inputs.as_json()}
        bucket.create(
            key, json_bytes(found), {"config": run.config_hash}
        )  # another worker may have been first: its answer holds
    stored = bucket.get_json(key)
    return DatasetRef(stored["dataset"], Inputs.from_json(stored["inputs"]))


def load_dataset(run: DistillRun, bucket: Bucket) -> Manifest:
    """The run's data set. Raises Permanent where it has not been made."""
    found = resolve(run, bucket)
    if not bucket.exists(found.manifest):
        raise Permanent(
            f"{bucket.url(found.manifest)}: the run's data set is not there. Make it first: python -m jobs.preprocess."
        )
    return manifest.load(bucket, found.manifest)


def load_training_dataset(run: DistillRun, bucket: Bucket) -> Manifest:
    """The manifest of the run's dataset, if a stage can train on it.

    Raises Permanent if the dataset was not built, or has no training documents, or has no held-out documents although
    evaluation.documents asks for some.
    """
    dataset = load_dataset(run, bucket)
    splits = dataset.facts["splits"]
    if not splits["train"]["documents"]:
        raise Permanent(
            f"{bucket.url(dataset.key)}: the dataset's train split is empty, there is nothing to train on. Lower "
            "dataset.validFraction, or give dataset.source more rows."
        )
    if run.spec.evaluation.documents and not splits["valid"]["documents"]:
        raise Permanent(
            f"{bucket.url(dataset.key)}: the dataset's valid split is empty, so there is no held-out loss. Raise "
            "dataset.validFraction, or set evaluation.documents to 0 to train without one."
        )
    return dataset


def dataset_facts(bucket: Bucket, dataset: Manifest) -> DatasetStatus:
    """How progress.json refers to a dataset."""
    return DatasetStatus(id=dataset.facts["id"], manifest=bucket.url(dataset.key), sha256=dataset.sha256)


def dataset_input(bucket: Bucket, dataset: Manifest) -> Input:
    """How the manifest of something made from a dataset names the dataset among its inputs."""
    return Input("dataset", bucket.url(dataset.key), {"sha256": dataset.sha256}, {"id": dataset.facts["id"]})


def done_parts(dataset: DatasetRef, bucket: Bucket) -> set[int]:
    """The parts whose record is there."""
    return recorded(bucket, paths.part_record(dataset.id, 0))


def recorded(bucket: Bucket, record: str) -> set[int]:
    """The numbers of the parts whose record is there, beside `record`, the key of any of them."""
    numbers = (
        found.key.rpartition("part-")[2].removesuffix(".json")
        for found in bucket.list(record.rpartition("/")[0] + "/")
    )
    return {int(number) for number in numbers}


def sum_counts(counts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Nested counts, added up field by field."""
    added: dict[str, Any] = {}
    for count in counts:
        for name, value in count.items():
            added[name] = (
                sum_counts((added.get(name, {}), value))
                if isinstance(value, Mapping)
                else added.get(name, 0) + value
            )
    return dict(sorted(added.items()))
