"""Figures from the student's answers: loss by span, validity and lengths by effort, bits per byte.

Pure arithmetic, in float64.
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from vpmoe.api.progress import SpanLoss
from vpmoe.data.spans import FINAL, REASONING
from vpmoe.data.tokenizer import Ids
from vpmoe.failure import Permanent
from vpmoe.rollout.curriculum import EFFORTS
from vpmoe.rollout.evaluation_record import EffortResult
from vpmoe.rollout.prompts import completion_validity
from vpmoe.rollout.validity import VALIDITIES


@dataclass
class SpanSums:
    """Sums over documents of −log p and of tokens, by span."""

    nll: dict[int, float] = field(default_factory=lambda: {REASONING: 0.0, FINAL: 0.0})
    tokens: dict[int, int] = field(default_factory=lambda: {REASONING: 0, FINAL: 0})

    def add(self, logp: NDArray[np.float32], spans: NDArray[np.uint8]) -> None:
        """Add a document: log-probabilities and spans of all its tokens but the first, [T − 1] each.

        Raises Permanent if the log-probability of a counted token is not finite.
        """
        for span in self.nll:
            of_span = logp[spans == span].astype(np.float64)
            check_finite(of_span, "the held-out loss")
            self.nll[span] -= float(of_span.sum())
            self.tokens[span] += len(of_span)

    def loss(self) -> SpanLoss:
        """Mean by span over the tokens of all documents, in nats; the same figure as the trainer's held-out
        loss."""
        mean = {span: self.nll[span] / tokens if tokens else None for span, tokens in self.tokens.items()}
        return SpanLoss(reasoning=mean[REASONING], final=mean[FINAL])


def check_finite(logp: NDArray[np.float64], what: str) -> None:
    """Raise Permanent if a log-probability is missing or not finite."""
    if not np.isfinite(logp).all():
        raise Permanent(
            f"NonFinite: {what}: the student gives a token the log-probability "
            f"{logp[~np.isfinite(logp)][0]}. The weights of the last checkpoint are not finite, or too "
            "large for their type. Lower optimizer.learningRate in a new run."
        )


def measure_efforts(answers: Iterable[tuple[str, Ids]]) -> dict[str, EffortResult]:
    """Validity and lengths by effort, in the order of EFFORTS, given (effort, completion's ids [C]) pairs."""
    lengths: dict[str, list[int]] = {effort: [] for effort in EFFORTS}
    counts: dict[str, Counter[str]] = {effort: Counter() for effort in EFFORTS}
    for effort, ids_C in answers:
        lengths[effort].append(len(ids_C))
        counts[effort][completion_validity(ids_C)] += 1
    return {
        effort: EffortResult(
            validity={kind: counts[effort][kind] for kind in VALIDITIES},
            mean_tokens=sum(of) / len(of),
            most_tokens=max(of),
        )
        for effort, of in lengths.items()
        if of
    }


def total_validity(efforts: Iterable[EffortResult]) -> dict[str, int]:
    """The validity counts of all efforts together; empty if there are none."""
    found = list(efforts)
    return {kind: sum(of.validity[kind] for of in found) for kind in VALIDITIES} if found else {}


def total_bits(logp: NDArray[np.float32]) -> float:
    """−Σ log2 p, given natural logarithms. Raises Permanent if one is missing or not finite."""
    of = logp.astype(np.float64)
    check_finite(of, "the canary")
    return -float(of.sum()) / math.log(2)
