"""With every part of the architecture, two ranks and one process compute the same loss and steps, a state of
any layout is restored into any other, and a failure of one rank stops all."""

import math
import re
from typing import Any

import pytest
import torch

from tests.fakes import model_ranks
from tests.fakes.ranks import run_ranks
from tests.fakes.students import COMPLETE, copy_slices, join_slices, learner, read_from
from vpmoe.model import state
from vpmoe.model.learner import Learner


@pytest.fixture(scope="module")
def one_process(device: torch.device) -> dict[str, Any]:
    """Three steps in this process, with the state after two."""
    it = learner(device, COMPLETE)
    outcomes = model_ranks.train(it, slice(None), range(2))
    tensors = join_slices([copy_slices(it)], state.sizes(it))
    return {
        "outcomes": outcomes,
        "state": tensors,
        "third": model_ranks.train(it, slice(None), range(2, 3)),
        "weights": model_ranks.weights(it),
    }


@pytest.fixture(scope="module")
def two_ranks(
    one_process: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[int | str, dict[str, Any]]]:
    """The results of each of two ranks, by layout. See tests/fakes/model_ranks.py."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.save(one_process["state"], folder / "one.pt")
    assert run_ranks(model_ranks.main, folder) == [0, 0]
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(2)]


layouts = pytest.mark.parametrize(
    "layout",
    [
        pytest.param(1, id="data-parallel"),
        pytest.param(2, id="expert-parallel"),
        pytest.param("sharded", id="data-parallel, sharded gradients"),
        pytest.param("sharded experts", id="expert-parallel, sharded gradients"),
    ],
)


@layouts
def test_two_ranks_train_like_one_process(
    one_process: dict[str, Any], two_ranks: list[Any], layout: int | str, device: torch.device
) -> None:
    """Loss, cross-entropies, expert counts and gradient norms of the same global batches, on both ranks."""
    for rank in range(2):
        for (outcome, norm), (wanted, wanted_norm) in zip(
            two_ranks[rank][layout]["outcomes"], one_process["outcomes"], strict=True
        ):
            assert outcome.loss == pytest.approx(wanted.loss, rel=1e-5) and norm == pytest.approx(
                wanted_norm, rel=1e-4
            )
            assert (
                outcome.cross_entropy == pytest.approx(wanted.cross_entropy, rel=1e-5)
                and outcome.tokens == wanted.tokens
            )
        first, first_wanted = (
            two_ranks[rank][layout]["outcomes"][0][0].load,
            one_process["outcomes"][0][0].load,
        )
        assert torch.equal(first.tokens, first_wanted.tokens) and first.aux.tolist() == pytest.approx(
            first_wanted.aux.tolist(), rel=1e-5
        )


def test_a_forward_waits_for_the_weights_of_each_layer_just_before_it(two_ranks: list[Any]) -> None:
    """Rank 0 begins while rank 1 holds its share back. What is left to wait for falls from part to part;
    the output matrix is last, and Learner.student waits for it."""
    first, second = (result["gather"] for result in two_ranks)
    assert len(first["complete"]) >= 8 and not any(first["complete"])
    for found in (first, second):
        left = found["left"]
        assert found["moved"] and found["same"]
        assert left == sorted(left, reverse=True) and len(set(left)) >= 4
        assert left[0] < len(found["complete"]) and left[-2] > left[-1] == 0
    assert model_ranks.equal(first["weights"], second["weights"])


def test_sharded_gradients_take_a_rank_s_share_of_the_memory(two_ranks: list[Any]) -> None:
    """Half of all: of the experts too, of which an expert-parallel rank has half the gradients as it is, all
    its own."""
    for rank in range(2):
        whole, sharded, experts, own = (
            two_ranks[rank][layout]["gradient_bytes"] for layout in (1, "sharded", 2, "sharded experts")
        )
        assert 2 * sharded == whole > experts > own == sharded


@layouts
def test_a_restored_state_continues_with_the_same_bits(two_ranks: list[Any], layout: int | str) -> None:
    for rank in range(2):
        result = two_ranks[rank][layout]
        (((third, norm),), weights), (((repeated, repeated_norm),), repeated_weights) = (
            result["third"],
            result["repeated"],
        )
        assert result["steps"] == 3 and (third.loss, norm) == (repeated.loss, repeated_norm)
        assert all(torch.equal(weight, repeated_weights[name]) for name, weight in weights.items())


@layouts
def test_one_process_restores_the_state_of_two_ranks(
    two_ranks: list[Any], layout: int | str, device: torch.device
) -> None:
    """Main parameters, moments and biases are bit for bit those of the two ranks, and the weights equal the
    main parameters."""
    it = learner(device, COMPLETE)
    tensors = join_slices([two_ranks[rank][layout]["state"] for rank in range(2)], state.sizes(it))
    state.restore(it, read_from(tensors), steps=2)
    assert_state_equals(it, tensors)


@layouts
def test_two_ranks_restore_the_state_of_one_process(
    one_process: dict[str, Any], two_ranks: list[Any], layout: int | str
) -> None:
    tensors = join_slices(
        [two_ranks[rank][layout]["converted"][0] for rank in range(2)],
        {name: len(t) for name, t in one_process["state"].items()},
    )
    assert all(torch.equal(tensor, one_process["state"][name]) for name, tensor in tensors.items())
    for rank in range(2):
        for name, weight in two_ranks[rank][layout]["converted"][1].items():
            wanted = one_process["state"][f"main/{name}"]
            if weight.numel() < len(wanted):  # this rank's half of the experts
                wanted = wanted[rank * weight.numel() : (rank + 1) * weight.numel()]
            assert torch.equal(weight.flatten(), wanted), name


@layouts
def test_rank_0_exports_the_weights_of_all_ranks(
    one_process: dict[str, Any], two_ranks: list[Any], layout: int | str
) -> None:
    exported = two_ranks[0][layout]["exported"]
    wanted = {name for name in one_process["state"] if name.startswith(("main/", "buffer/"))}
    assert exported.keys() == wanted and all(
        torch.equal(exported[name], one_process["state"][name]) for name in wanted
    )


@layouts
def test_a_loss_or_gradient_that_is_not_finite_on_one_rank_changes_nothing_on_either(
    two_ranks: list[Any], layout: int | str
) -> None:
    """Weights, expert biases and moments are as before, and the next step has the bits of one without the bad
    steps before it."""
    for rank in range(2):
        result = two_ranks[rank][layout]
        loss, (first, second) = result["broken_loss"]
        assert math.isnan(loss) and math.isfinite(first) and math.isnan(second)
        loss, (first, second) = result["finite_loss"]
        assert loss == pytest.approx(first + second, rel=1e-12)
        for message in result["raised"]:
            assert re.fullmatch(r"step 4: the gradient's norm is (nan|inf)\. No weight was moved\.", message)
        assert result["unchanged"]
        ((fourth, norm),), weights = result["fourth"]
        ((wanted, wanted_norm),), wanted_weights = result["undisturbed"]
        assert (fourth.loss, norm) == (wanted.loss, wanted_norm)
        assert torch.equal(fourth.load.tokens, wanted.load.tokens), "counts of the bad steps are gone"
        assert torch.equal(fourth.load.aux, wanted.load.aux)
        assert model_ranks.equal(weights, wanted_weights)


@pytest.mark.parametrize("layout", [2, "sharded experts"])
def test_ranks_that_share_experts_refuse_microbatches_of_different_shapes(
    two_ranks: list[Any], layout: int | str
) -> None:
    """On both ranks, before anything is computed: the steps after it are as without."""
    for rank in range(2):
        assert re.fullmatch(
            r"ranks that share experts need as many microbatches of the same shapes, and other ranks' differ "
            rf"from those of rank {rank}: \d × \d+, \d × \d+\. Fill rows up with padding\.",
            two_ranks[rank][layout]["other_shapes"],
        )


def test_one_process_continues_with_the_same_bits(one_process: dict[str, Any], device: torch.device) -> None:
    it = learner(device, COMPLETE)
    state.restore(it, read_from(one_process["state"]), steps=2)
    ((repeated, norm),) = model_ranks.train(it, slice(None), range(2, 3))
    ((third, wanted),) = one_process["third"]
    assert (repeated.loss, norm, it.steps) == (third.loss, wanted, 3)
    assert all(
        torch.equal(weight, one_process["weights"][name]) for name, weight in model_ranks.weights(it).items()
    )


def assert_state_equals(it: Learner, tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in join_slices([copy_slices(it)], state.sizes(it)).items():
        assert torch.equal(tensor, tensors[name]), name
    for name, weight in model_ranks.weights(it).items():
        assert torch.equal(weight.flatten(), tensors[f"main/{name}"]), name
