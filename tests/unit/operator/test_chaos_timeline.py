"""The timeline that explains a violation of chaos, and the proxy that keeps the requests for it."""

import asyncio
import json
from typing import Any, cast

import aiohttp
from aiohttp import web
from distill_operator.kube import JOB, POD

from tests.fakes.api_server import ApiServer
from tests.fakes.chaos.history import Change
from tests.fakes.chaos.proxy import ChaosProxy, Fate, FaultPlan
from tests.fakes.chaos.timeline import MOST_BODY, Request, Requests, timelines

JOBS_PATH, JOB_PATH = JOB.path("ns"), JOB.path("ns", "r2-plain-vanilla-a1")
NEW_JOB = {"metadata": {"name": "r2-plain-vanilla-a1"}}
PODS_PATH = POD.path("ns") + "?labelSelector=batch.kubernetes.io/job-name=r2-plain-vanilla-a1"
NOT_FOUND = {
    "kind": "Status",
    "code": 404,
    "message": "not found",
    "details": {"name": "r2-plain-vanilla-a1"},
}
POD_OBJECT = {
    "metadata": {
        "name": "r2-plain-vanilla-a1-x",
        "uid": "0123456789",
        "resourceVersion": "7",
        "deletionTimestamp": "2026-01-01T00:00:00Z",
    },
    "status": {"phase": "Running"},
}
PODS = {"metadata": {"resourceVersion": "9"}, "items": [POD_OBJECT]}
OTHER = {"metadata": {"name": "r22-plain", "uid": "1", "resourceVersion": "8"}}


class Planned(FaultPlan):
    """The fates of the requests, in order."""

    def __init__(self, *fates: Fate) -> None:
        super().__init__("seed", 0.0, 0)
        self.fates = list(fates)

    def fate(self, method: str, path: str) -> Fate:
        return self.fates.pop(0)


class Upstream:
    """Stands for the API server of a ChaosProxy."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self.url, self.session = url, session


async def requests_of(paths: list[str], answers: dict[str, tuple[int, Any]], *fates: Fate) -> Requests:
    """What a proxy keeps of GETs of these paths, and of POSTs of the Job to JOBS_PATH."""

    async def respond(request: web.Request) -> web.Response:
        status, body = answers[request.path]
        return web.json_response(body, status=status)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", respond)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        async with aiohttp.ClientSession(auto_decompress=False) as session:
            api = cast(ApiServer, Upstream(url, session))
            async with ChaosProxy(api, "operator-0", Planned(*fates), lambda: None, []) as proxy:
                for path in paths:
                    try:
                        method, body = ("POST", NEW_JOB) if path == JOBS_PATH else ("GET", None)
                        async with session.request(method, proxy.url + path, json=body) as answer:
                            await answer.read()
                    except aiohttp.ClientError:
                        assert proxy.kept.kept[-1].fate == "cut"
                return proxy.kept
    finally:
        await runner.cleanup()


def test_a_violation_is_explained_by_what_has_changed_and_what_was_requested_meanwhile() -> None:
    answers = {JOB_PATH: (404, NOT_FOUND), POD.path("ns"): (200, PODS)}
    paths = [JOB_PATH, PODS_PATH, JOB_PATH, PODS_PATH, JOBS_PATH]
    requests = asyncio.run(requests_of(paths, answers, "pass", "pass", "half", "500", "cut"))
    assert len(requests.kept) == 5
    last = requests.kept[-1].time
    changes = [
        Change(7, "MODIFIED", "Pod", POD_OBJECT, last + 1),
        Change(8, "ADDED", "DistillRun", OTHER, last),
    ]
    found = list(
        timelines(["at 7 pods of r2-plain-vanilla-a1 …"], ["r2-plain", "r22-plain"], changes, requests.kept)
    )
    pod = "r2-plain-vanilla-a1-x (uid 01234567, version 7, deleted 2026-01-01T00:00:00Z, Running)"
    assert [line[9:] for line in found[1:]] == [
        f"operator-0 GET {JOB_PATH}: 404 not found",
        f"operator-0 GET {PODS_PATH}: 200 at 9: {pod}",
        f"operator-0 GET {JOB_PATH}: [half] 404 not found",
        f"operator-0 GET {PODS_PATH}: [500] 500",
        f"operator-0 POST {JOB_PATH}: [cut] no answer",
        f"7 MODIFIED Pod {pod}",
    ]
    assert found[0] == "timeline of r2-plain"


def test_nothing_is_explained_if_no_violation_names_a_run() -> None:
    assert list(timelines([], ["r2-plain"], [Change(7, "MODIFIED", "Pod", POD_OBJECT)], [])) == []


def test_lists_of_everything_are_kept_without_their_content() -> None:
    items = [{**POD_OBJECT, "spec": "x" * MOST_BODY}]
    answers = {POD.path("ns"): (200, {"metadata": {}, "items": items})}
    (read,) = asyncio.run(requests_of([POD.path("ns")], answers, "pass")).kept
    assert (read.status, read.body) == (200, b"")


def test_the_oldest_requests_are_dropped_when_there_are_too_many_bytes() -> None:
    requests = Requests(most_bytes=100)
    for number in range(50):
        requests.add(
            Request(
                number, "operator-0", "GET", "/path", "pass", 200, json.dumps("x" * (number % 20)).encode()
            )
        )
    assert requests.bytes == sum(len(read.body) + len(read.path) for read in requests.kept) <= 100
    assert [read.time for read in requests.kept] == list(range(50 - len(requests.kept), 50))
    assert len(requests.kept) > 3
