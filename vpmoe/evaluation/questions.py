"""What the student is asked at a stage's end: which held-out documents it scores, which prompts it answers at which effort.

A pure function of the valid split, the seed and the run's configuration, and the same after every stage: what changes from one stage to
the next is the student. How answers are counted is measures.py's business.
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
    """The sampling request's, of 63 bits."""


def held_out_documents(
    lengths: Sequence[NDArray[np.int32]], documents: int, seed: int
) -> list[PackedDocument]:
    """The documents that the trainer measures its held-out loss on. `lengths[p]` are the lengths in tokens of part p's documents."""
    return packing.documents(
        packing.held_out(lengths, documents, seed), packing.firsts([len(part) for part in lengths]), lengths
    )


def sampling_questions(lengths: Sequence[NDArray[np.int32]], completions: int, seed: int) -> list[Question]:
    """`completions` questions: each held-out document, in the order of `held_out`, at each effort in turn, so that efforts differ in
    nothing else. Where the documents do not suffice they come again, under other seeds. Raises ValueError where there is none.
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
    """The seed that a completion is sampled with: vLLM's generators take no more than 63 bits."""
    return (
        int.from_bytes(
            blake2b(f"{seed}/{number}".encode(), digest_size=8, person=b"vpmoe.evaluation").digest()
        )
        >> 1
    )


def completion_limits(run: DistillRun, stage: str) -> MaxTokens:
    """How long completions may be: as the OnPolicy stage samples them that comes next, this one included; else the one before; else as
    an OnPolicy stage would that says nothing."""
    stages = run.spec.stages
    at = [one.name for one in stages].index(stage)
    on_policy = (one for one in (*stages[at:], *reversed(stages[:at])) if isinstance(one, OnPolicy))
    found = next(on_policy, None)
    return found.rollout.max_tokens if found else MaxTokens()
