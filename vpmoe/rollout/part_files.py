"""Part files: the finished rollouts of a policy version while others still grow, and the teacher's scores of
them.

The sampler writes parts on GPUs only; on the CPU all rollouts of a version are finished at the same time.
Parts are numbered from 0, and each is written once. Every rollout of a version is in exactly one part before
the version's first window is written. A window's file repeats its rollouts: windows are what the trainer
reads and what stays true without parts (window_files.py).
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import ConfigDict

from vpmoe.api import DistillRun
from vpmoe.api.base import Record
from vpmoe.rollout.arrow_files import arrow_bytes, column_values, damaged, list_column, read_table
from vpmoe.rollout.window_files import (
    ROLLOUTS,
    SCORES,
    Rollout,
    clamp_logp,
    foreign_rollouts,
    parse_rollouts,
    rollout_columns,
)
from vpmoe.storage import Bucket, paths

WINDOW = pa.field("window", pa.int32(), nullable=False)
PART_ROLLOUTS = pa.schema([WINDOW, *ROLLOUTS])
"""One row per rollout, in the order in which they finished."""
PART_SCORES = pa.schema([WINDOW, ROLLOUTS.field("prompt"), ROLLOUTS.field("rollout"), *SCORES])
"""One row per rollout that was scored: the teacher's log-probability of each token of the completion."""
NAME = re.compile(r"part-(\d{6})\.rollouts\.arrow$")


class RolloutKey(NamedTuple):
    """Which rollout of a stage it is."""

    window: int
    prompt: int
    """Index of the prompt in its window."""
    rollout: int
    """Index among the prompt's rollouts."""


class PartHeader(Record):
    """Header of a part."""

    model_config = ConfigDict(extra="forbid")

    run: str
    """namespace/name-uid8."""
    config: str
    """sha256 of the run's configuration."""
    stage: str
    version: int
    """The policy version that it was sampled from."""
    weights: str
    """policy_version.weights_digest of that version."""
    part: int


class PartScoresHeader(Record):
    """Header of the scores of a part."""

    model_config = ConfigDict(extra="forbid")

    run: str
    stage: str
    version: int
    part: int
    worker: int
    """The worker of the teacher. It scores its own windows' rollouts only."""
    rollouts: str
    """sha256 of the part."""
    teacher: str
    """vpmoe.pretrained.model_files.ModelRef.sha256 of the run's teacher."""


@dataclass(frozen=True)
class Part:
    """The content of a part."""

    header: PartHeader
    rollouts: Mapping[RolloutKey, Rollout]
    sha256: str
    """sha256 (hex) of the file."""


def part_bytes(header: PartHeader, rollouts: Mapping[RolloutKey, Rollout]) -> bytes:
    """The bytes of a part.

    Raises ValueError if a rollout's lengths do not match or a log-probability is NaN.
    """
    columns = [[key.window for key in rollouts], *rollout_columns(list(rollouts.values()))]
    return arrow_bytes(PART_ROLLOUTS, columns, header)


def part_scores_bytes(header: PartScoresHeader, logp: Mapping[RolloutKey, NDArray[np.float32]]) -> bytes:
    """The bytes of a part's scores: [C] for each rollout's completion. Raises ValueError if one is NaN."""
    columns = [*zip(*logp, strict=True)] if logp else [(), (), ()]
    return arrow_bytes(PART_SCORES, [*columns, [clamp_logp(logp_C) for logp_C in logp.values()]], header)


def list_parts(bucket: Bucket, run: DistillRun, stage: str, version: int) -> list[int]:
    """The numbers of the parts of a version that are in the bucket, in order."""
    prefix = paths.part(run, stage, version, 0).removesuffix("000000.rollouts.arrow")
    return [int(found[1]) for each in bucket.list(prefix) if (found := NAME.search(each.key))]


def read_part(bucket: Bucket, key: str, expected: Mapping[str, object]) -> Part:
    """A part of a version. `expected`: fields of its header that must have these values.

    Raises StorageError if it is not what was written, Permanent if it is damaged or of another run,
    configuration or version.
    """
    where = bucket.url(key)
    data = bucket.get(key)
    table, header = read_table(data, PART_ROLLOUTS, PartHeader, "a part file", where)
    for name, value in expected.items():
        if getattr(header, name) != value:
            raise foreign_rollouts(where, f"{name} is {getattr(header, name)} there and {value} here")
    rollouts = parse_rollouts(table.select(ROLLOUTS.names))
    windows = column_values(table, "window")
    keys = [
        RolloutKey(window, one.prompt, one.rollout) for window, one in zip(windows, rollouts, strict=True)
    ]
    if len(set(keys)) != len(keys):
        raise damaged(where, "it has a rollout twice")
    return Part(header, dict(zip(keys, rollouts, strict=True)), hashlib.sha256(data).hexdigest())


def read_part_scores(
    data: bytes, where: str, of: Part, teacher: str
) -> dict[RolloutKey, NDArray[np.float32]]:
    """Parse the scores of a part: the teacher's log-probabilities of completions, [C].

    Raises Permanent, with the address `where`, if it is not such a file, if it is of another content than
    `of`'s or of another teacher, or if lengths differ.
    """
    table, header = read_table(data, PART_SCORES, PartScoresHeader, "a file of a part's scores", where)
    if header.rollouts != of.sha256:
        raise damaged(where, f"it has the scores of other rollouts ({header.rollouts}) than {of.sha256}")
    if header.teacher != teacher:
        raise damaged(where, f"it has the scores of another teacher ({header.teacher}) than {teacher}")
    columns = [column_values(table, name) for name in RolloutKey._fields]
    keys: Sequence[RolloutKey] = [RolloutKey(*row) for row in zip(*columns, strict=True)]
    logp = dict(zip(keys, list_column(table, "logp"), strict=True))
    if any(key not in of.rollouts or len(one) != len(of.rollouts[key].logp_C) for key, one in logp.items()):
        raise damaged(where, "it does not have one score for each sampled token")
    return logp
