"""Targets by span: which tokens are learned, and in which of the two means. Only this module shifts targets.

Position t predicts the token at t + 1 of the same document, which is a target unless its span is 0 (system,
user, headers of other turns). A document's last position and padding predict nothing.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vpmoe.api.metrics import BySpan
from vpmoe.data.spans import SPANS

NO_TARGET = -1


def targets(tokens_bS: Tensor, spans_bS: Tensor, documents_bS: Tensor) -> tuple[Tensor, Tensor]:
    """The targets: (token [T] int64 or NO_TARGET, its span [T] uint8 or 0), with T = b·S in row order.

    `documents_bS` numbers the documents of a row; a negative number is padding. A document is a contiguous
    run of one number.
    """
    token_bS = torch.full_like(tokens_bS, NO_TARGET)
    span_bS = torch.zeros_like(spans_bS)
    same = (documents_bS[:, 1:] == documents_bS[:, :-1]) & (documents_bS[:, 1:] >= 0) & (spans_bS[:, 1:] > 0)
    token_bS[:, :-1] = torch.where(same, tokens_bS[:, 1:], NO_TARGET)
    span_bS[:, :-1] = torch.where(same, spans_bS[:, 1:], 0)
    return token_bS.flatten(), span_bS.flatten()


def target_rows(target_T: Tensor) -> Tensor:
    """[N] int64: the positions that have a target, in order."""
    return (target_T != NO_TARGET).nonzero().squeeze(1)


def shift_to_targets(values_bS: Tensor, target_T: Tensor) -> Tensor:
    """Move floating-point values of the tokens [b, S] to the positions [T] that predict these tokens; NaN
    without a target."""
    shifted_bS = torch.full_like(values_bS, torch.nan)
    shifted_bS[:, :-1] = values_bS[:, 1:]
    return shifted_bS.flatten().where(target_T != NO_TARGET, torch.nan)


def weights_by_span(weights: Mapping[str, float]) -> list[float]:
    """The weights as a list indexed by span number; 0 for span 0.

    Raises ValueError if `weights` has not exactly the spans of SPANS.
    """
    if set(weights) != set(SPANS):
        raise ValueError(
            f"training.spanWeights: {sorted(weights)} are not the spans {sorted(SPANS)}. Give each exactly "
            "one weight."
        )
    by_span = [0.0] * (max(SPANS.values()) + 1)
    for name, span in SPANS.items():
        by_span[span] = float(weights[name])
    return by_span


def coefficient_by_span(counts: Tensor, weights: Mapping[str, float]) -> list[float]:
    """w_span / max(N_span, 1) indexed by span number, 0 for span 0.

    `counts` is [positions, N_reasoning, N_final] of the GLOBAL batch. A span without tokens has no target to
    which its coefficient would apply.
    """
    return [weight / max(int(n), 1) for weight, n in zip(weights_by_span(weights), counts, strict=True)]


def values_of_spans(by_span: Sequence[float], span_T: Tensor) -> Tensor:
    """[T] fp32: the value of each position's span, from a list indexed by span number.

    Without a tensor of the list: a copy of it to a GPU would wait for what the GPU was given before.
    """
    values_T = torch.full(span_T.shape, by_span[0], dtype=torch.float32, device=span_T.device)
    for span, value in enumerate(by_span[1:], start=1):
        values_T.masked_fill_(span_T == span, value)
    return values_T


def means_by_span(total: Tensor, sums: int) -> list[BySpan]:
    """The mean by span of each sum but the first, which counts the span's tokens; None for a span without
    tokens.

    `total` [spans · sums] holds the sums of one span after those of the other.
    """
    table = dict(zip(SPANS, total.view(len(SPANS), sums).tolist(), strict=True))
    return [
        {span: row[column] / row[0] if row[0] else None for span, row in table.items()}
        for column in range(1, sums)
    ]


def weighted_sum(values: BySpan, weights: Mapping[str, float]) -> float:
    """w_reasoning · value_reasoning + w_final · value_final; a span without tokens adds nothing."""
    return weights["reasoning"] * (values["reasoning"] or 0.0) + weights["final"] * (values["final"] or 0.0)
