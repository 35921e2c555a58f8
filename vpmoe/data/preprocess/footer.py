"""Reads the footer of a parquet file: its rows by row group, its columns and their sizes.

Arrow aborts the whole process on some damaged footers. So a child process parses them, with bounded memory
and time: a footer that ends it is damaged, and the next one gets a new child.
"""

import atexit
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing import connection
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from vpmoe.failure import Retriable

MAGIC = b"PAR1"
ENCRYPTED = b"PARE"
END = 8
"""Bytes after the footer: its length and the magic number."""

LONGEST = 256 << 20
"""Bytes of the longest footer that is parsed. One of a SYNTH shard has some 10 kB."""

MEMORY = 2 << 30
"""Bytes that the child may take to parse a footer."""

CPU_SECONDS = 60
"""Time of the processor that the child may take to parse a footer."""

SILENCE = 900
"""Seconds without an answer, on a machine however busy, after which the child is killed."""

STOPPED = {signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
"""Signals that come from outside: the kernel that is out of memory, or a person."""

BEGINS = (
    (b"PAR1", "it begins as a parquet file, so it was cut or its end overwritten"),
    (b"<", "it begins as a web page or XML"),
    (b"{", "it begins as JSON"),
    (b"[", "it begins as JSON"),
    (b"version https://git-lfs", "it is a pointer of Git LFS instead of the file"),
    (b"ARROW1", "it is an Arrow file"),
    (b"Obj\x01", "it is an Avro file"),
    (b"ORC", "it is an ORC file"),
    (b"PK\x03\x04", "it is a zip archive"),
    (b"\x1f\x8b", "it is compressed with gzip"),
    (b"\x28\xb5\x2f\xfd", "it is compressed with zstd"),
    (b"BZh", "it is compressed with bzip2"),
    (b"\0\0\0\0", "it begins with zero bytes"),
)
"""What the first bytes say about a file that does not end as parquet."""


class DamagedFooter(ValueError):
    """A file that is no parquet file, or whose footer cannot be parsed. The message says why."""


@dataclass(frozen=True)
class Field:
    """A column of a file, nested ones as a whole."""

    name: str
    type: str
    """Arrow's name of the type."""
    text: bool
    """Whether its values are text, dictionary-encoded or not, or all null."""


@dataclass(frozen=True)
class Footer:
    """What the footer of a parquet file says."""

    rows: tuple[int, ...]
    """Rows of each row group."""
    fields: tuple[Field, ...]
    sizes: dict[str, int]
    """Compressed bytes of each column that is not nested."""


def footer_bytes(size: int, read: Callable[[int, int], bytes]) -> bytes:
    """The footer of a file of `size` bytes, of which `read` gives bytes [start, stop), with all that follows
    it. Raises DamagedFooter if the file does not end as a parquet file."""
    if size == 0:
        raise DamagedFooter("it is empty")
    end = read(max(0, size - END), size)
    if end[4:] == ENCRYPTED or (size < END and end == ENCRYPTED):
        raise DamagedFooter("its footer is encrypted, which is not supported")
    if len(end) < END or end[4:] != MAGIC:
        text = read(0, min(size, 64)).lstrip(b"\xef\xbb\xbf \r\n\t")
        begins = next((f"; {what}" for magic, what in BEGINS if text.startswith(magic)), "")
        raise DamagedFooter(f"it does not end with PAR1 but with {end[-4:]!r}{begins}")
    (length,) = struct.unpack("<I", end[:4])
    if not 0 < length <= size - END - len(MAGIC):
        raise DamagedFooter(f"its footer says that it has {length} bytes, in a file of {size}")
    if length > LONGEST:
        raise DamagedFooter(f"its footer has {length} bytes, more than the {LONGEST} that are supported")
    return read(size - END - length, size)


def parse_footer(data: bytes) -> Footer:
    """What the footer says. `data` is what footer_bytes returns. Raises any exception for a damaged one, or
    ends the process."""
    found = pq.read_metadata(pa.BufferReader(MAGIC + data))
    rows, sizes = [], dict[str, int]()
    for number in range(found.num_row_groups):
        group = found.row_group(number)
        rows.append(group.num_rows)
        for column in (group.column(place) for place in range(group.num_columns)):
            sizes[column.path_in_schema] = sizes.get(column.path_in_schema, 0) + column.total_compressed_size
    if min(rows, default=0) < 0 or sum(rows) != found.num_rows:
        raise ValueError(f"it says {found.num_rows} rows, its row groups say {rows[:10]}")
    schema = found.schema.to_arrow_schema()
    return Footer(
        tuple(rows), tuple(Field(one.name, str(one.type), is_text(one.type)) for one in schema), sizes
    )


def is_text(kind: pa.DataType) -> bool:
    """Whether values of this type are text: any kind of string, also dictionary-encoded, or nulls only."""
    if isinstance(kind, pa.BaseExtensionType):
        return is_text(kind.storage_type)
    if pa.types.is_dictionary(kind):
        return is_text(kind.value_type)
    return any(
        test(kind)
        for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    )


@dataclass(frozen=True)
class _Child:
    """The process that parses footers, and the pipe to it."""

    process: subprocess.Popen[bytes]
    pipe: connection.Connection

    def last_words(self) -> str:
        """What the C++ library said before it aborted, if anything."""
        assert self.process.stderr is not None
        os.set_blocking(self.process.stderr.fileno(), False)
        try:
            said = os.read(self.process.stderr.fileno(), 1 << 16).decode(errors="replace")
        except OSError:
            said = ""
        return " ".join(said.rpartition("what():")[2].split())[:500]

    def close(self) -> None:
        """Close the pipes. The process ends when it sees that."""
        self.pipe.close()
        self.process.wait()
        assert self.process.stderr is not None
        self.process.stderr.close()


class FooterParser:
    """Parses footers in a child process, which the first one starts. Threads may share a parser."""

    def __init__(self, memory: int = MEMORY, cpu_seconds: float = CPU_SECONDS) -> None:
        self._limits = (memory, cpu_seconds)
        self._lock = threading.Lock()
        self._child: _Child | None = None

    def parse(self, data: bytes) -> Footer:
        """What a footer says. Raises DamagedFooter if it cannot be parsed, Retriable if the child was killed
        from outside."""
        with self._lock:
            child = self._child = self._child or self._start()
            try:
                child.pipe.send_bytes(data)
                answer = json.loads(child.pipe.recv_bytes()) if child.pipe.poll(SILENCE) else None
            except (EOFError, OSError):  # the child has ended
                answer = None
            if answer is None:
                self._child = None
                error = _ended(child)
                child.close()
                raise error
        if "error" in answer:
            raise DamagedFooter(f"its footer cannot be parsed: {answer['error']}")
        fields = tuple(Field(**field) for field in answer["fields"])
        return Footer(tuple(answer["rows"]), fields, answer["sizes"])

    def close(self) -> None:
        """End the child."""
        with self._lock:
            child, self._child = self._child, None
        if child is not None:
            child.close()

    def _start(self) -> _Child:
        # A program of its own: this process has threads, and sockets that a forked child would keep open.
        ours, theirs = connection.Pipe()
        command = [sys.executable, "-m", __name__, *map(str, (theirs.fileno(), *self._limits))]
        folders = os.pathsep.join(folder for folder in sys.path if folder)
        process = subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": folders},
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        return _Child(process, ours)


def _ended(child: _Child) -> Exception:
    """The error for a footer during which the child ended, or did not answer."""
    try:
        code = child.process.wait(30)  # at once, if it has closed its pipe
    except subprocess.TimeoutExpired:
        child.process.kill()
        return Retriable(f"Parsing a parquet footer took more than {SILENCE} s. Try again with more CPU.")
    if code == -signal.SIGPROF:
        return DamagedFooter(f"its footer takes more than {CPU_SECONDS} s to parse")
    if code >= 0 or -code in STOPPED:
        return Retriable(
            f"The process that parses parquet footers ended with {code}, most likely because memory ran out. "
            "Raise the memory in runtime.resources.preprocess."
        )
    why = child.last_words()
    return DamagedFooter(
        f"its footer ends Arrow with {signal.Signals(-code).name}" + (f": {why}" if why else "")
    )


def serve(pipe: connection.Connection, memory: int, cpu_seconds: float) -> None:
    """The child: answer each footer with its content or an error as JSON until the parent closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    os.set_blocking(2, False)  # what does not fit into the pipe is lost
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    before = resource.getrlimit(resource.RLIMIT_AS)
    while True:
        try:
            data = pipe.recv_bytes()
        except EOFError:
            return
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        limit = used + memory if before[0] == resource.RLIM_INFINITY else min(used + memory, before[0])
        resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        try:
            try:
                answer = asdict(parse_footer(data))
            finally:  # before anything else needs memory
                resource.setrlimit(resource.RLIMIT_AS, before)
                signal.setitimer(signal.ITIMER_PROF, 0)
        except Exception as error:  # noqa: BLE001 (whatever parsing raises is damage of the footer)
            why = " ".join(f"{error}".split())[:500] or type(error).__name__
            if isinstance(error, MemoryError) or "bad_alloc" in why:  # thrift tells it as an error of its own
                why = f"it takes more than {memory >> 20} MiB of memory"
            answer = {"error": why}
        pipe.send_bytes(json.dumps(answer).encode())


PARSER = FooterParser()
"""The parser of this process."""
atexit.register(PARSER.close)

if __name__ == "__main__":
    serve(connection.Connection(int(sys.argv[1])), int(sys.argv[2]), float(sys.argv[3]))
