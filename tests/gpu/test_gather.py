"""Weights gathered beside the next forward, on two GPUs: the bits of a step that waits for them."""

import sys
import threading
from typing import Any

import pytest
import torch

from tests.fakes import gather_ranks
from vpmoe.process.launcher import Placement, free_port, launch_workers


@pytest.fixture(scope="module")
def ranks(gpu: torch.device, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each rank found."""
    if torch.cuda.device_count() < 2:
        pytest.fail(f"needs two GPUs; torch finds {torch.cuda.device_count()}")
    folder = tmp_path_factory.mktemp("ranks")
    placement = Placement(2, 0, 2, "127.0.0.1", free_port())
    command = [sys.executable, "-m", "tests.fakes.gather_ranks", str(folder)]
    assert launch_workers(placement, command, [], threading.Event()) == 0
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(2)]


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
