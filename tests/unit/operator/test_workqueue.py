"""The queue of keys: each once, one flight a key, later on request, slower after failures; and what the probes see of it."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
from distill_operator.health import stuck
from distill_operator.workqueue import BACKOFF_LIMIT_SECONDS, KeyQueue


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def queue(clock: Clock) -> KeyQueue[str]:
    return KeyQueue(clock, jitter=lambda: 1.0)


def run[T](work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)


async def nothing_flies(queue: KeyQueue[str]) -> bool:
    taking = asyncio.create_task(queue.take())
    for _ in range(5):
        await asyncio.sleep(0)
    done = taking.done()
    taking.cancel()
    return not done


def test_a_key_that_is_put_often_flies_once(queue: KeyQueue[str]) -> None:
    async def work() -> None:
        for _ in range(3):
            queue.put("a")
        assert await queue.take() == "a"
        queue.done("a")
        assert await nothing_flies(queue)

    run(work())


def test_a_key_flies_once_at_a_time_and_again_if_it_was_put_meanwhile(queue: KeyQueue[str]) -> None:
    async def work() -> None:
        queue.put("a")
        await queue.take()
        queue.put("a")
        assert await nothing_flies(queue), "it is in flight"
        queue.done("a")
        assert await queue.take() == "a"

    run(work())


def test_the_key_that_has_waited_longest_goes_first(queue: KeyQueue[str], clock: Clock) -> None:
    async def work() -> None:
        queue.put("young")
        queue.put("old", delay=-5)
        assert [await queue.take(), await queue.take()] == ["old", "young"]

    run(work())


def test_several_workers_are_all_woken() -> None:
    async def work() -> None:
        queue: KeyQueue[str] = KeyQueue()
        takers = [asyncio.create_task(queue.take()) for _ in range(3)]
        await asyncio.sleep(0)
        for key in "abc":
            queue.put(key)
        assert set(await asyncio.gather(*takers)) == {"a", "b", "c"}

    run(work())


def test_a_delayed_key_waits_and_an_earlier_wish_wins(queue: KeyQueue[str], clock: Clock) -> None:
    async def work() -> None:
        queue.put("a", delay=60)
        queue.put("a", delay=90)
        assert await nothing_flies(queue)
        clock.now += 60
        assert await queue.take() == "a"
        queue.done("a")
        assert await nothing_flies(queue), "the later wish was the same wish"

    run(work())


def test_failures_back_off_up_to_a_limit_until_a_success(queue: KeyQueue[str], clock: Clock) -> None:
    async def work() -> list[float]:
        delays = []
        queue.put("a")
        for _ in range(10):
            await queue.take()
            delays.append(queue.failed("a"))
            clock.now += delays[-1]
        await queue.take()
        queue.done("a")
        queue.put("a")
        await queue.take()
        return [*delays, queue.failed("a")]

    delays = run(work())
    assert delays[:3] == [0.5, 1.0, 2.0]
    assert delays[9] == BACKOFF_LIMIT_SECONDS
    assert delays[10] == 0.5


def test_another_thread_can_wake_a_worker() -> None:
    async def work() -> str:
        queue: KeyQueue[str] = KeyQueue()
        taking = asyncio.create_task(queue.take())
        await asyncio.sleep(0)
        await asyncio.to_thread(queue.put_from_thread, "a")
        return await taking

    assert run(work()) == "a"


def test_the_oldest_age_sees_waiting_keys_and_long_flights_alike(queue: KeyQueue[str], clock: Clock) -> None:
    async def work() -> None:
        assert queue.oldest_age() == 0
        queue.put("later", delay=1000)
        assert queue.oldest_age() == 0, "it is not due"
        queue.put("now")
        clock.now += 30
        assert queue.oldest_age() == 30
        await queue.take()
        clock.now += 7
        assert queue.oldest_age() == 7, "in flight for so long"

    run(work())


@pytest.mark.parametrize(
    "leading, queue_age, since_answer, problem",
    [
        pytest.param(True, 1, 1, "", id="healthy"),
        pytest.param(True, 301, 1, "a run has been due for 301 s", id="queue stuck"),
        pytest.param(True, 1, 301, "the API server has not answered for 301 s", id="deaf"),
        pytest.param(False, 1, 301, "", id="a standby is healthy"),
    ],
)
def test_probes_turn_red_when_the_operator_is_stuck(
    leading: bool, queue_age: float, since_answer: float, problem: str
) -> None:
    assert stuck(leading, queue_age, since_answer, 300).startswith(problem)
    assert bool(stuck(leading, queue_age, since_answer, 300)) is bool(problem)
