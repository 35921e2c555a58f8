"""The files of a window: the sampler's rollouts and the teacher's scores of them, an Arrow file each, written
once.

A file holds nothing of the attempt that wrote it, so every attempt writes the same bytes; the attempt is in
the object's metadata. Which rollouts a window has is in windows.py; the trainer reads the files in
vpmoe.trainer.onpolicy.window_batch.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import ConfigDict

from vpmoe.api.base import Record
from vpmoe.data.tokenizer import Ids
from vpmoe.failure import Permanent
from vpmoe.rollout.arrow_files import arrow_bytes, column_values, damaged, list_column, read_table

MIN_LOGP = -100.0
"""Lowest log-probability that is stored: −inf would make the loss NaN."""

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
"""One row per rollout, ordered by prompt, then by rollout. `ids` are those of prompt and completion; `span`
and `logp` cover the completion only, so the difference in length is the prompt's."""
SCORES = pa.schema([pa.field("logp", pa.list_(pa.float32()), nullable=False)])
"""One row per rollout, in the order of the rollouts: the teacher's log-probability of each token of the
completion."""


class RolloutHeader(Record):
    """Header of a file of rollouts."""

    model_config = ConfigDict(extra="forbid")

    run: str
    """namespace/name-uid8."""
    config: str
    """sha256 of the run's configuration."""
    stage: str
    window: int
    version: int
    """The policy version that the window was sampled from."""
    weights: str
    """policy_version.weights_digest of that version."""
    phase: int
    """Phase of the curriculum, from 0."""
    seen: int
    """Tokens of the stage before the step that trains this window."""
    tokens: int
    """Tokens of this window: prompts and completions."""
    last: bool
    """Whether the stage has no window after this one."""
    turns: int
    """Number of adjustments that applied to it (back_pressure.py)."""


class ScoresHeader(Record):
    """Header of a file of scores."""

    model_config = ConfigDict(extra="forbid")

    run: str
    stage: str
    window: int
    rollouts: str
    """sha256 of the file of rollouts."""
    teacher: str
    """vpmoe.pretrained.model_files.ModelRef.sha256 of the run's teacher."""


@dataclass(frozen=True)
class Rollout:
    """One completion of one prompt."""

    prompt: int
    """Index of the prompt in its window."""
    rollout: int
    """Index among the prompt's rollouts."""
    document: int
    """Number of the training document that the prompt is made of, counted over all parts."""
    effort: str
    validity: str
    """One of validity.VALIDITIES."""
    ids_T: Ids
    """[T] ids of prompt and completion."""
    span_C: NDArray[np.uint8]
    """[C] span of each token of the completion."""
    logp_C: NDArray[np.float32]
    """[C] log-probability with which each token of the completion was sampled."""

    @property
    def prompt_length(self) -> int:
        """Number of tokens of the prompt."""
        return len(self.ids_T) - len(self.logp_C)


@dataclass(frozen=True)
class WindowRollouts:
    """The content of a file of rollouts."""

    header: RolloutHeader
    rollouts: Sequence[Rollout]
    sha256: str
    """sha256 (hex) of the file."""


def clamp_logp(logp_C: NDArray[np.float32]) -> NDArray[np.float32]:
    """Log-probabilities as they are stored: at least MIN_LOGP. Raises ValueError if one is NaN."""
    if np.isnan(logp_C).any():
        raise ValueError("a token without a log-probability cannot be stored")
    return np.maximum(logp_C, np.float32(MIN_LOGP))


def rollouts_bytes(header: RolloutHeader, rollouts: Sequence[Rollout]) -> bytes:
    """The bytes of a file of rollouts.

    Raises ValueError if a rollout's lengths do not match or a log-probability is NaN.
    """
    return arrow_bytes(ROLLOUTS, rollout_columns(rollouts), header)


def rollout_columns(rollouts: Sequence[Rollout]) -> list[list[Any]]:
    """The columns of ROLLOUTS. Raises as rollouts_bytes does."""
    for one in rollouts:
        if not 0 < len(one.logp_C) == len(one.span_C) < len(one.ids_T):
            lengths = f"{len(one.ids_T)} ids, {len(one.span_C)} spans, {len(one.logp_C)} log-probabilities"
            raise ValueError(
                f"rollout {one.rollout} of prompt {one.prompt}: {lengths} are not those of a prompt and a "
                "completion"
            )
    return [
        [one.prompt for one in rollouts],
        [one.rollout for one in rollouts],
        [one.document for one in rollouts],
        [one.effort for one in rollouts],
        [one.validity for one in rollouts],
        [one.ids_T for one in rollouts],
        [one.span_C for one in rollouts],
        [clamp_logp(one.logp_C) for one in rollouts],
    ]


def scores_bytes(header: ScoresHeader, logp: Sequence[NDArray[np.float32]]) -> bytes:
    """The bytes of a file of scores: [C] for each rollout's completion. Raises ValueError if one is NaN."""
    return arrow_bytes(SCORES, [[clamp_logp(logp_C) for logp_C in logp]], header)


def read_rollouts(data: bytes, where: str) -> WindowRollouts:
    """Parse a file of rollouts. Raises Permanent, with the address `where`, if it is not one."""
    table, header = read_table(data, ROLLOUTS, RolloutHeader, "a window file", where)
    return WindowRollouts(header, parse_rollouts(table), hashlib.sha256(data).hexdigest())


def parse_rollouts(table: pa.Table) -> list[Rollout]:
    """The rollouts of a table that has the columns of ROLLOUTS."""
    return [
        Rollout(*row) for row in zip(*(column_values(table, name) for name in ROLLOUTS.names), strict=True)
    ]


def read_scores(data: bytes, where: str, of: WindowRollouts) -> list[NDArray[np.float32]]:
    """Parse a file of scores: for each rollout the teacher's log-probabilities of its completion, [C].

    Raises Permanent, with the address `where`, if it is not one, or if it is of other rollouts than `of`.
    """
    table, header = read_table(data, SCORES, ScoresHeader, "a window file", where)
    logp = list_column(table, "logp")
    if header.rollouts != of.sha256:
        raise damaged(
            where,
            f"it has the scores of other rollouts ({header.rollouts}) than those of window "
            f"{of.header.window} ({of.sha256})",
        )
    if [len(logp_C) for logp_C in logp] != [len(one.logp_C) for one in of.rollouts]:
        raise damaged(where, "it does not have one score for each sampled token")
    return logp


def foreign_rollouts(where: str, why: str) -> Permanent:
    """The error for rollouts of a window or a part that this run's sampler did not write."""
    return Permanent(
        f"{where}: {why}. The run's sampler did not write it; delete it to have its rollouts sampled again."
    )
