"""Vanilla: cross-entropy on the dataset's own tokens, a separate mean for reasoning and for final. Also the
anchor of later stages."""

from collections.abc import Mapping

from torch import Tensor

from vpmoe.model.batch import Batch
from vpmoe.model.head import Coefficient
from vpmoe.model.objective import Weighted
from vpmoe.model.spans import coefficient_by_span, values_of_spans


def vanilla(counts: Tensor, weights: Mapping[str, float]) -> Weighted:
    """Coefficients c = w_span / N_span. `counts` is [positions, N_reasoning, N_final], as in Batch.counts.

    N counts the GLOBAL batch, all ranks and microbatches of the step. With counts of one microbatch this
    would be a mean of means, in which the only token of a short microbatch outweighs a thousand of another.
    """
    by_span = coefficient_by_span(counts, weights)

    def coefficient_of(batch: Batch) -> Coefficient:
        c_T = values_of_spans(by_span, batch.span)
        return lambda logp_t, rows_t: c_T[rows_t]

    return Weighted(coefficient_of)
