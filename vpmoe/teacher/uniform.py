"""Detect a teacher that says nothing: every token gets the log-probability −ln V of the uniform distribution.

That is what a matrix of zeros in place of the output, the last norm or the embeddings gives, whatever the
text, and scores of it look plausible to everything downstream.
"""

import math

import numpy as np
from numpy.typing import NDArray

from vpmoe.data.vocabulary import VOCABULARY_SIZE
from vpmoe.failure import Permanent

UNIFORM = -math.log(VOCABULARY_SIZE)
"""Log-probability of every token under the uniform distribution: −12.21 nats."""

TOLERANCE = 0.05
"""Nats. Root mean square of log p + ln V below which scores are rejected.

Logits of standard deviation σ give log-probabilities that spread by σ, so the tolerance bounds what the model
can know of a token by σ²/2 = 0.001 nats. The mean alone would not do: it is −ln V − σ²/2 for random weights,
which are legitimate in trials. GPT-OSS' own initialisation (0.02) has σ = 0.02·√hidden_size: 0.16 for the
smallest hidden size in use here, 64, and 1.07 for the released one."""

MIN_TOKENS = 16
"""Tokens from which on scores are judged. Fewer may lie near −ln V by chance."""


class UniformCheck:
    """Accumulates the log-probabilities of a part or a window, and rejects them if they are uniform."""

    def __init__(self, where: str, vocabulary: int = VOCABULARY_SIZE) -> None:
        """`where`: what is scored, for the error."""
        self._where = where
        self._vocabulary = vocabulary
        self._uniform = -math.log(vocabulary)
        self._tokens = 0
        self._squares = 0.0

    def add(self, logp_T: NDArray[np.floating]) -> None:
        """Add log-probabilities, none of them NaN. Raises Permanent if all so far are uniform."""
        self._tokens += len(logp_T)
        self._squares += float(np.square(logp_T.astype(np.float64) - self._uniform).sum())
        if self._tokens >= MIN_TOKENS and self._squares < self._tokens * TOLERANCE**2:
            raise Permanent(
                f"teacher.model: {self._where}: all {self._tokens} tokens have the log-probability "
                f"ln(1/{self._vocabulary:,}) = {self._uniform:.2f}, within {TOLERANCE}: its output is "
                "uniform and teaches nothing. Its output matrix, last norm or embeddings may be zeros; "
                "score a text with the model in transformers, and give another checkpoint."
            )
