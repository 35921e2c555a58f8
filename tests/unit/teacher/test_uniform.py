"""Scores that are uniform are refused; those of random weights are not."""

import math

import numpy as np
import pytest

from tests.fakes.students import new_seed
from vpmoe.data.vocabulary import VOCABULARY_SIZE
from vpmoe.failure import Permanent
from vpmoe.teacher.uniform import MIN_TOKENS, UNIFORM, UniformCheck


def random_logp(sigma: float, tokens: int) -> np.ndarray:
    """Log-probabilities of random tokens by logits that are normal with this standard deviation, as random
    weights give them: the softmax is computed over the whole vocabulary."""
    random = np.random.default_rng(new_seed())
    logits_TV = random.normal(0, sigma, (tokens, VOCABULARY_SIZE)).astype(np.float32)
    targets_T = random.integers(0, VOCABULARY_SIZE, tokens)
    return logits_TV[np.arange(tokens), targets_T] - np.log(np.exp(logits_TV).sum(1))


UNIFORM_SCORES = {
    "exactly": lambda: np.full(100, -math.log(201_088), np.float32),
    "as-stored": lambda: np.full(100, UNIFORM, np.float16),
    "as-few-as-judged": lambda: np.full(MIN_TOKENS, UNIFORM, np.float32),
    "rounded": lambda: np.full(100, -12.25, np.float32),
    "nearly": lambda: UNIFORM + np.linspace(-0.05, 0.05, 1000),
    "tiny-weights": lambda: random_logp(0.01, 32),
}


@pytest.mark.parametrize("name", UNIFORM_SCORES)
def test_uniform_scores_are_refused(name: str) -> None:
    logp_T = UNIFORM_SCORES[name]()
    with pytest.raises(Permanent, match=rf"^teacher.model: window 3: all {len(logp_T)} tokens .* -12.21"):
        UniformCheck("window 3").add(logp_T)


OTHER_SCORES = {
    "none": lambda: np.empty(0, np.float32),
    "too-few-to-tell": lambda: np.full(MIN_TOKENS - 1, UNIFORM, np.float32),
    "initial-weights-64-wide": lambda: random_logp(0.02 * 64**0.5, MIN_TOKENS),
    "initial-weights-2880-wide": lambda: random_logp(0.02 * 2880**0.5, MIN_TOKENS),
    "large-random-weights": lambda: random_logp(2, MIN_TOKENS),
    "mean-is-uniform": lambda: UNIFORM + np.tile([-0.2, 0.2], 50),
    "a-teacher": lambda: np.log(np.random.default_rng(0).uniform(0.01, 1, 100)),
    "constant": lambda: np.full(100, -1.0),
    "one-token-known": lambda: np.append(np.full(100, UNIFORM), -1.0),
    "impossible": lambda: np.full(100, -np.inf),
}


@pytest.mark.parametrize("name", OTHER_SCORES)
def test_other_scores_are_not_refused(name: str) -> None:
    UniformCheck("window 3").add(OTHER_SCORES[name]())


def test_scores_add_up() -> None:
    check = UniformCheck("training part 1")
    for _ in range(3):
        check.add(np.full(MIN_TOKENS // 4, UNIFORM))
    with pytest.raises(Permanent, match=f"training part 1: all {MIN_TOKENS} tokens"):
        check.add(np.full(MIN_TOKENS // 4, UNIFORM))
