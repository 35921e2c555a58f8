"""Preprocessing end to end beside the raw tokenizer: tokens per second of both, on the same text, in the same
run.

    python -m benchmarks.preprocess [--parquet FILE …] [--tokens 60M] [--repeats 3]

End to end is the whole step as a pod does it, from parquet shards in an S3 store (a versitygw on this
machine, which costs CPU too) to parts, records and manifest in it: census, reading, filters, Harmony
assembly, shuffling, index files, hashing, upload. Raw is tiktoken's `encode_ordinary` over the same user,
reasoning and answer texts, in the same number of processes, with nothing around it. Both count the text's
tokens only, not the system message and wrappers that every document also has, and neither counts the seconds
in which its processes start. "Processes" are those that encode; the step has one more that reads and writes.
The two take turns, so that a noisy machine hits both; medians are printed. The rows are repeated until there
are enough, so words come back more often than in a corpus, which flatters a tokenizer that remembers them. On
a machine that does other work too, the CPU time of each tells more than the clock: the step's is that of all
its processes, without the store's.
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

from demo import sample
from devcluster import binaries
from tests.fakes.waiting import answers, wait_until
from vpmoe.api import DistillRun
from vpmoe.api.quantities import parse_tokens
from vpmoe.data import vocabulary_file
from vpmoe.data.harmony import user_text
from vpmoe.data.preprocess.encode import EncoderPool
from vpmoe.data.preprocess.filters import quality
from vpmoe.data.preprocess.step import preprocess
from vpmoe.process.launcher import free_port
from vpmoe.provenance import Provenance
from vpmoe.storage import Bucket

SHARDS = 2
JOINED = 4
"""The sample's rows have some 190 tokens of text, SYNTH's some 740."""


def texts_of(row: dict[str, Any]) -> list[str]:
    """What of a row is tokenized; nothing of a row that is dropped."""
    if quality(row["synthetic_answer"], row["constraints"]):
        return []
    texts = [
        user_text(row["query"], row["query_seed_text"]),
        row["synthetic_reasoning"] or "",
        row["synthetic_answer"],
    ]
    return [text for text in texts if text.strip()]


def as_long_as_synths(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The sample's rows, JOINED to one: what a row costs beside its text would otherwise be seen four times
    as large as it is."""
    kept = [row for row in rows if texts_of(row)]
    texts = ("query", "synthetic_reasoning", "synthetic_answer")
    groups = [kept[start : start + JOINED] for start in range(0, len(kept) - JOINED + 1, JOINED)]
    joined = [{name: "\n\n".join(row[name] or "" for row in group) for name in texts} for group in groups]
    return [
        {**group[0], "constraints": None, **of_group} for group, of_group in zip(groups, joined, strict=True)
    ]


def enough(rows: list[dict[str, Any]], tokens: int) -> list[dict[str, Any]]:
    """The rows, repeated under ids of their own until they hold so many tokens."""
    encoding = vocabulary_file.encoding()
    once = sum(len(encoding.encode_ordinary(text)) for row in rows for text in texts_of(row))
    return [
        {**row, "synth_id": f"{row['synth_id']}-{turn}"} for turn in range(-(-tokens // once)) for row in rows
    ]


def cpu_seconds(store: int) -> float:
    """CPU time so far of this process and all below it, the store's apart."""
    total, queue = 0.0, [os.getpid()]
    while queue:
        process = Path("/proc") / str(queue.pop())
        fields = (process / "stat").read_text().rpartition(")")[2].split()
        total += sum(int(ticks) for ticks in fields[11:13]) / os.sysconf("SC_CLK_TCK")
        children = [
            int(child)
            for task in (process / "task").iterdir()
            for child in (task / "children").read_text().split()
        ]
        queue += [child for child in children if child != store]
    return total


def encode_all(texts: list[str], pipe: Connection) -> None:
    """One raw process: count the tokens once it is told to start."""
    encoding = vocabulary_file.encoding()
    pipe.send("ready")
    pipe.recv()
    before = time.process_time()
    tokens = sum(len(encoding.encode_ordinary(text)) for text in texts)
    pipe.send((tokens, time.process_time() - before))


def raw(texts: list[str], processes: int) -> tuple[int, float, float]:
    """Tokens of all texts, the seconds that so many processes take for them, each its share, and the CPU
    seconds of all."""
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
    counted = [pipe.recv() for pipe in pipes]
    seconds = time.perf_counter() - started
    for process in running:
        process.join()
    return sum(tokens for tokens, _ in counted), seconds, sum(cpu for _, cpu in counted)


def whole(endpoint: str, store: int, source: str, encoders: EncoderPool) -> tuple[float, float]:
    """Seconds and CPU seconds of the step, into a prefix where nothing is yet."""
    run = DistillRun.parse(
        {
            "apiVersion": "vpmoe.dev/v1alpha1",
            "kind": "DistillRun",
            "metadata": {"name": "benchmark"},
            "spec": {
                "dataset": {
                    "source": source,
                    "maxLength": 1 << 17,
                    "workers": 1,
                    "sampling": {"memorizationMax": 1.0, "nonEnglishMax": 1.0},
                },
                "teacher": {"model": "s3://none/none"},
                "student": {"shape": "tiny", "gpus": 1},
                "training": {"sequenceLength": 1 << 17, "globalBatchTokens": 1 << 17},
                "stages": [{"name": "vanilla", "kind": "Vanilla", "tokens": 1 << 17}],
                "storage": {
                    "endpoint": endpoint,
                    "bucket": "benchmark",
                    "prefix": secrets.token_hex(8),
                    "credentialsSecret": None,
                },
            },
        }
    )
    bucket = Bucket.open(run.spec.storage)
    provenance = Provenance(
        None, None, run.config_hash, "default", "benchmark", run.uid8, "preprocess", 1, "2026-01-01T00:00:00Z"
    )
    started, before = time.perf_counter(), cpu_seconds(store)
    preprocess(run, bucket, provenance, threading.Event(), None, encoders)
    seconds, cpu = time.perf_counter() - started, cpu_seconds(store) - before
    bucket.delete_prefix("datasets")
    return seconds, cpu


@contextmanager
def store() -> Iterator[tuple[str, int, Path]]:
    """A versitygw on loopback: its endpoint, its process, and the folder in which buckets are folders."""
    with tempfile.TemporaryDirectory(prefix="vpmoe-benchmark-") as folder:
        port = free_port()
        endpoint = f"http://127.0.0.1:{port}"
        os.environ.update(
            AWS_ACCESS_KEY_ID="benchmark", AWS_SECRET_ACCESS_KEY="benchmark", AWS_ENDPOINT_URL=endpoint
        )
        (Path(folder) / "benchmark").mkdir()
        server = subprocess.Popen(
            [binaries.path("versitygw"), "--port", f"127.0.0.1:{port}", "posix", folder],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "ROOT_ACCESS_KEY": "benchmark", "ROOT_SECRET_KEY": "benchmark"},
        )
        try:
            wait_until(lambda: answers(endpoint), "versitygw answers")
            yield endpoint, server.pid, Path(folder)
        finally:
            server.kill()
            server.wait()


def main() -> None:
    """Take turns, and print each turn and the medians."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.preprocess")
    parser.add_argument(
        "--parquet",
        type=Path,
        nargs="+",
        help="files with SYNTH's columns (default: the sample, rows joined)",
    )
    parser.add_argument(
        "--tokens", type=parse_tokens, default=60_000_000, help="text to process in each turn (default: 60M)"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    given = parser.parse_args()
    say = sys.stdout.write
    rows = (
        [row for path in given.parquet for row in pq.read_table(path).to_pylist()]
        if given.parquet
        else as_long_as_synths(sample.rows())
    )
    rows = enough(rows, given.tokens)
    texts = [text for row in rows for text in texts_of(row)]
    source = "s3://benchmark/input/*.parquet"
    with store() as (endpoint, server, folder):
        (folder / "benchmark" / "input").mkdir()
        for number in range(SHARDS):
            table = pa.Table.from_pylist(rows[number::SHARDS], schema=sample.SCHEMA)
            pq.write_table(
                table, folder / "benchmark" / "input" / f"synth_{number + 1:03d}.parquet", row_group_size=1000
            )
        for processes in given.processes:
            turns = []
            with EncoderPool(processes) as encoders:
                whole(
                    endpoint, server, "s3://benchmark/input/*001.parquet", encoders
                )  # not counted: the processes start
                for turn in range(given.repeats):
                    tokens, raw_seconds, raw_cpu = raw(texts, processes)
                    seconds, cpu = whole(endpoint, server, source, encoders)
                    turns.append(
                        (
                            tokens / raw_seconds / 1e6,
                            tokens / seconds / 1e6,
                            raw_seconds / seconds,
                            raw_cpu / cpu,
                        )
                    )
                    say(
                        f"{processes} process(es), turn {turn + 1}, {len(rows):,} rows, {tokens / 1e6:.1f} M "
                        f"tokens: {line(turns[-1])}\n"
                    )
            say(
                f"{processes} process(es), median: "
                f"{line(tuple(statistics.median(values) for values in zip(*turns, strict=True)))}\n"
            )


def line(figures: tuple[float, ...]) -> str:
    """The figures of one turn, or the medians of all."""
    raw_speed, speed, of_raw, of_raw_cpu = figures
    speeds = f"raw {raw_speed:.2f}, end to end {speed:.2f} M tokens/s"
    return f"{speeds}, {of_raw:.0%} of raw; by CPU time {of_raw_cpu:.0%} of raw"


if __name__ == "__main__":
    main()
