"""What of a window lies in the bucket: its rollouts by the sampler, and the teacher's scores of them, an Arrow file each, written once.

A file holds nothing of the attempt that wrote it, so whoever samples or scores the same window writes the same bytes; the attempt stands in
the object's metadata. Which rollouts a window has is windows.py's business, what a trainer makes of them vpmoe.training's.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import ConfigDict, ValidationError

from vpmoe.api.base import Record
from vpmoe.data.tokenizer import Ids
from vpmoe.failure import Permanent

LEAST_LOGP = -100.0
"""What a stored log-probability is at least: −inf would make a loss that is not a number."""
ABOUT = b"vpmoe"

ROLLOUTS = pa.schema(
    [
        pa.field("prompt", pa.int32(), nullable=False),
        pa.field("rollout", pa.int32(), nullable=False),
        pa.field("document", pa.int32(), nullable=False),
        pa.field("effort", pa.string(), nullable=False),
        pa.field("validity", pa.string(), nullable=False),
        pa.field("ids", pa.list_(pa.int32()), nullable=False),
        pa.field("span", pa.list_(pa.uint8()), nullable=False),
        pa.field("logp", pa.list_(pa.float32()), nullable=False),
    ]
)
"""A row a rollout, in the order of prompts and, within one, of rollouts. `ids` are the prompt's and the completion's; `span` and `logp` the
completion's alone, so the prompt is as much longer."""
SCORES = pa.schema([pa.field("logp", pa.list_(pa.float32()), nullable=False)])
"""A row a rollout, in the rollouts' order: the teacher's log-probability of each token of its completion."""


class RolloutHeader(Record):
    """What a window's rollouts say about themselves, in the schema of their file."""

    model_config = ConfigDict(extra="forbid")

    run: str
    """namespace/name-uid8."""
    config: str
    """The run's configuration, sha256."""
    stage: str
    window: int
    version: int
    """The policy version that all of it was sampled from."""
    weights: str
    """What that version's weights are: version.content_of its manifest."""
    phase: int
    """The curriculum's, from 0."""
    seen: int
    """Tokens of the stage before the step that trains this window."""
    tokens: int
    """Tokens of this window, prompts and completions."""
    last: bool
    """Whether the stage has no window after this one."""
    turns: int
    """Knobs that had been turned when it was sampled (turns.py)."""


class ScoresHeader(Record):
    """What a window's scores say about themselves."""

    model_config = ConfigDict(extra="forbid")

    run: str
    stage: str
    window: int
    rollouts: str
    """sha256 of the rollouts' file."""
    teacher: str
    """Which teacher: sha256 of what the run resolved it to (vpmoe.teacher.model.TeacherRef)."""


@dataclass(frozen=True)
class Rollout:
    """One completion of one prompt."""

    prompt: int
    """Place of the prompt in its window."""
    rollout: int
    """Which of the prompt's."""
    document: int
    """The training document that the prompt is made of, counted over all parts."""
    effort: str
    validity: str
    """One of prompt.VALIDITIES."""
    ids_T: Ids
    """[T] the prompt and the completion."""
    span_C: NDArray[np.uint8]
    """[C] span of each token of the completion."""
    logp_C: NDArray[np.float32]
    """[C] the log-probability with which the sampler drew each token of the completion."""

    @property
    def asked(self) -> int:
        """Tokens of the prompt."""
        return len(self.ids_T) - len(self.logp_C)


@dataclass(frozen=True)
class Sampled:
    """A window's rollouts as they are in the bucket."""

    about: RolloutHeader
    rollouts: Sequence[Rollout]
    sha256: str
    """Of the file."""


def stored(logp_C: NDArray[np.float32]) -> NDArray[np.float32]:
    """Log-probabilities as they are stored: at least LEAST_LOGP. Raises ValueError where one is missing."""
    if np.isnan(logp_C).any():
        raise ValueError("a token without a log-probability cannot be stored")
    return np.maximum(logp_C, np.float32(LEAST_LOGP))


def rollouts_bytes(about: RolloutHeader, rollouts: Sequence[Rollout]) -> bytes:
    """The file of a window's rollouts. Raises ValueError for one whose lengths do not fit, or without a log-probability."""
    for one in rollouts:
        if not 0 < len(one.logp_C) == len(one.span_C) < len(one.ids_T):
            lengths = f"{len(one.ids_T)} ids, {len(one.span_C)} spans, {len(one.logp_C)} log-probabilities"
            raise ValueError(
                f"rollout {one.rollout} of prompt {one.prompt}: {lengths} are no prompt and completion"
            )
    columns: list[list[Any]] = [
        [one.prompt for one in rollouts],
        [one.rollout for one in rollouts],
        [one.document for one in rollouts],
        [one.effort for one in rollouts],
        [one.validity for one in rollouts],
        [one.ids_T for one in rollouts],
        [one.span_C for one in rollouts],
        [stored(one.logp_C) for one in rollouts],
    ]
    return _bytes(ROLLOUTS, columns, about)


def scores_bytes(about: ScoresHeader, logp: Sequence[NDArray[np.float32]]) -> bytes:
    """The file of a window's scores. `logp`: for each rollout its completion's [C]. Raises ValueError where one is missing."""
    return _bytes(SCORES, [[stored(logp_C) for logp_C in logp]], about)


def read_rollouts(data: bytes, where: str) -> Sampled:
    """The rollouts in a file; `where` is its address, for people. Raises Permanent where it is not such a file."""
    table, said = _read(data, ROLLOUTS, where)
    try:
        about = RolloutHeader.model_validate(said)
    except ValidationError as error:
        raise _damaged(where, str(error.errors()[0]["msg"])) from error
    columns = [
        _lists(table, name) if pa.types.is_list(table[name].type) else table[name].to_pylist()
        for name in ROLLOUTS.names
    ]
    return Sampled(
        about, [Rollout(*row) for row in zip(*columns, strict=True)], hashlib.sha256(data).hexdigest()
    )


def read_scores(data: bytes, where: str, of: Sampled) -> list[NDArray[np.float32]]:
    """For each rollout the teacher's log-probabilities of its completion, [C]. Raises Permanent where they are not of these rollouts."""
    table, said = _read(data, SCORES, where)
    try:
        about = ScoresHeader.model_validate(said)
    except ValidationError as error:
        raise _damaged(where, str(error.errors()[0]["msg"])) from error
    logp = _lists(table, "logp")
    if about.rollouts != of.sha256:
        raise _damaged(
            where,
            f"it is of other rollouts ({about.rollouts}) than those of window {of.about.window} ({of.sha256})",
        )
    if [len(logp_C) for logp_C in logp] != [len(one.logp_C) for one in of.rollouts]:
        raise _damaged(where, "it has not one score for each sampled token")
    return logp


def _bytes(schema: pa.Schema, columns: Sequence[Sequence[Any]], about: Record) -> bytes:
    said = json.dumps(about.dump(), sort_keys=True).encode()
    arrays = [pa.array(list(column), field.type) for column, field in zip(columns, schema, strict=True)]
    table = pa.table(arrays, schema=schema.with_metadata({ABOUT: said}))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def _read(data: bytes, schema: pa.Schema, where: str) -> tuple[pa.Table, Any]:
    try:
        table = pa.ipc.open_file(pa.BufferReader(data)).read_all()
        said = json.loads(table.schema.metadata[ABOUT])
    except (pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise _damaged(where, f"it is no file of ours ({type(error).__name__}: {error})") from error
    if not table.schema.equals(schema):
        raise _damaged(where, f"its columns are {', '.join(table.schema.names)}")
    return table, said


def _lists(table: pa.Table, name: str) -> list[NDArray[Any]]:
    """The rows of a column of lists."""
    return [row.values.to_numpy() for row in table[name]]


def _damaged(where: str, why: str) -> Permanent:
    return Permanent(
        f"{where}: {why}. The object was changed after it was written; delete it, and it is made again."
    )
