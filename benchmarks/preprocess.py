"""Preprocessing end to end beside the raw tokenizer: tokens per second of both, on the same text, in the same run.

    python -m benchmarks.preprocess [--parquet FILE …] [--tokens 8M] [--repeats 3]

End to end is the whole step as a pod does it, from parquet shards in an S3 store (a versitygw on this machine, which costs CPU too)
to parts, records and manifest in it: census, reading, filters, Harmony assembly, shuffling, index files, hashing, upload. Raw is
`encode_ordinary` over the same user, reasoning and answer texts, in the same number of processes, with nothing around it. Both count
the text's tokens only, not the system message and wrappers that every document also has, and neither counts the seconds in which its
processes start. "Processes" are those that encode; the step has one more that reads and writes. The two take turns, so that a noisy
machine hits both; medians are printed.
"""

import argparse
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests import sample
from tests.conftest import answers, free_port, wait_until
from tests.devcluster import binaries
from vpmoe.api import DistillRun
from vpmoe.api.quantities import parse_tokens
from vpmoe.data import vocabulary
from vpmoe.data.encode import Encoders
from vpmoe.data.filters import quality
from vpmoe.data.harmony import user_text
from vpmoe.data.preprocess import preprocess
from vpmoe.provenance import Provenance
from vpmoe.storage import Bucket

SHARDS = 3


def texts_of(row: dict[str, Any]) -> list[str]:
    """What of a row is tokenized; nothing of a row that is dropped."""
    if quality(row["synthetic_answer"], row["constraints"]):
        return []
    texts = [user_text(row["query"], row["query_seed_text"]), row["synthetic_reasoning"] or "", row["synthetic_answer"]]
    return [text for text in texts if text.strip()]


def enough(rows: list[dict[str, Any]], tokens: int) -> list[dict[str, Any]]:
    """The rows, repeated under ids of their own until they hold so many tokens."""
    encoding = vocabulary.encoding()
    once = sum(len(encoding.encode_ordinary(text)) for row in rows for text in texts_of(row))
    return [{**row, "synth_id": f"{row['synth_id']}-{turn}"} for turn in range(-(-tokens // once)) for row in rows]


def encode_all(texts: list[str], pipe: Connection) -> None:
    """One raw process: count the tokens once it is told to start."""
    encoding = vocabulary.encoding()
    pipe.send("ready")
    pipe.recv()
    pipe.send(sum(len(encoding.encode_ordinary(text)) for text in texts))


def raw(texts: list[str], processes: int) -> tuple[int, float]:
    """Tokens of all texts, and the seconds that so many processes take for them, each its share."""
    context = get_context("forkserver")
    pipes, running = [], []
    for number in range(processes):
        ours, theirs = context.Pipe()
        running.append(context.Process(target=encode_all, args=(texts[number::processes], theirs)))
        running[-1].start()
        pipes.append(ours)
    for pipe in pipes:
        pipe.recv()
    started = time.perf_counter()
    for pipe in pipes:
        pipe.send("go")
    tokens = sum(pipe.recv() for pipe in pipes)
    seconds = time.perf_counter() - started
    for process in running:
        process.join()
    return tokens, seconds


def whole(endpoint: str, source: str, encoders: Encoders) -> float:
    """Seconds of the step, into a prefix where nothing is yet."""
    run = DistillRun.parse({
        "apiVersion": "vpmoe.dev/v1alpha1", "kind": "DistillRun", "metadata": {"name": "benchmark"},
        "spec": {
            "dataset": {"source": source, "maxLength": 1 << 17, "workers": 1, "sampling": {"memorizationMax": 1.0, "nonEnglishMax": 1.0}},
            "teacher": {"model": "s3://none/none"},
            "student": {"shape": "tiny", "gpus": 1},
            "training": {"sequenceLength": 1 << 17, "globalBatchTokens": 1 << 17},
            "stages": [{"name": "vanilla", "kind": "Vanilla", "tokens": 1 << 17}],
            "storage": {"endpoint": endpoint, "bucket": "benchmark", "prefix": secrets.token_hex(8), "credentialsSecret": None},
        },
    })
    bucket = Bucket.open(run.spec.storage)
    provenance = Provenance(None, None, run.config_hash, "default", "benchmark", run.uid8, "preprocess", 1, "2026-01-01T00:00:00Z")
    started = time.perf_counter()
    preprocess(run, bucket, provenance, threading.Event(), None, encoders)
    seconds = time.perf_counter() - started
    bucket.delete_prefix("datasets")
    return seconds


@contextmanager
def store() -> Iterator[tuple[str, Path]]:
    """A versitygw on loopback: its endpoint, and the folder in which buckets are folders."""
    with tempfile.TemporaryDirectory(prefix="vpmoe-benchmark-") as folder:
        port = free_port()
        endpoint = f"http://127.0.0.1:{port}"
        os.environ.update(AWS_ACCESS_KEY_ID="benchmark", AWS_SECRET_ACCESS_KEY="benchmark", AWS_ENDPOINT_URL=endpoint)
        (Path(folder) / "benchmark").mkdir()
        server = subprocess.Popen(
            [binaries.path("versitygw"), "--port", f"127.0.0.1:{port}", "posix", folder],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env={**os.environ, "ROOT_ACCESS_KEY": "benchmark", "ROOT_SECRET_KEY": "benchmark"})
        try:
            wait_until(lambda: answers(endpoint), "versitygw answers")
            yield endpoint, Path(folder)
        finally:
            server.kill()
            server.wait()


def main() -> None:
    """Take turns, and print each turn and the medians."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.preprocess")
    parser.add_argument("--parquet", type=Path, nargs="+", help="files with SYNTH's columns (default: the sample in tests/sample)")
    parser.add_argument("--tokens", type=parse_tokens, default=8_000_000, help="text to process in each turn (default: 8M)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    given = parser.parse_args()
    say = sys.stdout.write
    rows = [row for path in given.parquet for row in pq.read_table(path).to_pylist()] if given.parquet else sample.rows()
    rows = enough(rows, given.tokens)
    texts = [text for row in rows for text in texts_of(row)]
    source = "s3://benchmark/input/*.parquet"
    with store() as (endpoint, folder):
        (folder / "benchmark" / "input").mkdir()
        for number in range(SHARDS):
            table = pa.Table.from_pylist(rows[number::SHARDS], schema=sample.SCHEMA)
            pq.write_table(table, folder / "benchmark" / "input" / f"synth_{number + 1:03d}.parquet", row_group_size=1000)
        for processes in given.processes:
            turns = []
            with Encoders(processes) as encoders:
                whole(endpoint, source, encoders)  # not counted: the processes start, and load the vocabulary
                for turn in range(given.repeats):
                    tokens, seconds = raw(texts, processes)
                    total = whole(endpoint, source, encoders)
                    turns.append((tokens / seconds / 1e6, tokens / total / 1e6, seconds / total))
                    say(f"{processes} process(es), turn {turn + 1}: {len(rows):,} rows, {tokens / 1e6:.1f} M tokens: "
                        f"raw {turns[-1][0]:.2f}, end to end {turns[-1][1]:.2f} M tokens/s, {turns[-1][2]:.0%} of raw\n")
            median = [statistics.median(values) for values in zip(*turns, strict=True)]
            say(f"{processes} process(es), median: raw {median[0]:.2f}, end to end {median[1]:.2f} M tokens/s, {median[2]:.0%} of raw\n")


if __name__ == "__main__":
    main()
