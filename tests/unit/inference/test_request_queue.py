"""Order and assignment of the queue that the engines of a pool share."""

import numpy as np
import pytest

from tests.fakes.students import new_seed
from vpmoe.inference.engine import MAX_SEQUENCES
from vpmoe.inference.request_queue import (
    ADMITTED,
    GPU_DEPTH,
    RequestSize,
    admitted,
    engines_per_gpu,
    longest_first,
    next_engines,
    queue_depth,
)
from vpmoe.plan.sampling import ENGINES


def test_only_gpus_share_a_queue() -> None:
    assert queue_depth({"CUDA_VISIBLE_DEVICES": ""}) is None
    assert queue_depth({}) == queue_depth({"CUDA_VISIBLE_DEVICES": "0,1"}) == GPU_DEPTH
    assert MAX_SEQUENCES["cuda"] < GPU_DEPTH, "an engine has requests in reserve"


def test_only_gpus_have_several_engines() -> None:
    assert engines_per_gpu({"CUDA_VISIBLE_DEVICES": ""}) == 1
    assert engines_per_gpu({}) == engines_per_gpu({"CUDA_VISIBLE_DEVICES": "0,1"}) == ENGINES > 1


def test_long_completions_come_first_and_equal_ones_keep_their_order() -> None:
    sizes = [RequestSize(*size) for size in ((16, 9), (40, 3), (40, 8), (16, 9), (24, 1))]
    assert longest_first(sizes) == [2, 1, 4, 0, 3]


@pytest.mark.parametrize(
    "waiting, held, depth, engines",
    [
        pytest.param(5, [0, 0], 4, [0, 1, 0, 1, 0], id="all-idle"),
        pytest.param(9, [3, 1], 4, [1, 1, 0, 1], id="until-all-are-full"),
        pytest.param(1, [3, 1], 4, [1], id="the-last-one"),
        pytest.param(9, [4, 4], 4, [], id="no-room"),
        pytest.param(0, [0, 0], 4, [], id="nothing-left"),
    ],
)
def test_the_engine_with_fewest_requests_gets_the_next(
    waiting: int, held: list[int], depth: int, engines: list[int]
) -> None:
    assert next_engines(waiting, held, depth) == engines


def test_a_queue_ends_earlier_than_a_fixed_assignment() -> None:
    """Simulated: 4 engines with 8 places each, whose steps take equally long."""
    random = np.random.default_rng(new_seed())
    limits = random.choice([300, 700, 1500], 256)
    lengths = (limits * random.uniform(0.5, 1, 256)).astype(int)

    def steps_of_queue(order: list[int]) -> int:
        waiting, step = list(order), 0
        places: list[list[int]] = [[] for _ in range(4)]  # by engine, the step at which each of its ends
        while waiting or any(places):
            for engine in next_engines(len(waiting), [len(held) for held in places], 8):
                places[engine].append(step + int(lengths[waiting.pop(0)]))
            step = min(end for held in places for end in held)
            places = [[end for end in held if end > step] for held in places]
        return step

    def steps_of_share(engine: int) -> int:
        ends = [0] * 8
        for length in lengths[engine::4]:
            ends[ends.index(min(ends))] += int(length)
        return max(ends)

    queued = steps_of_queue(longest_first([RequestSize(int(limit), 100) for limit in limits]))
    assert queued < max(steps_of_share(engine) for engine in range(4))


@pytest.mark.parametrize(
    "waiting, growing, starts",
    [
        pytest.param(1100, 0, 1024, id="all-places"),
        pytest.param(100, 1024, 0, id="no-room"),
        pytest.param(100, 1024 - ADMITTED + 1, 0, id="room-for-too-few"),
        pytest.param(100, 1024 - ADMITTED, ADMITTED, id="room-for-enough"),
        pytest.param(3, 1021, 3, id="room-for-the-last"),
        pytest.param(3, 1022, 0, id="no-room-for-all-of-the-last"),
        pytest.param(0, 5, 0, id="nothing-left"),
    ],
)
def test_prompts_start_together(waiting: int, growing: int, starts: int) -> None:
    assert admitted(waiting, growing, 1024) == starts


@pytest.mark.parametrize("sequences, together", [(512, 32), (64, 4), (8, 1)])
def test_a_small_engine_does_not_wait_for_as_many_as_it_has_places(sequences: int, together: int) -> None:
    starting = [growing for growing in range(sequences + 1) if admitted(1000, growing, sequences)]
    assert max(starting) == sequences - together
