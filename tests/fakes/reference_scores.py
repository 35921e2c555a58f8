"""Log-probabilities of a sequence by transformers, the reference for those by vLLM."""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from transformers import PreTrainedModel


TOLERANCE = 1e-4
"""Nats. Both compute in float32 and sum up to 600 positions and 201,088 logits in different orders. The
measured difference is 6e-6."""


def expected(reference: "PreTrainedModel", ids_T: NDArray[np.int32]) -> NDArray[np.float64]:
    """[T] log-probability of each id given those before it by transformers, the softmax in float64; NaN for
    the first."""
    import torch

    with torch.no_grad():
        logits_TV = reference(torch.from_numpy(ids_T.astype(np.int64))[None]).logits[0]
    logp_T = np.full(len(ids_T), np.nan)
    targets = torch.from_numpy(ids_T[1:].astype(np.int64))[:, None]
    logp_T[1:] = logits_TV[:-1].double().log_softmax(1).gather(1, targets)[:, 0].numpy()
    return logp_T
