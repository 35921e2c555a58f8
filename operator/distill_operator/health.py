"""The operator's own HTTP server: /healthz, /readyz and /metrics. It lives as long as the process, whoever holds the lease.

A standby is healthy: it has nothing to do. A leader is healthy while due runs get looked at and the API server answers.
"""

import time
from collections.abc import Callable

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from distill_operator.metrics import REGISTRY


def stuck(leading: bool, queue_age: float, since_answer: float, limit: float) -> str:
    """What is wrong with the process, empty where nothing is. Seconds, of the oldest due key and of the API server's last answer."""
    if not leading:
        return ""
    if queue_age > limit:
        return f"a run has been due for {queue_age:.0f} s and was not looked at (limit {limit:g} s)"
    if since_answer > limit:
        return f"the API server has not answered for {since_answer:.0f} s (limit {limit:g} s)"
    return ""


async def serve(port: int, diagnose: Callable[[], str], refresh: Callable[[], None]) -> web.AppRunner:
    """Answer probes until the runner is cleaned up. `diagnose` says what is wrong, `refresh` brings gauges up to date.

    OSError where the port is taken.
    """

    async def health(request: web.Request) -> web.Response:
        del request
        problem = diagnose()
        return web.Response(text=(problem or "ok") + "\n", status=503 if problem else 200)

    async def metrics(request: web.Request) -> web.Response:
        del request
        refresh()
        return web.Response(body=generate_latest(REGISTRY), headers={"Content-Type": CONTENT_TYPE_LATEST})

    app = web.Application()
    app.add_routes([web.get("/healthz", health), web.get("/readyz", health), web.get("/metrics", metrics)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, port=port).start()
    return runner


def since(moment: float) -> float:
    """Seconds since a moment of the monotonic clock."""
    return time.monotonic() - moment
