"""Two ranks against one: the same loss and steps, states that go from any layout into any other, and failures
that all ranks share."""

from typing import Any

import pytest
import torch

from tests.fakes import model_ranks
from tests.fakes.ranks import run_ranks
from tests.fakes.students import learner, reading, saved, whole
from vpmoe.model import state
from vpmoe.model.learner import Learner


@pytest.fixture(scope="module")
def one(device: torch.device) -> dict[str, Any]:
    """Three steps in this process, with the state after two."""
    it = learner(device)
    told = model_ranks.train(it, slice(None), range(2))
    tensors = whole([saved(it)], state.sizes(it))
    return {
        "told": told,
        "state": tensors,
        "third": model_ranks.train(it, slice(None), range(2, 3)),
        "weights": model_ranks.weights(it),
    }


@pytest.fixture(scope="module")
def two(one: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> list[dict[int, dict[str, Any]]]:
    """What each of two ranks came to, by expert parallelism. See ranks.py."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.save(one["state"], folder / "one.pt")
    assert run_ranks(model_ranks.main, folder) == [0, 0]
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(2)]


layouts = pytest.mark.parametrize(
    "expert_parallel", [pytest.param(1, id="data-parallel"), pytest.param(2, id="expert-parallel")]
)


@layouts
def test_two_ranks_train_as_one_does(
    one: dict[str, Any], two: list[Any], expert_parallel: int, device: torch.device
) -> None:
    """Loss, cross-entropies, expert counts and gradient norms of the same global batches; the same on both
    ranks."""
    for rank in range(2):
        for (told, norm), (wanted, wanted_norm) in zip(
            two[rank][expert_parallel]["told"], one["told"], strict=True
        ):
            assert told.loss == pytest.approx(wanted.loss, rel=1e-5) and norm == pytest.approx(
                wanted_norm, rel=1e-4
            )
            assert (
                told.cross_entropy == pytest.approx(wanted.cross_entropy, rel=1e-5)
                and told.tokens == wanted.tokens
            )
        first, first_wanted = two[rank][expert_parallel]["told"][0][0].load, one["told"][0][0].load
        assert torch.equal(first.tokens, first_wanted.tokens) and first.aux.tolist() == pytest.approx(
            first_wanted.aux.tolist(), rel=1e-5
        )


@layouts
def test_a_restored_state_goes_on_with_the_same_bits(two: list[Any], expert_parallel: int) -> None:
    for rank in range(2):
        result = two[rank][expert_parallel]
        (((third, norm),), weights), (((again, norm_again),), weights_again) = (
            result["third"],
            result["repeated"],
        )
        assert result["steps"] == 3 and (third.loss, norm) == (again.loss, norm_again)
        assert all(torch.equal(weight, weights_again[name]) for name, weight in weights.items())


@layouts
def test_one_process_takes_over_the_state_of_two(
    two: list[Any], expert_parallel: int, device: torch.device
) -> None:
    """Exactly: main parameters, moments and biases come out as they went in, and weights follow them."""
    it = learner(device)
    tensors = whole([two[rank][expert_parallel]["state"] for rank in range(2)], state.sizes(it))
    state.restore(it, reading(tensors), steps=2)
    assert_holds(it, tensors)


@layouts
def test_two_ranks_take_over_the_state_of_one_process(
    one: dict[str, Any], two: list[Any], expert_parallel: int
) -> None:
    tensors = whole(
        [two[rank][expert_parallel]["taken_over"][0] for rank in range(2)],
        {name: len(t) for name, t in one["state"].items()},
    )
    assert all(torch.equal(tensor, one["state"][name]) for name, tensor in tensors.items())
    for rank in range(2):
        for name, weight in two[rank][expert_parallel]["taken_over"][1].items():
            wanted = one["state"][f"main/{name}"]
            if weight.numel() < len(wanted):  # this rank's half of the experts
                wanted = wanted[rank * weight.numel() : (rank + 1) * weight.numel()]
            assert torch.equal(weight.flatten(), wanted), name


@layouts
def test_rank_0_has_the_weights_of_all_ranks_to_export(
    one: dict[str, Any], two: list[Any], expert_parallel: int
) -> None:
    exported = two[0][expert_parallel]["exported"]
    wanted = {name for name in one["state"] if name.startswith(("main/", "buffer/"))}
    assert exported.keys() == wanted and all(
        torch.equal(exported[name], one["state"][name]) for name in wanted
    )


@layouts
def test_a_nan_on_one_rank_stops_both_before_any_weight_moves(two: list[Any], expert_parallel: int) -> None:
    for rank in range(2):
        result = two[rank][expert_parallel]
        assert result["broken_loss"] != result["broken_loss"] and result["unmoved"]
        assert result["raised"] == "step 4: the gradient's norm is nan. No weight was moved."


def test_one_process_goes_on_with_the_same_bits(one: dict[str, Any], device: torch.device) -> None:
    it = learner(device)
    state.restore(it, reading(one["state"]), steps=2)
    ((again, norm),) = model_ranks.train(it, slice(None), range(2, 3))
    ((third, wanted),) = one["third"]
    assert (again.loss, norm, it.steps) == (third.loss, wanted, 3)
    assert all(torch.equal(weight, one["weights"][name]) for name, weight in model_ranks.weights(it).items())


def assert_holds(it: Learner, tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in whole([saved(it)], state.sizes(it)).items():
        assert torch.equal(tensor, tensors[name]), name
    for name, weight in model_ranks.weights(it).items():
        assert torch.equal(weight.flatten(), tensors[f"main/{name}"]), name
