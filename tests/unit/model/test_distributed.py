"""How ranks meet: all begin or none does, whoever is asked to stop while they wait."""

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from tests.fakes.students import new_seed
from vpmoe.failure import Retriable, Terminated
from vpmoe.model import distributed
from vpmoe.process.launcher import free_port

PATIENCE = timedelta(seconds=20)


def stop_at(moment: float) -> Callable[[], None]:
    """A check_stop of a process that is asked to stop at that time of the monotonic clock."""

    def check_stop() -> None:
        if time.monotonic() >= moment:
            raise Terminated("asked to stop")

    return check_stop


def never() -> None:
    """A check_stop of a process that is not asked to stop."""


def outcome(
    store: Store, member: str, members: list[str], delay: float, check_stop: Callable[[], None]
) -> str:
    """What becomes of a member that joins after `delay` seconds."""
    time.sleep(delay)
    try:
        check_stop()
        store.set(member, "")
        distributed.agree_to_start(store, members, check_stop, PATIENCE)
    except Terminated:
        return "stopped"
    return "started"


@pytest.fixture
def port() -> int:
    return free_port()


def test_ranks_begin_when_all_have_joined(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    with ThreadPoolExecutor() as ranks:
        stores = list(ranks.map(lambda rank: distributed.meet(rank, 3, never), range(3)))
    stores[2].set("x", "y")
    assert stores[0].get("x") == b"y"


def test_either_all_begin_or_none_whenever_they_are_asked_to_stop(port: int) -> None:
    """All processes of a stage are asked to stop, but not at the same moment, and some have not joined."""
    rng = random.Random(new_seed())
    server = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=PATIENCE)
    found = set()
    for trial in range(30):
        server.delete_key("decision")
        members = [f"{trial} member {number}" for number in range(3)]
        clients = [TCPStore("127.0.0.1", port, timeout=PATIENCE, wait_for_workers=False) for _ in members]
        now = time.monotonic()
        with ThreadPoolExecutor() as threads:
            started = [
                threads.submit(
                    outcome,
                    client,
                    member,
                    members,
                    rng.uniform(0, 0.2),
                    stop_at(now + rng.uniform(0.1, 0.4)),
                )
                for client, member in zip(clients, members, strict=True)
            ]
        results = {future.result() for future in started}
        assert len(results) == 1, trial
        found |= results
    assert found == {"started", "stopped"}


def test_a_rank_that_does_not_join_is_named(port: int) -> None:
    server = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=PATIENCE)
    server.set("joined 0", "")
    with pytest.raises(Retriable, match=r"waited 0:00:00\.300000 for: joined 1"):
        distributed.agree_to_start(server, ["joined 0", "joined 1"], never, timedelta(seconds=0.3))


def test_a_rank_whose_rank_0_ends_is_retried(port: int) -> None:
    servers = [TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=PATIENCE)]
    client = TCPStore("127.0.0.1", port, timeout=PATIENCE, wait_for_workers=False)
    threading.Timer(0.3, servers.clear).start()
    with pytest.raises(Retriable, match="a process ended before all had joined"):
        distributed.agree_to_start(client, ["joined 0"], never, PATIENCE)
