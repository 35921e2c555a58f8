"""A dataset in the bucket: its id, the input that it was resolved to, the records of its parts and its
manifest.

The id is a hash of everything that decides the dataset's bytes, so equal runs share one dataset and a
complete one is never built again. The manifest is written last. The parts' content is in
preprocess/part_writer.py, the build order in preprocess/step.py.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

from vpmoe.api import DistillRun
from vpmoe.api.effort import EffortMix
from vpmoe.api.progress import DatasetStatus
from vpmoe.data.inputs import Inputs, resolve_source
from vpmoe.data.vocabulary import VOCABULARY_SHA256
from vpmoe.failure import Permanent
from vpmoe.storage import Bucket, manifest, paths
from vpmoe.storage.bucket import json_bytes
from vpmoe.storage.manifest import Input, Manifest, Sha256
from vpmoe.storage.paths import Split
from vpmoe.storage.records import facts_of, load_record

SPLITS: tuple[Split, Split] = ("train", "valid")

UNKNOWN = "unknown"
"""The label of rows without a language or exercise, in all counts and in a stage's subset."""

WRITER = 3
"""Version of the code that turns rows into bytes. Raise it with every change of rendering, filters, sampling,
order or file formats."""


def clean_label(label: str | None) -> str | None:
    """A row's language or exercise without blanks around it. None if it has none: null, empty and blank mean
    the same everywhere."""
    return (label or "").strip() or None


@dataclass(frozen=True)
class DatasetRef:
    """A dataset, built or not yet built, and its inputs. Part i is built from shard i."""

    id: str
    inputs: Inputs

    @property
    def folder(self) -> str:
        return paths.dataset(self.id)

    @property
    def manifest(self) -> str:
        return paths.manifest(self.folder)


@dataclass(frozen=True)
class ResolvedDataset:
    """The content of a run's inputs.json."""

    dataset: Sha256
    """Id of the dataset."""
    inputs: Inputs


class SplitFacts(TypedDict):
    """Of a split, in a dataset's manifest."""

    documents: int


class FactsOfSplits(TypedDict):
    """Of both splits, in a dataset's manifest."""

    train: SplitFacts
    valid: SplitFacts


class ConversationFacts(TypedDict):
    """Of dataset.conversation, in a dataset's manifest."""

    identity: str
    knowledgeCutoff: str
    date: str | None
    effort: EffortMix


class SettingsFacts(TypedDict):
    """Of spec.dataset, in a dataset's manifest."""

    conversation: ConversationFacts
    maxLength: int


class DatasetFacts(TypedDict):
    """The facts of a dataset's manifest that its readers use."""

    id: Sha256
    parts: int
    settings: SettingsFacts
    splits: FactsOfSplits


def dataset_settings(run: DistillRun) -> dict[str, Any]:
    """The fields of spec.dataset that decide the dataset's bytes: all but `workers`."""
    return {name: value for name, value in run.config()["spec"]["dataset"].items() if name != "workers"}


def dataset_id(settings: Mapping[str, Any], inputs: Inputs) -> str:
    """sha256 (hex) of settings, tokenizer, writer version and input: a commit, or each object's URL, size and
    ETag."""
    content = inputs.commit or [[shard.url, shard.size, shard.etag] for shard in inputs.shards]
    decides = {"dataset": settings, "tokenizer": VOCABULARY_SHA256, "writer": WRITER, "input": content}
    return hashlib.sha256(json_bytes(decides)).hexdigest()


def resolve_dataset(run: DistillRun, bucket: Bucket) -> DatasetRef:
    """The run's dataset. The first job to call this lists the source and stores the result with the run;
    later jobs read it.

    Input that is added or changed after that does not become part of the run, unless a file turns out to be
    unusable (`release_inputs`). Raises what `resolve_source` raises.
    """
    key = paths.inputs(run)
    if not bucket.exists(key):
        inputs = resolve_source(run.spec.dataset.source, bucket)
        found = {"dataset": dataset_id(dataset_settings(run), inputs), "inputs": inputs.as_json()}
        # Creates only: if another worker was first, its result is the one that is read below.
        bucket.create(key, json_bytes(found), {"config": run.config_hash})
    stored = load_record(bucket, key, ResolvedDataset)
    return DatasetRef(stored.dataset, stored.inputs)


def release_inputs(run: DistillRun, bucket: Bucket, dataset: DatasetRef) -> None:
    """Forget the input that the run was resolved to, because it cannot be used.

    The next attempt lists the source again, so it finds the files repaired or removed. Does nothing if the
    run has other input by now.
    """
    key = paths.inputs(run)
    if bucket.exists(key) and load_record(bucket, key, ResolvedDataset).dataset == dataset.id:
        bucket.delete(key)


def load_dataset(run: DistillRun, bucket: Bucket) -> Manifest:
    """The manifest of the run's dataset. Raises Permanent if the dataset is not built yet."""
    key = resolve_dataset(run, bucket).manifest
    if not bucket.exists(key):
        raise Permanent(
            f"{bucket.url(key)}: the run's dataset is not built yet. Run python -m jobs.preprocess first."
        )
    found = manifest.load(bucket, key)
    facts_of(bucket, found, "dataset", DatasetFacts)
    return found


def load_training_dataset(run: DistillRun, bucket: Bucket) -> Manifest:
    """The manifest of the run's dataset, if a stage can train on it.

    Raises Permanent if the dataset was not built, or has no training documents, or has no held-out documents
    although evaluation.documents asks for some.
    """
    dataset = load_dataset(run, bucket)
    splits = dataset.facts["splits"]
    if not splits["train"]["documents"]:
        raise Permanent(
            f"{bucket.url(dataset.key)}: the dataset's train split is empty, there is nothing to train on. "
            "Lower "
            "dataset.validFraction, or give dataset.source more rows."
        )
    if run.spec.evaluation.documents and not splits["valid"]["documents"]:
        raise Permanent(
            f"{bucket.url(dataset.key)}: the dataset's valid split is empty, so there is no held-out loss. "
            "Raise "
            "dataset.validFraction, or set evaluation.documents to 0 to train without one."
        )
    return dataset


def dataset_facts(bucket: Bucket, dataset: Manifest) -> DatasetStatus:
    """How progress.json refers to a dataset."""
    return DatasetStatus(id=dataset.facts["id"], manifest=bucket.url(dataset.key), sha256=dataset.sha256)


def dataset_input(bucket: Bucket, dataset: Manifest) -> Input:
    """How the manifest of something made from a dataset names the dataset among its inputs."""
    return Input("dataset", bucket.url(dataset.key), {"sha256": dataset.sha256}, {"id": dataset.facts["id"]})


def completed_parts(dataset: DatasetRef, bucket: Bucket) -> set[int]:
    """Numbers of the parts that have a record."""
    return recorded_parts(bucket, paths.part_record(dataset.id, 0))


def recorded_parts(bucket: Bucket, record: str) -> set[int]:
    """Numbers of the parts that have a record in the folder of `record`, the key of any part's record."""
    numbers = (
        found.key.rpartition("part-")[2].removesuffix(".json")
        for found in bucket.list(record.rpartition("/")[0] + "/")
    )
    return {int(number) for number in numbers if re.fullmatch(r"[0-9]{1,9}", number)}


def sum_counts(counts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The sum of nested counts, field by field."""
    added: dict[str, Any] = {}
    for count in counts:
        for name, value in count.items():
            added[name] = (
                sum_counts((added.get(name, {}), value))
                if isinstance(value, Mapping)
                else added.get(name, 0) + value
            )
    return dict(sorted(added.items()))
