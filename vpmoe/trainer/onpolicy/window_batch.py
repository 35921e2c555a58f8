"""A window as the trainer reads it: verified to be the one that the stage trains next, then packed over rows
and ranks.

Every rank reads the whole window and takes its own rows, so ranks agree without communication. The files are
described in vpmoe/rollout/window_files.py.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vpmoe.api import DistillRun
from vpmoe.api.microbatch import Microbatch
from vpmoe.data import packing
from vpmoe.data.packing import PackedDocument
from vpmoe.data.spans import SPANS
from vpmoe.failure import Permanent
from vpmoe.model.batch import Batch
from vpmoe.rollout.window_files import Rollout, WindowRollouts, read_rollouts, read_scores
from vpmoe.storage import Bucket, paths
from vpmoe.trainer.data.collate import microbatches


@dataclass(frozen=True)
class DueWindow:
    """What the header of the rollouts must say for the window to be the next. The names are
    RolloutHeader's."""

    run: str
    config: str
    stage: str
    window: int
    version: int
    weights: str
    """The content of that version, by the manifest that was published."""
    seen: int
    """Tokens of the stage before the window."""
    last_from: int
    """With at least this many tokens the window is the stage's last: the anchor steps that follow it reach
    the stage's end."""


@dataclass(frozen=True)
class ScoredWindow:
    """A verified window."""

    sampled: WindowRollouts
    teacher: Sequence[NDArray[np.float32]]
    """For each rollout the teacher's log-probabilities of its completion, [C]."""
    sha256: tuple[str, str]
    """Of its files, rollouts and scores."""

    @property
    def rollouts(self) -> Sequence[Rollout]:
        return self.sampled.rollouts


def read_window(bucket: Bucket, run: DistillRun, due: DueWindow, sequence_length: int) -> ScoredWindow:
    """The window that is due.

    Raises Permanent, naming the object and its fault, if the files hold another window or are damaged.
    """
    keys = [paths.window(run, due.stage, due.window, kind) for kind in ("rollouts", "scores")]
    rollouts, scores = (bucket.get(key) for key in keys)
    sampled = read_rollouts(rollouts, bucket.url(keys[0]))
    check_due(sampled, due, sequence_length, bucket.url(keys[0]))
    teacher = read_scores(scores, bucket.url(keys[1]), sampled)
    return ScoredWindow(sampled, teacher, (sampled.sha256, hashlib.sha256(scores).hexdigest()))


def check_due(sampled: WindowRollouts, due: DueWindow, sequence_length: int, where: str) -> None:
    """Raise Permanent if rollouts are not those that are due, or cannot be trained on."""
    header = sampled.header
    expected = {name: value for name, value in asdict(due).items() if name != "last_from"} | {
        "last": header.tokens >= due.last_from
    }
    faults = [
        f"{name} is {getattr(header, name)}, not {value}"
        for name, value in expected.items()
        if getattr(header, name) != value
    ]
    if header.tokens != (held := sum(len(one.ids_T) for one in sampled.rollouts)) or not held:
        faults.append(f"its header says {header.tokens} tokens and it holds {held}")
    for one in sampled.rollouts:
        if len(one.ids_T) > sequence_length or not np.isin(one.span_C, list(SPANS.values())).all():
            whose, length = f"rollout {one.rollout} of prompt {one.prompt}", len(one.ids_T)
            faults.append(
                f"{whose} has {length} tokens for a sequence of {sequence_length}, or a sampled token of no "
                "span"
            )
    if faults:
        raise Permanent(
            f"{where}: {'; '.join(faults[:3])}. It is not the window that stage {due.stage} trains next. "
            "Delete it, its scores and all later windows of the stage to have them sampled again."
        )


def rows_of_rank(lengths: Sequence[int], sequence_length: int, rank: int, ranks: int) -> list[list[int]]:
    """The numbers of the rollouts in each of this rank's rows.

    Over all ranks each rollout is in one row. Every rank has equally many rows; the last ones may be empty.
    """
    places, starts = packing.pack_sequences(np.asarray(lengths, np.int32), sequence_length)
    packed = [places[start:stop].tolist() for start, stop in pairwise(starts)]
    packed += [[] for _ in range(-len(packed) % ranks)]
    return packed[rank::ranks]


def window_batches(
    window: ScoredWindow, sequence_length: int, rank: int, ranks: int, microbatch: Microbatch
) -> list[Batch]:
    """This rank's microbatches, with the teacher's and the sampler's log p of the sampled tokens. Over all
    ranks each rollout is there once."""
    rollouts = window.rollouts
    packed = rows_of_rank([len(one.ids_T) for one in rollouts], sequence_length, rank, ranks)
    documents = [[PackedDocument(0, number, len(rollouts[number].ids_T)) for number in row] for row in packed]

    def with_prompt(number: int, of_completion: NDArray[Any], of_prompt: Any) -> NDArray[Any]:
        asked = np.full(rollouts[number].prompt_length, of_prompt, of_completion.dtype)
        return np.concatenate([asked, of_completion])

    return microbatches(
        documents,
        lambda document: (
            rollouts[document.number].ids_T,
            with_prompt(document.number, rollouts[document.number].span_C, 0),
        ),
        sequence_length,
        microbatch,
        lambda document: with_prompt(document.number, window.teacher[document.number], np.nan),
        lambda document: with_prompt(document.number, rollouts[document.number].logp_C, np.nan),
    )


def chained_digest(before: str, window: ScoredWindow) -> str:
    """WindowStream.digest after one more window."""
    return hashlib.sha256("".join((before, *window.sha256)).encode()).hexdigest()
