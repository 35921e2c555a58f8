"""Tokens per second of preprocessing, end to end, compared with the raw tokenizer on the same text.

    python -m benchmarks.preprocess [--parquet FILE …] [--tokens 60M] [--repeats 3] [--processes 1 2]

End to end is the whole step as a pod runs it: it reads parquet shards from an S3 store and writes parts,
records and manifest to it (census, reading, filters, Harmony assembly, shuffling, index files, hashing,
upload). The store is a versitygw on this machine and uses CPU too. Raw is tiktoken's `encode_ordinary` alone,
on the same user, reasoning and answer texts, in the same number of processes. `--processes` counts processes
that encode; the step has one more, which reads and writes.

Both count the tokens of the text only, without the system message and the wrappers of each document. Neither
includes the time to start its processes. The two alternate, so that noise affects both; the last line is the
median. The rows are repeated until they have `--tokens` tokens, so words recur more often than in a corpus,
which favours a tokenizer with a cache. Runs on CPUs. If the machine does other work too, compare the CPU
times; that of the step includes all its processes except the store.
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
from collections.abc import Iterator, Sequence
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
from vpmoe.process.board import ProgressBoard
from vpmoe.process.launcher import free_port
from vpmoe.provenance import Provenance
from vpmoe.storage import Bucket

SHARDS = 2
"""Parquet files that the rows are split into."""
JOINED = 4
"""Rows of the sample that are joined into one: they have about 190 tokens of text, SYNTH's about 740."""


def texts_of(row: dict[str, Any]) -> list[str]:
    """The texts of a row that are tokenized; empty if the step would drop the row."""
    if quality(row["synthetic_answer"], row["constraints"]):
        return []
    texts = [
        user_text(row["query"], row["query_seed_text"]),
        row["synthetic_reasoning"] or "",
        row["synthetic_answer"],
    ]
    return [text for text in texts if text.strip()]


def join_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups of JOINED rows of the sample, each joined into one row that is about as long as SYNTH's.

    With short rows, the cost per row would appear four times as large relative to the text.
    """
    kept = [row for row in rows if texts_of(row)]
    texts = ("query", "synthetic_reasoning", "synthetic_answer")
    groups = [kept[start : start + JOINED] for start in range(0, len(kept) - JOINED + 1, JOINED)]
    joined = [{name: "\n\n".join(row[name] or "" for row in group) for name in texts} for group in groups]
    return [
        {**group[0], "constraints": None, **of_group} for group, of_group in zip(groups, joined, strict=True)
    ]


def repeat_rows(rows: list[dict[str, Any]], tokens: int) -> list[dict[str, Any]]:
    """The rows, repeated with distinct ids until they hold at least `tokens` tokens."""
    encoding = vocabulary_file.encoding()
    once = sum(len(encoding.encode_ordinary(text)) for row in rows for text in texts_of(row))
    return [
        {**row, "synth_id": f"{row['synth_id']}-{turn}"} for turn in range(-(-tokens // once)) for row in rows
    ]


def cpu_seconds(store: int) -> float:
    """CPU time so far of this process and its descendants, except the store."""
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
    """Body of a raw process: waits for the start signal, then tokenizes and sends (tokens, CPU seconds)."""
    encoding = vocabulary_file.encoding()
    pipe.send("ready")
    pipe.recv()
    before = time.process_time()
    tokens = sum(len(encoding.encode_ordinary(text)) for text in texts)
    pipe.send((tokens, time.process_time() - before))


def raw_tokenizer(texts: list[str], processes: int) -> tuple[int, float, float]:
    """(tokens, seconds, CPU seconds of all processes) to tokenize the texts, split over `processes`."""
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


def end_to_end(endpoint: str, store: int, source: str, encoders: EncoderPool) -> tuple[float, float]:
    """(seconds, CPU seconds) of the step, which writes to an empty prefix."""
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
    preprocess(run, bucket, provenance, threading.Event(), ProgressBoard(), None, encoders)
    seconds, cpu = time.perf_counter() - started, cpu_seconds(store) - before
    bucket.delete_prefix("datasets")
    return seconds, cpu


@contextmanager
def store(above: Path | None = None, options: Sequence[str] = ()) -> Iterator[tuple[str, int, Path]]:
    """A versitygw on loopback: (endpoint, process id, folder that holds a folder per bucket).

    The folder is made below `above`, else below TMPDIR. `options`: of `versitygw posix`.
    """
    with tempfile.TemporaryDirectory(prefix="vpmoe-benchmark-", dir=above) as folder:
        port = free_port()
        endpoint = f"http://127.0.0.1:{port}"
        os.environ.update(
            AWS_ACCESS_KEY_ID="benchmark", AWS_SECRET_ACCESS_KEY="benchmark", AWS_ENDPOINT_URL=endpoint
        )
        (Path(folder) / "benchmark").mkdir()
        server = subprocess.Popen(
            [binaries.path("versitygw"), "--port", f"127.0.0.1:{port}", "posix", *options, folder],
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--parquet",
        type=Path,
        nargs="+",
        help="files with SYNTH's columns (default: the repository's sample, rows joined)",
    )
    parser.add_argument(
        "--tokens", type=parse_tokens, default=60_000_000, help="tokens of text in each repeat (default: 60M)"
    )
    parser.add_argument("--repeats", type=int, default=3, help="repeats per number of processes")
    parser.add_argument(
        "--processes", type=int, nargs="+", default=[1, 2], help="numbers of encoding processes to measure"
    )
    given = parser.parse_args()
    rows = (
        [row for path in given.parquet for row in pq.read_table(path).to_pylist()]
        if given.parquet
        else join_rows(sample.rows())
    )
    rows = repeat_rows(rows, given.tokens)
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
            figures = []
            with EncoderPool(processes) as encoders:
                # Not counted: starts the processes.
                end_to_end(endpoint, server, "s3://benchmark/input/*001.parquet", encoders)
                for repeat in range(given.repeats):
                    tokens, raw_seconds, raw_cpu = raw_tokenizer(texts, processes)
                    seconds, cpu = end_to_end(endpoint, server, source, encoders)
                    figures.append(
                        (
                            tokens / raw_seconds / 1e6,
                            tokens / seconds / 1e6,
                            raw_seconds / seconds,
                            raw_cpu / cpu,
                            tokens / cpu / 1e6,
                        )
                    )
                    sys.stdout.write(
                        f"{processes} process(es), repeat {repeat + 1}, {len(rows):,} rows, "
                        f"{tokens / 1e6:.1f} M tokens: {format_figures(figures[-1])}\n"
                    )
            medians = tuple(statistics.median(values) for values in zip(*figures, strict=True))
            sys.stdout.write(f"{processes} process(es), median: {format_figures(medians)}\n")


def format_figures(figures: tuple[float, ...]) -> str:
    """The figures of one repeat, or the medians, as text."""
    raw_speed, speed, of_raw, of_raw_cpu, of_core = figures
    speeds = f"raw {raw_speed:.2f}, end to end {speed:.2f} M tokens/s"
    by_cpu = f"by CPU time {of_raw_cpu:.0%} of raw, {of_core:.2f} M tokens a CPU second"
    return f"{speeds}, {of_raw:.0%} of raw; {by_cpu}"


if __name__ == "__main__":
    main()
