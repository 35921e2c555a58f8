"""Work queue: deduplication, one worker per key, delayed requeue, backoff; and the health probes."""

import asyncio
import random
import secrets
from collections.abc import Coroutine
from typing import Any

import pytest
from distill_operator.health import health_problem
from distill_operator.workqueue import BACKOFF_LIMIT_SECONDS, WorkQueue


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def queue(clock: Clock) -> WorkQueue[str]:
    return WorkQueue(clock, jitter=lambda: 1.0)


def run[T](work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)


async def is_nothing_due(queue: WorkQueue[str]) -> bool:
    waiting_get = asyncio.create_task(queue.get())
    for _ in range(5):
        await asyncio.sleep(0)
    done = waiting_get.done()
    waiting_get.cancel()
    return not done


def test_a_key_put_several_times_is_returned_once(queue: WorkQueue[str]) -> None:
    async def work() -> None:
        for _ in range(3):
            queue.put("a")
        assert await queue.get() == "a"
        queue.done("a")
        assert await is_nothing_due(queue)

    run(work())


def test_a_key_put_while_in_progress_is_returned_again_afterwards(
    queue: WorkQueue[str],
) -> None:
    async def work() -> None:
        queue.put("a")
        await queue.get()
        queue.put("a")
        assert await is_nothing_due(queue), "the key is in progress"
        queue.done("a")
        assert await queue.get() == "a"

    run(work())


def test_the_key_that_has_waited_longest_is_returned_first(queue: WorkQueue[str], clock: Clock) -> None:
    async def work() -> None:
        queue.put("young")
        queue.put("old", delay=-5)
        assert [await queue.get(), await queue.get()] == ["old", "young"]

    run(work())


def test_all_waiting_workers_are_woken() -> None:
    async def work() -> None:
        queue: WorkQueue[str] = WorkQueue()
        workers = [asyncio.create_task(queue.get()) for _ in range(3)]
        await asyncio.sleep(0)
        for key in "abc":
            queue.put(key)
        assert set(await asyncio.gather(*workers)) == {"a", "b", "c"}

    run(work())


def test_a_delayed_key_is_returned_at_the_earliest_requested_time(
    queue: WorkQueue[str], clock: Clock
) -> None:
    async def work() -> None:
        queue.put("a", delay=60)
        queue.put("a", delay=90)
        assert await is_nothing_due(queue)
        clock.now += 60
        assert await queue.get() == "a"
        queue.done("a")
        assert await is_nothing_due(queue), "the later request was dropped"

    run(work())


def test_failures_back_off_up_to_a_limit_and_a_success_resets_them(
    queue: WorkQueue[str], clock: Clock
) -> None:
    async def work() -> list[float]:
        delays = []
        queue.put("a")
        for _ in range(10):
            await queue.get()
            delays.append(queue.failed("a"))
            clock.now += delays[-1]
        await queue.get()
        queue.done("a")
        queue.put("a")
        await queue.get()
        return [*delays, queue.failed("a")]

    delays = run(work())
    assert delays[:3] == [0.5, 1.0, 2.0]
    assert delays[9] == BACKOFF_LIMIT_SECONDS
    assert delays[10] == 0.5


def test_any_sequence_of_requests_returns_the_keys_of_a_plain_search(
    queue: WorkQueue[str], clock: Clock
) -> None:
    """Each step is compared with a search of all keys for the one that has been due longest."""

    async def work() -> None:
        due: dict[str, float] = {}
        in_progress: list[str] = []
        for _ in range(3000):
            clock.now += rng.choice((0, 0, 1, 10))
            key, delay = rng.choice("abcdefgh"), rng.choice((-5, 0, 1, 20))
            queue.put(key, delay)
            due[key] = min(due.get(key, float("inf")), clock.now + delay)
            if in_progress and rng.random() < 0.4:
                key = in_progress.pop(rng.randrange(len(in_progress)))
                if rng.random() < 0.7:
                    queue.done(key)
                else:
                    due[key] = min(due.get(key, float("inf")), clock.now + queue.failed(key))
            ready = {key: when for key, when in due.items() if when <= clock.now and key not in in_progress}
            if not ready:
                assert await is_nothing_due(queue)
                continue
            found = await queue.get()
            assert due[found] == min(ready.values())
            del due[found]
            in_progress.append(found)

    seed = secrets.randbelow(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    run(work())


def test_timers_that_no_longer_hold_take_no_memory(queue: WorkQueue[str], clock: Clock) -> None:
    """A run that is reconciled every few seconds has another timer of half an hour each time."""

    async def work() -> None:
        for _ in range(2000):
            clock.now += 10
            for key in ("a", "b", "c"):
                queue.put(key)
                assert await queue.get() == key
                queue.done(key)
                queue.put(key, 1800)
        assert len(queue._heap) < 200
        clock.now += 1800
        assert sorted([await queue.get() for _ in "abc"]) == ["a", "b", "c"]
        assert await is_nothing_due(queue)

    run(work())


def test_the_oldest_age_is_that_of_keys_due_or_in_progress(queue: WorkQueue[str], clock: Clock) -> None:
    async def work() -> None:
        assert queue.oldest_age() == 0
        queue.put("later", delay=1000)
        assert (queue.oldest_age(), len(queue)) == (0, 0), "the key is not due"
        queue.put("now")
        clock.now += 30
        assert (queue.oldest_age(), len(queue)) == (30, 1)
        await queue.get()
        assert len(queue) == 1
        clock.now += 7
        assert queue.oldest_age() == 7, "the key has been in progress for 7 s"

    run(work())


@pytest.mark.parametrize(
    "leading, queue_age, since_response, problem",
    [
        pytest.param(True, 1, 1, "", id="healthy"),
        pytest.param(True, 301, 1, "a run has been due for 301 s", id="queue stuck"),
        pytest.param(
            True, 1, 301, "the API server has not answered for 301 s", id="API server does not respond"
        ),
        pytest.param(False, 1, 301, "", id="a standby is healthy"),
    ],
)
def test_probes_fail_if_there_is_a_health_problem(
    leading: bool, queue_age: float, since_response: float, problem: str
) -> None:
    assert health_problem(leading, queue_age, since_response, 300).startswith(problem)
    assert bool(health_problem(leading, queue_age, since_response, 300)) is bool(problem)
    assert health_problem(leading, 1, 1, 300, "a watch is silent") == ("a watch is silent" if leading else "")
