"""Span numbers: which part of a document a token belongs to. Stored with datasets and rollouts. No torch.

The spans of prediction targets, shifted by one position, are in vpmoe.model.spans.
"""

import numpy as np
from numpy.typing import NDArray

NOT_SUPERVISED, REASONING, FINAL = 0, 1, 2
"""Prompt and end of document; the analysis messages; the final message. A token's number is stored at that
token's own position."""

SPANS = {"reasoning": REASONING, "final": FINAL}
"""The supervised spans by name, in order of their numbers."""


def spans_of_documents(lengths_D3: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Span of each token of D consecutive documents, [Σ lengths + D] uint8, from their lengths (prompt,
    reasoning, final).

    Each document has one more token, the end of document.
    """
    documents = len(lengths_D3)
    counts_D4 = np.concatenate([lengths_D3, np.ones((documents, 1), dtype=np.int64)], axis=1)
    pattern = np.array([NOT_SUPERVISED, REASONING, FINAL, NOT_SUPERVISED], dtype=np.uint8)
    return np.repeat(np.tile(pattern, documents), counts_D4.ravel())
