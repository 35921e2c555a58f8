"""Mixed stages: the share of scored steps is exact after every step, also for shares that are not exact in
binary."""

from fractions import Fraction

import numpy as np
import pytest

from vpmoe.data.mixture import interleave, mix_streams
from vpmoe.data.packing import SequenceStream

SHARES = [0.0, 0.01, 0.1, 0.29, 1 / 3, 0.5, 0.57, 0.65, 0.7, 0.999999, 1.0]


@pytest.mark.parametrize("share", SHARES)
def test_after_n_steps_the_share_of_scored_steps_is_exact(share: float) -> None:
    kind = interleave(10_000, share)
    exact = Fraction(1, 3) if share == 1 / 3 else Fraction(str(share))
    for n in (1, 2, 3, 7, 100, 700, 1000, 9_999, 10_000):
        assert kind[:n].sum() == n * exact.numerator // exact.denominator


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("tokens", [1, 999, 20_000])
def test_a_stage_ends_when_it_reaches_its_tokens_and_reads_each_stream_in_order(
    share: float, tokens: int
) -> None:
    random = np.random.default_rng(3)
    all_documents = SequenceStream([random.integers(5, 60, 400, dtype=np.int32)], seed=1, sequence_length=64)
    few_documents = SequenceStream([random.integers(40, 64, 9, dtype=np.int32)], seed=1, sequence_length=64)
    unmixed = [all_documents.tokens_after_steps(8, 4, tokens), few_documents.tokens_after_steps(0, 4, tokens)]
    mixed = mix_streams(*unmixed, share, tokens)  # type: ignore[call-arg]
    step_tokens = [np.diff(tokens_N, prepend=0) for tokens_N in unmixed]
    total = 0
    steps_by_kind = [0, 0]
    for step in range(len(mixed.seen)):
        assert total < tokens, "the stage had ended before this step"
        kind = int(mixed.scored[step])
        assert mixed.index_in_stream(step) == steps_by_kind[kind] and mixed.steps_by_kind(step) == tuple(
            steps_by_kind
        )
        total += step_tokens[kind][steps_by_kind[kind]]
        steps_by_kind[kind] += 1
        assert mixed.seen[step] == total
    assert total >= tokens
    assert np.array_equal(mixed.scored, interleave(len(mixed.seen), share))


def test_without_scores_a_stage_equals_the_unmixed_stream() -> None:
    unmixed = SequenceStream([np.full(50, 20, np.int32)], seed=1, sequence_length=64).tokens_after_steps(
        0, 2, 3000
    )
    mixed = mix_streams(unmixed, unmixed[:0], 0.0, 3000)
    assert np.array_equal(mixed.seen, unmixed) and not mixed.scored.any()
