"""A window as the trainer takes it: its rollouts and scores, proved to be those that the stage wants next, packed over rows and ranks.

Every rank reads the whole window and takes its own rows, so ranks agree without talking. Waiting for a window is waiting.py's business,
what its files are vpmoe.rollout.window_files's.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vpmoe.api import DistillRun
from vpmoe.data import packing
from vpmoe.data.packing import PackedDocument
from vpmoe.data.spans import SPANS
from vpmoe.failure import Permanent
from vpmoe.model.batch import Batch
from vpmoe.rollout.window_files import Rollout, Sampled, read_rollouts, read_scores
from vpmoe.storage import Bucket, paths
from vpmoe.trainer.data.collate import microbatches


@dataclass(frozen=True)
class Due:
    """What the rollouts must say of themselves to be the ones that the stage trains next; the names are AboutRollouts'."""

    run: str
    config: str
    stage: str
    window: int
    version: int
    weights: str
    """The content of that version, by the manifest that was published."""
    seen: int
    """Where the stage stands, in tokens."""
    last_from: int
    """With so many tokens or more the window is the stage's last: the anchor steps that follow it reach the stage's end."""


@dataclass(frozen=True)
class Window:
    """A window that was proved."""

    sampled: Sampled
    teacher: Sequence[NDArray[np.float32]]
    """For each rollout the teacher's log-probabilities of its completion, [C]."""
    sha256: tuple[str, str]
    """Of its files, rollouts and scores."""

    @property
    def rollouts(self) -> Sequence[Rollout]:
        return self.sampled.rollouts


def read(bucket: Bucket, run: DistillRun, due: Due, sequence_length: int) -> Window:
    """The window that is due. Raises Permanent, with the object and its fault, where its files hold another one or are not whole."""
    keys = [paths.window(run, due.stage, due.window, kind) for kind in ("rollouts", "scores")]
    rollouts, scores = (bucket.get(key) for key in keys)
    sampled = read_rollouts(rollouts, bucket.url(keys[0]))
    check(sampled, due, sequence_length, bucket.url(keys[0]))
    teacher = read_scores(scores, bucket.url(keys[1]), sampled)
    return Window(sampled, teacher, (sampled.sha256, hashlib.sha256(scores).hexdigest()))


def check(sampled: Sampled, due: Due, sequence_length: int, where: str) -> None:
    """Raise Permanent where rollouts are not those that are due, or cannot be trained on."""
    about = sampled.about
    wanted = {name: wants for name, wants in asdict(due).items() if name != "last_from"} | {
        "last": about.tokens >= due.last_from
    }
    faults = [
        f"{name} is {getattr(about, name)}, not {wants}"
        for name, wants in wanted.items()
        if getattr(about, name) != wants
    ]
    if about.tokens != (held := sum(len(one.ids_T) for one in sampled.rollouts)) or not held:
        faults.append(f"it says {about.tokens} tokens and holds {held}")
    for one in sampled.rollouts:
        if len(one.ids_T) > sequence_length or not np.isin(one.span_C, list(SPANS.values())).all():
            whose, length = f"rollout {one.rollout} of prompt {one.prompt}", len(one.ids_T)
            faults.append(
                f"{whose} has {length} tokens for a sequence of {sequence_length}, or a sampled token of no span"
            )
    if faults:
        raise Permanent(
            f"{where}: {'; '.join(faults[:3])}. It is not the window that stage {due.stage} trains next. Delete it, its scores and all "
            "later windows of the stage, and they are made again."
        )


def rows(lengths: Sequence[int], sequence_length: int, rank: int, ranks: int) -> list[list[int]]:
    """Which rollouts stand in each of this rank's rows. Over all ranks each stands in one row; every rank has as many rows, empty ones at
    their end where they do not come out."""
    places, starts = packing.pack(np.asarray(lengths, np.int32), sequence_length)
    packed = [places[start:stop].tolist() for start, stop in pairwise(starts)]
    packed += [[] for _ in range(-len(packed) % ranks)]
    return packed[rank::ranks]


def batches(window: Window, sequence_length: int, rank: int, ranks: int) -> list[Batch]:
    """This rank's microbatches: each rollout once over all ranks, with the teacher's and the sampler's log p of its sampled tokens."""
    rollouts = window.rollouts
    packed = rows([len(one.ids_T) for one in rollouts], sequence_length, rank, ranks)
    documents = [[PackedDocument(0, number, len(rollouts[number].ids_T)) for number in row] for row in packed]

    def whole(number: int, of_completion: NDArray[Any], prompt: Any) -> NDArray[Any]:
        asked = np.full(rollouts[number].asked, prompt, of_completion.dtype)
        return np.concatenate([asked, of_completion])

    return microbatches(
        documents,
        lambda document: (
            rollouts[document.number].ids_T,
            whole(document.number, rollouts[document.number].span_C, 0),
        ),
        sequence_length,
        lambda document: whole(document.number, window.teacher[document.number], np.nan),
        lambda document: whole(document.number, rollouts[document.number].logp_C, np.nan),
    )


def facts(window: Window) -> dict[str, Any]:
    """What the window holds, for its step's line of metrics: counts, and by effort shares of each validity and lengths of completions."""
    about, rollouts = window.sampled.about, window.rollouts
    by_effort = {
        effort: [one for one in rollouts if one.effort == effort]
        for effort in sorted({one.effort for one in rollouts})
    }
    return {
        "window": about.window,
        "version": about.version,
        "phase": about.phase,
        "turns": about.turns,
        "staleness": about.window - about.version,
        "prompts": len({one.prompt for one in rollouts}),
        "rollouts": {effort: len(of) for effort, of in by_effort.items()},
        "validity": {effort: _shares([one.validity for one in of]) for effort, of in by_effort.items()},
        "lengths": {effort: _lengths([len(one.logp_C) for one in of]) for effort, of in by_effort.items()},
    }


def _shares(names: Sequence[str]) -> dict[str, float]:
    return {name: count / len(names) for name, count in sorted(Counter(names).items())}


def _lengths(sizes: Sequence[int]) -> dict[str, float]:
    return {"mean": sum(sizes) / len(sizes), "max": max(sizes)}
