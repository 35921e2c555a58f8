"""What the student is asked at a stage's end: which held-out documents it scores, which prompts it answers at
which effort.

A pure function of the valid split, the seed and the run's configuration, and the same after every stage, so
that only the student differs between stages. measures.py evaluates the answers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from vpmoe.api import DistillRun
from vpmoe.api.stages import MaxTokens, OnPolicy
from vpmoe.data import packing
from vpmoe.data.packing import PackedDocument
from vpmoe.rollout.curriculum import EFFORTS


@dataclass(frozen=True)
class Question:
    """One completion to sample."""

    document: PackedDocument
    """The held-out document that the prompt is made of."""
    effort: str
    seed: int
    """Sampling seed, 63 bits."""


def held_out_documents(
    lengths: Sequence[NDArray[np.int32]], documents: int, seed: int
) -> list[PackedDocument]:
    """The documents of the trainer's held-out loss.

    `lengths[p]`: lengths of part p's documents, in tokens.
    """
    return packing.packed_documents(
        packing.held_out_documents(lengths, documents, seed),
        packing.first_documents([len(part) for part in lengths]),
        lengths,
    )


def sampling_questions(lengths: Sequence[NDArray[np.int32]], completions: int, seed: int) -> list[Question]:
    """`completions` questions: each held-out document at each effort in turn, so that efforts differ in
    nothing else.

    If the documents do not suffice they are repeated with other seeds. Raises ValueError if there is no
    document.
    """
    if not completions:
        return []
    if not sum(map(len, lengths)):
        raise ValueError("there is no document in any part to make prompts of")
    documents = held_out_documents(lengths, -(-completions // len(EFFORTS)), seed)
    return [
        Question(
            documents[number // len(EFFORTS) % len(documents)],
            EFFORTS[number % len(EFFORTS)],
            request_seed(seed, number),
        )
        for number in range(completions)
    ]


def request_seed(seed: int, number: int) -> int:
    """Sampling seed of a completion, 63 bits: the most that vLLM's generators accept."""
    return (
        int.from_bytes(
            blake2b(f"{seed}/{number}".encode(), digest_size=8, person=b"vpmoe.evaluation").digest()
        )
        >> 1
    )


def completion_limits(run: DistillRun, stage: str) -> MaxTokens:
    """Completion limits: those of the next OnPolicy stage, `stage` included; else of the previous one; else
    the defaults."""
    stages = run.spec.stages
    at = [one.name for one in stages].index(stage)
    on_policy = (one for one in (*stages[at:], *reversed(stages[:at])) if isinstance(one, OnPolicy))
    found = next(on_policy, None)
    return found.rollout.max_tokens if found else MaxTokens()
