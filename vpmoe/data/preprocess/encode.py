"""Encodes rows to documents on all cores: which rows become documents, their token ids and lengths, and why
others do not.

`encode_chunk` is a pure function of a chunk of consecutive rows, so any number of processes gives the same
documents. The pool has processes, not threads: the tokenizer releases the GIL, but the work around it does
not.
"""

import os
import signal
import tempfile
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
from typing import Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vpmoe.api.dataset import Conversation
from vpmoe.api.effort import Effort
from vpmoe.data.dataset import clean_label
from vpmoe.data.harmony import HarmonyDocument, Renderer, SystemMessage, user_text
from vpmoe.data.preprocess import sampling
from vpmoe.data.preprocess.duplicates import fingerprint
from vpmoe.data.preprocess.filters import Contradiction, contradiction, quality
from vpmoe.data.preprocess.text import decode_columns
from vpmoe.data.tokenizer import Ids, tokenizer
from vpmoe.failure import Permanent, Retriable

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
"""Rows per chunk: some 80,000 tokens, tens of milliseconds of work for one millisecond of transfer."""

LONGEST_FOLDER = 107 - len("/pymp-12345678/listener-12345678")
"""Longest path, in bytes, of the folder for temporary files: multiprocessing has its sockets below it, and
the kernel allows paths of 107 bytes."""

CHUNKS_AHEAD = 4
"""Chunks queued per process, so that none idles while the shard is read. Bounds memory: a chunk has under 1
MB."""


@dataclass(frozen=True)
class PreprocessContext:
    """All settings that decide, together with a row, what becomes of the row."""

    dataset_id: str
    conversation: Conversation
    max_length: int
    valid_fraction: float
    thresholds: sampling.Thresholds


@dataclass(frozen=True)
class RowChunk:
    """Consecutive rows of a shard."""

    part: int
    """Number of the shard and its part."""
    key: str
    """The shard's key (InputShard.key)."""
    first: int
    """Number of the first row in the file."""
    columns: bytes
    """An Arrow IPC stream."""


@dataclass(frozen=True)
class EncodedChunk:
    """The result of a chunk: D documents with T tokens in total, in the order of their rows, and the counts
    of the other rows."""

    part: int
    ids_T: Ids
    lengths_D3: NDArray[np.int64]
    """Tokens of prompt, reasoning and final message. A document has one more, its end."""
    valid_D: NDArray[np.bool_]
    order_D: NDArray[np.uint64]
    """Sort key of the document in its part."""
    labels_D: list[tuple[str, str | None, str | None]]
    """Row id, language (None if it has none), exercise (None if it has none)."""
    efforts_D: list[Effort]
    """Reasoning effort in the document's system message."""
    hashes_2D: NDArray[np.uint64]
    """Fingerprints of each document's row id and of its user message (duplicates.py)."""
    empty_queries: int
    """Documents whose query is blank."""
    rows: int
    dropped: Counter[str]
    contradictions: dict[int, tuple[str, Contradiction]]
    """By row of the file, the row id and the contradiction of each row dropped as contradictedResult."""
    unreadable: dict[int, str]
    """By row of the file, why it cannot be read."""
    surrogates: int
    """Rows in which surrogates were replaced (text.py)."""


def make_chunk(part: int, key: str, first: int, columns: pa.RecordBatch) -> RowChunk:
    """Serialize rows for another process. A slice of a larger batch is serialized without the rest of the
    batch."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, columns.schema) as stream:
        stream.write_batch(columns)
    return RowChunk(part, key, first, sink.getvalue().to_pybytes())


def encode_chunk(chunk: RowChunk, context: PreprocessContext) -> EncodedChunk:
    """Encode a chunk. A row is dropped for the first reason that applies: unreadable, low quality, not
    sampled, too long."""
    with pa.ipc.open_stream(chunk.columns) as stream:
        (batch,) = stream
    texts = decode_columns(batch, COLUMNS)
    documents: list[HarmonyDocument] = []
    labels: list[tuple[str, str | None, str | None]] = []
    efforts: list[Effort] = []
    order: list[int] = []
    questions: list[str] = []
    empty_queries = 0
    dropped: Counter[str] = Counter()
    contradictions: dict[int, tuple[str, Contradiction]] = {}
    unreadable = {chunk.first + row: reason for row, reason in texts.unreadable.items()}
    values = zip(*(texts.columns[name] for name in COLUMNS), strict=True)
    for row, (synth_id, query, seed_text, constraints, reasoning, answer, language, exercise) in enumerate(
        values, chunk.first
    ):
        if row in unreadable:
            continue
        if query is None:
            unreadable[row] = "query is null"
            continue
        row_id = row_identity(synth_id, chunk.key, row)
        if reason := quality(answer, constraints):
            dropped[reason] += 1
            if reason == "contradictedResult" and (found := contradiction(constraints or "", answer or "")):
                contradictions[row] = row_id, found
            continue
        if not context.thresholds.keeps(sampling.row_class(language, exercise), row_id):
            dropped["notSampled"] += 1
            continue
        try:
            effort = sampling.draw_effort(row_id, context.conversation.effort)
            document = _renderer(context.conversation, effort).render(
                query, seed_text, reasoning, answer or ""
            )
        except ValueError as error:
            unreadable[row] = str(error)
            continue
        if len(document.ids) > context.max_length:
            dropped["tooLong"] += 1
            continue
        documents.append(document)
        labels.append((row_id, clean_label(language), clean_label(exercise)))
        efforts.append(effort)
        questions.append(user_text(query, seed_text))
        empty_queries += not query.strip()
        order.append(_order(context.dataset_id, chunk.part, row))
    return EncodedChunk(
        part=chunk.part,
        ids_T=np.concatenate([document.ids for document in documents])
        if documents
        else np.empty(0, np.int32),
        lengths_D3=np.array([(d.prompt, d.reasoning, d.final) for d in documents], np.int64).reshape(-1, 3),
        valid_D=np.array(
            [sampling.is_valid(row_id, context.valid_fraction) for row_id, _, _ in labels], np.bool_
        ),
        order_D=np.array(order, np.uint64),
        labels_D=labels,
        efforts_D=efforts,
        hashes_2D=np.array(
            [[fingerprint(row_id) for row_id, _, _ in labels], [fingerprint(text) for text in questions]],
            np.uint64,
        ),
        empty_queries=empty_queries,
        rows=batch.num_rows,
        dropped=dropped,
        contradictions=contradictions,
        unreadable=unreadable,
        surrogates=len(texts.surrogates),
    )


def row_identity(synth_id: str | None, key: str, row: int) -> str:
    """The id by which a row is sampled, split and listed: its synth_id, or the key of its shard and its row
    number if it has none."""
    return synth_id if synth_id and synth_id.strip() else f"{key}#{row}"


def available_cores() -> int:
    """CPU cores that this process may use, from its affinity and its cgroup's quota."""
    quota = Path("/sys/fs/cgroup/cpu.max")
    allowed = len(os.sched_getaffinity(0))
    if not quota.is_file():
        return allowed
    limit, period = quota.read_text().split()
    return allowed if limit == "max" else max(1, min(allowed, int(limit) // int(period)))


class EncoderPool:
    """A pool of processes that encode chunks; the default is one per core. They exit with the `with` block,
    and also if this process is killed.
    """

    def __init__(self, processes: int | None = None) -> None:
        """Raises Permanent if the path of the temporary folder is too long for sockets."""
        self.processes = processes or available_cores()
        folder = tempfile.gettempdir()
        if len(os.fsencode(folder)) > LONGEST_FOLDER:
            raise Permanent(
                f"TMPDIR: {folder} is longer than {LONGEST_FOLDER} bytes, so the sockets of the encoding "
                "processes cannot be in it. Point TMPDIR to a shorter path; it may be a symbolic link."
            )
        # Not fork: this process has threads, and sockets that a forked child would keep open.
        context = get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self._pool = ProcessPoolExecutor(self.processes, mp_context=context, initializer=_start)

    def start(self) -> None:
        """Start the processes, which load the tokenizer (seconds) in the background."""
        for _ in range(self.processes):
            self._pool.submit(os.getpid)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def encode(self, chunks: Iterable[RowChunk], context: PreprocessContext) -> Iterator[EncodedChunk]:
        """Encode chunks; results come in the order of the chunks. Raises Retriable if a process was
        killed."""
        running: deque[Future[EncodedChunk]] = deque()
        try:
            for each in chunks:
                if len(running) == CHUNKS_AHEAD * self.processes:
                    yield running.popleft().result()
                running.append(self._pool.submit(encode_chunk, each, context))
            while running:
                yield running.popleft().result()
        except BrokenProcessPool as error:
            raise Retriable(
                "An encoder process was killed, most likely because it ran out of memory. "
                "Raise the memory in runtime.resources.preprocess."
            ) from error


def _start() -> None:
    """Initialize an encoder process: load the tokenizer, ignore Ctrl-C (the parent handles it), exit with the
    parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    if parent is not None:
        threading.Thread(target=_exit_with_parent, args=(parent.sentinel,), daemon=True).start()
    tokenizer()


def _exit_with_parent(sentinel: int) -> None:
    """Exit when the parent does. Without this a pool process would wait for work forever after its parent was
    killed."""
    connection.wait([sentinel])
    os._exit(1)


@cache
def _renderer(said: Conversation, effort: Effort) -> Renderer:
    return Renderer(tokenizer(), SystemMessage(said.identity, said.knowledge_cutoff, said.date, effort))


def _order(dataset_id: str, part: int, row: int) -> int:
    """The sort key of a document in its part: a pseudo-random order that is always the same."""
    return int.from_bytes(
        blake2b(f"{dataset_id}/{part}/{row}".encode(), digest_size=8, person=b"vpmoe.order").digest()
    )
