"""Weights gathered beside the next forward, on two GPUs: the bits of a step that waits for them."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.fakes import gather_ranks


@pytest.fixture(scope="module")
def ranks(on_two_gpus: Callable[[str], list[Any]]) -> list[Any]:
    """What each rank found."""
    return on_two_gpus("tests.fakes.gather_ranks")


@pytest.mark.parametrize("case", gather_ranks.CASES)
def test_a_late_share_changes_no_bit(ranks: list[Any], case: str) -> None:
    """Rank 0 begins each forward while rank 1's share of the weights is still to come."""
    waited, beside = ([rank[case, kind] for rank in ranks] for kind in (False, True))
    assert beside[0]["buckets"] >= 4
    for found, wanted in zip(beside, waited, strict=True):
        assert found["losses"] == wanted["losses"]
        assert len(set(found["losses"])) == gather_ranks.STEPS
        different = [name for name, x in wanted["weights"].items() if not x.equal(found["weights"][name])]
        assert not different
    assert all(x.equal(beside[1]["weights"][name]) for name, x in beside[0]["weights"].items())
