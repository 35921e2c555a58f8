"""Rows to token ids, on every core: which rows become documents, their ids and lengths, and what became of the others.

`encode` is pure, a chunk of consecutive rows in and their documents out, so any number of processes gives the same documents. The
pool is processes and not threads: the tokenizer gives up Python's lock, the work around it does not. Files are part.py's business.
"""

import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from multiprocessing import connection, get_context, parent_process
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vpmoe.data.harmony import HarmonyDocument, Renderer, SystemMessage
from vpmoe.data.preprocess import sampling
from vpmoe.data.preprocess.filters import quality
from vpmoe.data.preprocess.text import decode
from vpmoe.data.tokenizer import Ids, tokenizer
from vpmoe.failure import Retriable

COLUMNS = (
    "synth_id",
    "query",
    "query_seed_text",
    "constraints",
    "synthetic_reasoning",
    "synthetic_answer",
    "language",
    "exercise",
)

CHUNK_ROWS = 64
"""Rows that go to a process at once: some 80,000 tokens, tens of milliseconds of work beside one of passing them on."""

CHUNKS_AHEAD = 4
"""Chunks that wait for each process, so that none idles while the shard is read. They bound memory: under 1 MB each."""


@dataclass(frozen=True)
class Recipe:
    """Everything beside a row itself that decides what becomes of it."""

    dataset_id: str
    system: SystemMessage
    max_length: int
    valid_fraction: float
    thresholds: sampling.Thresholds


@dataclass(frozen=True)
class Chunk:
    """Rows of shard `part`, whose file is called `name`; `first` is the first one's number in it. `columns` is an Arrow stream."""

    part: int
    name: str
    first: int
    columns: bytes


@dataclass(frozen=True)
class Encoded:
    """What became of a chunk of `part`: D documents of T tokens altogether, in the order of their rows, and the rows that are none."""

    part: int
    ids_T: Ids
    lengths_D3: NDArray[np.int64]
    """Tokens of prompt, reasoning and final message; a document has one more."""
    valid_D: NDArray[np.bool_]
    order_D: NDArray[np.uint64]
    """Where the document goes in its part: documents are sorted by this."""
    labels_D: list[tuple[str, str | None, str | None]]
    """Row id, language, exercise."""
    rows: int
    dropped: Counter[str]
    unreadable: dict[int, str]
    """Row in the file -> why."""
    surrogates: int
    """Rows in which surrogates were replaced (text.py)."""


def chunk(part: int, name: str, first: int, columns: pa.RecordBatch) -> Chunk:
    """Rows in a form that goes to another process: their own bytes only, even where they are a slice of a larger batch."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, columns.schema) as stream:
        stream.write_batch(columns)
    return Chunk(part, name, first, sink.getvalue().to_pybytes())


def encode(chunk: Chunk, recipe: Recipe) -> Encoded:
    """What becomes of each row of a chunk. The first reason against it counts: unreadable, poor, not sampled, too long."""
    with pa.ipc.open_stream(chunk.columns) as stream:
        (batch,) = stream
    texts = decode(batch, COLUMNS)
    renderer = _renderer(recipe.system)
    documents: list[HarmonyDocument] = []
    labels: list[tuple[str, str | None, str | None]] = []
    order: list[int] = []
    dropped: Counter[str] = Counter()
    unreadable = {chunk.first + row: why for row, why in texts.unreadable.items()}
    values = zip(*(texts.columns[name] for name in COLUMNS), strict=True)
    for row, (synth_id, query, seed_text, constraints, reasoning, answer, language, exercise) in enumerate(
        values, chunk.first
    ):
        if row in unreadable:
            continue
        if query is None:
            unreadable[row] = "query is null"
            continue
        if poor := quality(answer, constraints):
            dropped[poor] += 1
            continue
        row_id = identity(synth_id, chunk.name, row)
        if not recipe.thresholds.keeps(sampling.row_class(language, exercise), row_id):
            dropped["notSampled"] += 1
            continue
        try:
            document = renderer.render(query, seed_text, reasoning, answer or "")
        except ValueError as error:
            unreadable[row] = str(error)
            continue
        if len(document.ids) > recipe.max_length:
            dropped["tooLong"] += 1
            continue
        documents.append(document)
        labels.append((row_id, language, exercise))
        order.append(_order(recipe.dataset_id, chunk.part, row))
    return Encoded(
        part=chunk.part,
        ids_T=np.concatenate([document.ids for document in documents])
        if documents
        else np.empty(0, np.int32),
        lengths_D3=np.array([(d.prompt, d.reasoning, d.final) for d in documents], np.int64).reshape(-1, 3),
        valid_D=np.array(
            [sampling.is_valid(row_id, recipe.valid_fraction) for row_id, _, _ in labels], np.bool_
        ),
        order_D=np.array(order, np.uint64),
        labels_D=labels,
        rows=batch.num_rows,
        dropped=dropped,
        unreadable=unreadable,
        surrogates=len(texts.surrogates),
    )


def identity(synth_id: str | None, name: str, row: int) -> str:
    """What a row is sampled, split and listed by: its synth_id, or its place in the input where it has none."""
    return synth_id if synth_id and synth_id.strip() else f"{name}#{row}"


def cores() -> int:
    """CPU cores that this process may use: its affinity, and in a container its cgroup's quota."""
    quota = Path("/sys/fs/cgroup/cpu.max")
    allowed = len(os.sched_getaffinity(0))
    if not quota.is_file():
        return allowed
    limit, period = quota.read_text().split()
    return allowed if limit == "max" else max(1, min(allowed, int(limit) // int(period)))


class Encoders:
    """Processes that encode chunks, one a core unless told otherwise. They end with the `with` block, or with this process, however
    that ends."""

    def __init__(self, processes: int | None = None) -> None:
        self.processes = processes or cores()
        context = get_context(
            "forkserver"
        )  # this process has threads, and sockets that a forked child would hold open
        context.set_forkserver_preload([__name__])
        self._pool = ProcessPoolExecutor(self.processes, mp_context=context, initializer=_start)

    def start(self) -> None:
        """Let the processes start and load the tokenizer (seconds) while there is something else to do."""
        for _ in range(self.processes):
            self._pool.submit(os.getpid)

    def __enter__(self) -> "Encoders":
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def encode(self, chunks: Iterable[Chunk], recipe: Recipe) -> Iterator[Encoded]:
        """Results in the order of the chunks. Raises Retriable where a process was killed."""
        running: deque[Future[Encoded]] = deque()
        try:
            for each in chunks:
                if len(running) == CHUNKS_AHEAD * self.processes:
                    yield running.popleft().result()
                running.append(self._pool.submit(encode, each, recipe))
            while running:
                yield running.popleft().result()
        except BrokenProcessPool as error:
            raise Retriable(
                "A process that encodes text was killed, most likely for want of memory. Give runtime.resources.preprocess more memory."
            ) from error


def _start() -> None:
    """Begin life as an encoding process: load the tokenizer, leave Ctrl-C to the parent, and end when the parent does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    tokenizer()


def _end_with(sentinel: int) -> None:
    """A pool's process waits for work for ever, also when whoever gives it was killed."""
    connection.wait([sentinel])
    os._exit(1)


@cache
def _renderer(setting: SystemMessage) -> Renderer:
    return Renderer(tokenizer(), setting)


def _order(dataset_id: str, part: int, row: int) -> int:
    """A number that sorts the documents of a part into an order that looks random and is always the same."""
    return int.from_bytes(
        blake2b(f"{dataset_id}/{part}/{row}".encode(), digest_size=8, person=b"vpmoe.order").digest()
    )
