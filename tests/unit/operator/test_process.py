"""The operator's process: whatever happens to its lease, it does not lead without it."""

import asyncio
import json
from typing import Any

import pytest
from distill_operator import __main__ as process
from distill_operator import health
from distill_operator.kube import Conflict, KubeError
from distill_operator.leader_election import LeaseLost
from distill_operator.watch import Watches

from tests.fakes.fake_api import FakeApi
from tests.fakes.simulated_cluster import SETTINGS

ERRORS: list[Exception] = [
    KubeError("GET lease: 503", 503),
    Conflict("conflict", 409),
    LeaseLost("lost"),
    json.JSONDecodeError("cut off", "{", 1),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    AttributeError("'str' object has no attribute 'get'"),
    KeyError("metadata"),
    TimeoutError(),
    OSError(24, "Too many open files"),
    MemoryError(),
    RecursionError(),
    ExceptionGroup("several", [ValueError("one")]),
]


class Ended(Exception):
    """The process has ended."""


class Runner:
    async def cleanup(self) -> None:
        """Nothing is served."""


@pytest.fixture
def operator(monkeypatch: pytest.MonkeyPatch) -> process.Operator:
    """An operator that serves nothing, and raises Ended with its exit code where it would end."""

    async def serve(*_: Any) -> Runner:
        return Runner()

    def exit_now(code: int) -> None:
        raise Ended(code)

    monkeypatch.setattr(health, "serve", serve)
    monkeypatch.setattr(process, "exit_now", exit_now)
    return process.Operator(FakeApi().client(), SETTINGS, "vpmoe-system", "me")


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_process_that_fails_to_acquire_the_lease_in_any_way_ends_and_does_not_lead(
    operator: process.Operator, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    led = []

    async def acquire() -> None:
        raise error

    async def lead(*_: Any) -> int:
        led.append(1)
        return 0

    monkeypatch.setattr(operator._lease, "acquire", acquire)
    monkeypatch.setattr(operator, "_lead", lead)
    with pytest.raises(Ended, match="70"):
        asyncio.run(operator.run())
    assert led == []


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_leader_that_fails_to_hold_the_lease_in_any_way_ends(
    operator: process.Operator, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    async def acquire() -> None:
        """It leads."""

    async def hold() -> None:
        raise error

    monkeypatch.setattr(operator._lease, "acquire", acquire)
    monkeypatch.setattr(operator._lease, "hold", hold)
    monkeypatch.setattr(Watches, "tasks", lambda watches: ())
    with pytest.raises(Ended, match="70"):
        asyncio.run(operator.run())
