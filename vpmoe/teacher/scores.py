"""A teacher's scores of a dataset: their id, their content, the records of their parts and, last, their
manifest.

The id is a hash of everything that decides the content, so equal stages share one set of scores, and finished
scores are never made again. No torch and no vLLM: the trainer imports this. part.py makes the files of a
part, rescore.py decides the order.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypedDict

import numpy as np
from pydantic import AfterValidator, Field

from vpmoe.api import DistillRun
from vpmoe.api.stages import Subset
from vpmoe.data.dataset import recorded_parts, sum_counts
from vpmoe.data.spans import SPANS
from vpmoe.failure import Permanent
from vpmoe.pretrained.model_files import ModelRef
from vpmoe.provenance import Provenance
from vpmoe.storage import Bucket, manifest, paths
from vpmoe.storage.bucket import json_bytes
from vpmoe.storage.manifest import Input, Manifest, Sha256, SubjectEntry
from vpmoe.storage.records import facts_of, load_record
from vpmoe.teacher.histogram import CODES, dense, mean, sparse
from vpmoe.teacher.model import resolve_teacher

SCORES_WRITER = 1
"""Version of the code that turns a teacher's log-probabilities into bytes. Raise it with every change of
picking, prompting, clamping or file formats."""


@dataclass(frozen=True)
class ScoresRef:
    """One set of scores: by which teacher, of which documents of which dataset."""

    dataset: str
    """Id of the dataset."""
    content: str
    """`training_content` of the dataset."""
    teacher: ModelRef
    effort: str
    subset: Subset

    @property
    def id(self) -> str:
        """sha256 (hex) of dataset, teacher, effort, subset and SCORES_WRITER."""
        decides = {
            "dataset": self.dataset,
            "teacher": self.teacher.sha256,
            "effort": self.effort,
            "subset": self.subset.model_dump(mode="json", by_alias=True),
            "writer": SCORES_WRITER,
        }
        return hashlib.sha256(json_bytes(decides)).hexdigest()

    @property
    def folder(self) -> str:
        return paths.scores(self.id)

    @property
    def manifest(self) -> str:
        return paths.manifest(self.folder)

    def origin(self) -> dict[str, Any]:
        """What the scores are made from: stored at scores_origin, and in the manifest's facts."""
        return {
            "id": self.id,
            "dataset": {"id": self.dataset, "content": self.content},
            "teacher": {"model": self.teacher.model, "sha256": self.teacher.sha256},
            "effort": self.effort,
            "subset": self.subset.model_dump(mode="json", by_alias=True),
            "writer": SCORES_WRITER,
        }


class ScoredDataset(TypedDict):
    """The dataset in the origin of scores."""

    content: str


class ScoresOrigin(TypedDict):
    """What a worker reads of an origin.json."""

    dataset: ScoredDataset


class SpanCounts(TypedDict):
    """A number for each span."""

    reasoning: int
    final: int


def _finite(bits: int) -> int:
    if not np.isfinite(np.uint16(bits).view(np.float16)):
        raise ValueError(f"the float16 of bits {bits} is not finite")
    return bits


Bits = Annotated[int, Field(ge=0, lt=CODES), AfterValidator(_finite)]
Histogram = list[tuple[Bits, Annotated[int, Field(gt=0, lt=1 << 53)]]]
"""histogram.sparse: pairs of float16 bits and count."""


class SpanHistograms(TypedDict):
    """A histogram for each span."""

    reasoning: Histogram
    final: Histogram


class ScoresFacts(ScoresOrigin):
    """The facts of the scores' manifest that its readers use."""

    id: Sha256
    histogram: SpanHistograms


class PartScores(TypedDict):
    """What a worker reads of a part's record."""

    documents: int
    tokens: SpanCounts
    languages: dict[str, dict[str, int]]
    exercises: dict[str, dict[str, int]]
    histogram: SpanHistograms
    files: list[SubjectEntry]


def resolve_scores(run: DistillRun, subset: Subset, bucket: Bucket, dataset: Manifest) -> ScoresRef:
    """The scores of a subset of the dataset. Raises what `resolve_teacher` raises."""
    teacher = resolve_teacher(run, bucket)
    return ScoresRef(dataset.facts["id"], training_content(dataset), teacher, run.spec.teacher.effort, subset)


def resolve_all_scores(run: DistillRun, bucket: Bucket, dataset: Manifest) -> list[ScoresRef]:
    """The scores that the run's stages train on, each set once, in the order of the stages."""
    found = [
        resolve_scores(run, stage.scored_subset, bucket, dataset)
        for stage in run.spec.stages
        if stage.scored_subset is not None
    ]
    return list({scores.id: scores for scores in found}.values())


def training_content(dataset: Manifest) -> str:
    """sha256 (hex) of a dataset's training tokens and spans: of the sorted (name, sha256) of their files."""
    files = [
        [name, s.sha256]
        for name, s in dataset.subjects.items()
        if name.startswith("train/") and name.endswith((".tokens.bin", ".spans.bin"))
    ]
    return hashlib.sha256(json_bytes(sorted(files))).hexdigest()


def load_scores(scores: ScoresRef, bucket: Bucket) -> Manifest:
    """The manifest of finished scores.

    Raises Permanent if they are of another content, StorageError (Missing) if there is none.
    """
    made = manifest.load(bucket, scores.manifest)
    facts = facts_of(bucket, made, "scores", ScoresFacts)
    check_content(scores, facts["dataset"]["content"], bucket.url(made.key), bucket)
    return made


def claim_scores(scores: ScoresRef, bucket: Bucket, provenance: Provenance) -> None:
    """Record the origin of the scores before their first part, or verify the origin that another worker
    recorded.

    Raises Permanent if the dataset of this id had another content then.
    """
    key = paths.scores_origin(scores.id)
    if not bucket.create(key, json_bytes(scores.origin()), provenance.metadata()):
        origin = load_record(bucket, key, ScoresOrigin)
        check_content(scores, origin["dataset"]["content"], bucket.url(key), bucket)


def check_content(scores: ScoresRef, content: str, where: str, bucket: Bucket) -> None:
    """Raise Permanent if `content`, as recorded at `where`, is not the dataset's current content."""
    if content != scores.content:
        raise Permanent(
            f"{where}: the scores are of content {content}, but dataset {scores.dataset} is now of content "
            f"{scores.content}: it was deleted and built again with other bytes. Delete "
            f"{bucket.url(scores.folder)} to have it scored again."
        )


def done_parts(scores: ScoresRef, bucket: Bucket) -> set[int]:
    """The parts that have a record."""
    return recorded_parts(bucket, paths.scores_record(scores.id, 0))


def merge_records(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The counts of all parts together, from the parts' records."""
    counts = {
        span: sum((dense(record["histogram"][span]) for record in records), np.zeros(CODES, np.int64))
        for span in SPANS
    }
    kept = ("documents", "tokens", "languages", "exercises")
    return {
        **sum_counts({name: record[name] for name in kept} for record in records),
        "mean": {span: mean(counts[span]) for span in SPANS},
        "histogram": {span: sparse(counts[span]) for span in SPANS},
    }


def write_scores_manifest(
    scores: ScoresRef,
    dataset: Manifest,
    records: Sequence[Mapping[str, Any]],
    provenance: Provenance,
    bucket: Bucket,
) -> Manifest:
    """Write the manifest of the scores from the records of all parts; returns the stored one, which another
    worker may have written."""
    subjects = [manifest.subject_of(entry, scores.folder) for record in records for entry in record["files"]]
    facts = {**scores.origin(), "parts": len(records), **merge_records(records)}
    inputs = [
        dataset.inputs["tokenizer"],
        Input(
            "dataset",
            bucket.url(dataset.key),
            {"sha256": dataset.sha256},
            {"id": dataset.facts["id"], "content": scores.content},
        ),
        Input(
            "teacher",
            scores.teacher.model,
            {"sha256": scores.teacher.sha256},
            {"files": len(scores.teacher.files)},
        ),
    ]
    return manifest.write(
        bucket, scores.manifest, manifest.statement("scores", subjects, facts, provenance, inputs)
    )
