"""One batch of chaos: scripted runs through operators that are killed again and again.

Everything follows from the seed, except the order in which the requests of different runs are made.
"""

import asyncio
import contextlib
import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill_operator.kube import DISTILLRUN, JOB, POD, Kind

from tests.fakes.api_server import ApiServer
from tests.fakes.chaos.history import Recorder
from tests.fakes.chaos.invariants import History, Write, controller, violations
from tests.fakes.chaos.proxy import ChaosProxy, FaultPlan
from tests.fakes.chaos.runs import Script, scripts, wrong_ends
from tests.fakes.chaos.timeline import Requests, timelines
from tests.fakes.chaos.warm_operator import WarmOperator
from vpmoe.api import labels
from vpmoe.process.launcher import free_port

CLOCK_STEPS = (-86400, -3600, -30, 0, 0, 1, 30, 3600, 86400)
"""Seconds by which a replica's wall clock may be wrong."""
MOST_CLOCK_STEPS = 20
LEASE_SECONDS = 6
DELETE = {"delete child": "Foreground", "delete child, not its pods": "Background"}


@dataclass(frozen=True)
class Batch:
    """What a batch is made of."""

    seed: int
    runs: int = 40
    replicas: int = 1
    capacity: int = 16
    """GPUs of all nodes."""
    kills: int = 40
    """At most, of all replicas."""
    fault_rate: float = 0.06
    """Share of the requests that fail."""
    seconds: int = 400
    """The batch is given up then."""


@dataclass
class Outcome:
    """What came of a batch."""

    violations: list[str]
    faults: Counter[str]
    killed_at: Counter[str]
    """How often an operator was killed at each kind of write."""
    requests: Counter[str]
    changes: int
    seconds: float
    history: History
    timelines: list[str]
    """Lines about the runs that have violations: what has changed, and what the replicas have requested."""


@dataclass
class _Chaos:
    """A batch that runs."""

    batch: Batch
    api: ApiServer
    namespace: str
    recorder: Recorder
    scripts: list[Script]
    acted: Counter[str] = field(default_factory=Counter)
    """Acts that were done, by run."""
    by_hand: set[str] = field(default_factory=set)
    """Uids of what was deleted by hand."""
    stopping: bool = False

    async def create_runs(self) -> None:
        rng = random.Random(f"arrivals {self.batch.seed}")
        for script in self.scripts:
            code, answer = await self.api.call(
                "POST", DISTILLRUN.path(self.namespace), script.manifest(self.namespace)
            )
            assert code == 201, answer
            await asyncio.sleep(rng.choice((0, 0, 0, 0.1)))

    def unfinished(self) -> list[str]:
        """Runs that have not come to their end."""
        runs = {run["metadata"]["name"]: run for run in self.recorder.objects(DISTILLRUN)}
        return [
            script.name
            for script in self.scripts
            if self.acted[script.name] < len(script.acts)
            or (script.name in runs and script.phase == "Deleted")
            or (script.name in runs and _phase(runs[script.name]) != script.phase)
        ]

    async def act(self) -> None:
        """Do what users do, until the end: what the scripts say, and edits of metadata at any time."""
        rng = random.Random(f"edits {self.batch.seed}")
        while True:
            runs = sorted(run["metadata"]["name"] for run in self.recorder.objects(DISTILLRUN))
            if runs and rng.random() < 0.3:
                note = {"metadata": {"annotations": {"note": f"{rng.random()}"}}}
                await self._patch(rng.choice(runs), note)
            for script in self.scripts:
                if self.acted[script.name] < len(script.acts) and await self._act(script):
                    self.acted[script.name] += 1
            await asyncio.sleep(0.1)

    async def _act(self, script: Script) -> bool:
        """Do the next act of a script, if it is time. Returns whether it was done."""
        act, step, attempt = script.acts[self.acted[script.name]]
        run = self.recorder.object(DISTILLRUN, script.name)
        if run is None:
            return False
        status = {found["name"]: found for found in run.get("status", {}).get("steps", [])}.get(step, {})
        child = self.recorder.object(JOB, f"{script.name}-{step}-a{attempt}")
        pods = [
            pod
            for pod in self.recorder.objects(POD)
            if child is not None and controller(pod) == child["metadata"]["uid"]
        ]
        runs = any(pod.get("status", {}).get("phase") == "Running" for pod in pods)
        match act:
            case "suspend" | "delete run" | "delete child" | "delete child, not its pods" if not runs:
                return False
            case "delete pod" | "evict pod" if not runs:
                return False
            case "resume" if _phase(run) != "Suspended":
                return False
            case "raise attempts" | "raise interruptions" if _phase(run) != "Failed":
                return False
        match act:
            case "suspend" | "resume":
                return await self._patch(script.name, {"spec": {"suspend": act == "suspend"}})
            case "raise attempts":
                return await self._patch(script.name, {"spec": {"runtime": {"attempts": 10}}})
            case "raise interruptions":
                return await self._patch(script.name, {"spec": {"runtime": {"interruptions": 50}}})
            case "delete run":
                return await self._delete(DISTILLRUN, run, "Background")
            case "delete child" | "delete child, not its pods":
                assert child is not None
                return bool(status) and await self._delete(JOB, child, DELETE[act])
            case "delete pod":
                return await self._delete(POD, pods[0], "Background")
            case "evict pod":
                return await self._evict(pods[0])
        raise AssertionError(act)

    async def _patch(self, name: str, change: dict[str, Any]) -> bool:
        path = DISTILLRUN.path(self.namespace, name)
        code, answer = await self.api.call("PATCH", path, change, "application/merge-patch+json")
        assert code in (200, 404), answer
        return True

    async def _delete(self, kind: Kind, obj: dict[str, Any], propagation: str) -> bool:
        meta = obj["metadata"]
        self.by_hand.add(meta["uid"])
        options = {"propagationPolicy": propagation, "preconditions": {"uid": meta["uid"]}}
        code, answer = await self.api.call("DELETE", kind.path(self.namespace, meta["name"]), options)
        assert code in (200, 202), answer
        return True

    async def _evict(self, pod: dict[str, Any]) -> bool:
        name = pod["metadata"]["name"]
        eviction = {
            "apiVersion": "policy/v1",
            "kind": "Eviction",
            "metadata": {"name": name, "namespace": self.namespace},
        }
        self.by_hand.add(pod["metadata"]["uid"])
        path = POD.path(self.namespace, name, "eviction")
        code, answer = await self.api.call("POST", path, eviction)
        assert code == 201, answer
        return True

    async def keep_running(self, operator: WarmOperator, plan: FaultPlan, number: int) -> None:
        """Start a replica whenever it has ended, as a kubelet does, sometimes with a pause."""
        rng = random.Random(f"restarts {self.batch.seed} {number}")
        while True:
            plan.restarted()
            await operator.start()
            await operator.ended.wait()
            long_pause = self.batch.replicas > 1 and rng.random() < 0.3
            await asyncio.sleep(1.5 * LEASE_SECONDS if long_pause else rng.choice((0, 0, 0.3)))

    async def step_clock(self, operator: WarmOperator, plan: FaultPlan, number: int) -> None:
        """Set the wall clock of a replica again and again while it is killed, then once later than ever, so
        that what waits for a time ends."""
        rng = random.Random(f"clock {self.batch.seed} {number}")
        for _ in range(MOST_CLOCK_STEPS):
            if not plan.kills:
                break
            operator.set_clock(rng.choice(CLOCK_STEPS))
            await asyncio.sleep(rng.uniform(0.5, 3))
        operator.set_clock(2 * max(CLOCK_STEPS))


async def run(batch: Batch, kubeconfig: Path, namespace: str, folder: Path) -> Outcome:
    """Run a batch in a namespace that is empty."""
    started = time.monotonic()
    async with contextlib.AsyncExitStack() as stack:
        api = await stack.enter_async_context(ApiServer(kubeconfig))
        recorder = await stack.enter_async_context(Recorder(api, namespace))
        chaos = _Chaos(batch, api, namespace, recorder, scripts(batch.seed, batch.runs))
        operators, proxies, tasks = [], [], []
        writes: list[Write] = []
        kept = Requests()
        for number in range(batch.replicas):
            identity = f"operator-{number}"
            plan = FaultPlan(f"{batch.seed} {identity}", batch.fault_rate, batch.kills // batch.replicas)
            kill = lambda number=number: operators[number].kill()  # noqa: E731
            proxy = ChaosProxy(api, identity, plan, kill, writes, kept)
            await stack.enter_async_context(proxy)
            operator = WarmOperator(folder, identity, _settings(namespace), _kubeconfig(proxy.url), namespace)
            operators.append(await stack.enter_async_context(operator))
            proxies.append(proxy)
            tasks += [
                asyncio.create_task(chaos.keep_running(operator, plan, number)),
                asyncio.create_task(chaos.step_clock(operator, plan, number)),
            ]
        tasks.append(asyncio.create_task(chaos.act()))
        await chaos.create_runs()
        late: list[str] = []
        while left := chaos.unfinished():
            recorder.check()
            for task in tasks:
                if task.done():
                    task.result()
            if time.monotonic() - started > batch.seconds:
                late = [_describe(recorder, name) for name in left]
                break
            await asyncio.sleep(0.2)
        await asyncio.sleep(1)  # time for a mistake after the end
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for operator in operators:
            operator.kill()
        await asyncio.sleep(1)  # for the late writes
        await recorder.catch_up()
        history = History(recorder.changes(), batch.capacity, writes, chaos.by_hand)
        runs = {run["metadata"]["name"]: run for run in recorder.objects(DISTILLRUN)}
    found = [
        *(f"not within {batch.seconds:g} s: {one}" for one in late),
        *([] if late else wrong_ends(chaos.scripts, runs)),
        *violations(history),
        *(f"{operator.identity}: {line}" for operator in operators for line in _errors(operator)),
    ]
    return Outcome(
        found,
        sum((proxy.faults for proxy in proxies), Counter()),
        sum((proxy.plan.killed_at for proxy in proxies), Counter()),
        sum((proxy.requests for proxy in proxies), Counter()),
        len(history.changes),
        time.monotonic() - started,
        history,
        list(timelines(found, (script.name for script in chaos.scripts), history.changes, kept.kept)),
    )


def _settings(namespace: str) -> dict[str, Any]:
    return {
        "images": {"trainer": "vpmoe/trainer:1", "inference": "vpmoe/inference:1"},
        "watchNamespaces": [namespace],
        "port": free_port(),
        "lease": {"name": "distill-operator", "seconds": LEASE_SECONDS},
        "resyncSeconds": 4,
        "pollSeconds": 2,
        "progressSeconds": 10,
        "backoff": {"baseSeconds": 0.5, "limitSeconds": 2},
    }


def _kubeconfig(url: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "proxy",
        "clusters": [{"name": "proxy", "cluster": {"server": url}}],
        "users": [{"name": "proxy", "user": {"token": "none"}}],
        "contexts": [{"name": "proxy", "context": {"cluster": "proxy", "user": "proxy"}}],
    }


def _phase(run: dict[str, Any]) -> str:
    return str(run.get("status", {}).get("phase", ""))


def _describe(recorder: Recorder, name: str) -> str:
    run = recorder.object(DISTILLRUN, name) or {}
    status = run.get("status", {})
    steps = {step["name"]: (step["state"], step.get("attempt", 0)) for step in status.get("steps", [])}
    children = [
        (job["metadata"]["name"], [c["type"] for c in job.get("status", {}).get("conditions", [])])
        for job in recorder.objects(JOB)
        if job["metadata"].get("labels", {}).get(labels.RUN) == name
    ]
    return json.dumps([name, status.get("phase"), status.get("message"), steps, children])


def _errors(operator: WarmOperator) -> Iterator[str]:
    """What a replica has logged as its own fault, and the ways in which it must not have ended."""
    if strange := {code for code in operator.exits if code not in (-9, 0, 70)}:
        yield f"exit codes {sorted(strange)}"
    for line in operator.log.read_text().splitlines():
        if " ERROR " in line or (" CRITICAL " in line and "lease" not in line):
            yield line
