"""The operator's HTTP server: /healthz, /readyz and /metrics.

It runs as long as the process, with or without the lease.

A standby is healthy. A leader is healthy while due runs are reconciled, and the API server answers it and
each of its watches. It is ready if it is healthy and a watch of DistillRuns works.
"""

import time
from collections.abc import Callable

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from distill_operator.metrics import REGISTRY


def health_problem(
    leading: bool, queue_age: float, since_answer: float, limit: float, watch_problem: str = ""
) -> str:
    """What is wrong with the process; empty if it is healthy.

    `queue_age`: seconds that the oldest due run has waited. `since_answer`: seconds since the API server's
    last answer. `watch_problem`: what is wrong with the watches.
    """
    if not leading:
        return ""
    if queue_age > limit:
        return f"a run has been due for {queue_age:.0f} s and was not reconciled (limit {limit:g} s)"
    if since_answer > limit:
        return f"the API server has not answered for {since_answer:.0f} s (limit {limit:g} s)"
    return watch_problem


async def serve(
    port: int,
    find_health_problem: Callable[[], str],
    find_readiness_problem: Callable[[], str],
    refresh_gauges: Callable[[], None],
) -> web.AppRunner:
    """Serve until the returned runner is cleaned up. Raises OSError if the port is taken."""

    async def health(request: web.Request) -> web.Response:
        del request
        return _probe(find_health_problem())

    async def readiness(request: web.Request) -> web.Response:
        del request
        return _probe(find_health_problem() or find_readiness_problem())

    async def metrics(request: web.Request) -> web.Response:
        del request
        refresh_gauges()
        return web.Response(body=generate_latest(REGISTRY), headers={"Content-Type": CONTENT_TYPE_LATEST})

    app = web.Application()
    app.add_routes([web.get("/healthz", health), web.get("/readyz", readiness), web.get("/metrics", metrics)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, port=port).start()
    return runner


def _probe(problem: str) -> web.Response:
    return web.Response(text=(problem or "ok") + "\n", status=503 if problem else 200)


def seconds_since(moment: float) -> float:
    """Seconds since a time of the monotonic clock."""
    return time.monotonic() - moment
