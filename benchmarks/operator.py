"""Time, requests and memory that the operator needs for many runs at once, on a real control plane.

    PYTHONPATH=operator python -m benchmarks.operator [--runs 1000] [--seconds 20] [--rate 100]
            [--idle 120] [--silent 100] [--phases floor complete idle silent]

etcd, API server, controller manager and scheduler are the real programs, on this machine. A hollow node plays
the pods: they get addresses, serve progress, and end after --seconds. The operator is a process with the
chart's service account and, but for a longer lease, its settings. Each run has five Jobs, two of them side by
side.

floor: the same Jobs in the same order, created by a client that waits only for the Jobs before: what the
control plane and the pods take without an operator. complete: the operator does it, until all runs have
Succeeded. Latency is the time between two events that this process sees: that of a Job whose pods run, or
which is complete, and the first of the DistillRun whose status says so. Where the cores are busy it is mostly
the time for which every program waits for one; with a lower --rate it is that of the operator. idle: requests
and memory while each run has two pods that run and nothing changes. silent: as complete, beside --silent more
runs whose pods accept connections and never answer. Latency is that of the others.

Peer: KubeRay publishes the results of 1,000 RayJobs (ray-project/kuberay,
benchmark/perf-tests/1000-rayjob/results/junit.xml): 917 s until all are complete. They were created at 100 a
second too, but their pods were real, did work, and ran on a cloud's cluster.
"""

import argparse
import asyncio
import contextlib
import copy
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from distill_operator.kube import DISTILLRUN, JOB
from distill_operator.observe import child_state

from devcluster import binaries
from tests.fakes import chart
from tests.fakes.api_server import ApiServer
from tests.fakes.control_plane import (
    CONTROLLER_FLAGS,
    ROOT,
    SCHEDULER_FLAGS,
    ControlPlane,
    cpu_seconds,
    end_with_parent,
    peak_mib,
)
from tests.fakes.hollow_node import SCRIPT_VARIABLE
from vpmoe.api import DistillRun, labels
from vpmoe.process.launcher import free_port

Json = dict[str, Any]

PHASES = ("floor", "complete", "idle", "silent")
NAMESPACE, RUNS_NAMESPACE = "vpmoe-system", "runs"
ACCOUNT = f"system:serviceaccount:{NAMESPACE}:distill-operator"
AUDITS = [{"level": "Metadata", "users": [ACCOUNT]}]
STAGES = (("vanilla", "Vanilla"), ("longer", "Vanilla"), ("rescored", "Rescored"))
CREATIONS = 16
"""Objects that this process creates at once."""
LEASE_SECONDS = 60
"""Of the operator's Lease. With the chart's 12 s the operator ends if the API server does not answer for 8 s,
as it may where all programs share two cores."""
SETTLE_SECONDS = 30
"""Seconds without a change of any run before idle requests are counted."""
STUCK_SECONDS = 300
"""The benchmark fails if nothing changes for so long."""
KUBERAY = "KubeRay, 1,000 RayJobs with real pods: 917 s"


def manifest(name: str, script: str) -> Json:
    """A run with five Jobs, each of one pod that follows the script of a hollow node."""
    stages = [{"name": stage, "kind": kind, "tokens": 6000} for stage, kind in STAGES]
    return {
        "apiVersion": DISTILLRUN.api_version,
        "kind": DISTILLRUN.name,
        "metadata": {"name": name, "namespace": RUNS_NAMESPACE},
        "spec": {
            "dataset": {"source": "s3://hollow/none", "maxLength": 512, "workers": 1},
            "teacher": {"model": "s3://hollow/none", "gpus": 1},
            "student": {"shape": "tiny", "gpus": 1},
            "training": {"sequenceLength": 512, "globalBatchTokens": 4096},
            "stages": stages,
            "evaluation": {"completions": 0},
            "export": {"stages": []},
            "storage": {"endpoint": "http://hollow", "bucket": "hollow"},
            "runtime": {"backend": "Job", "env": [{"name": SCRIPT_VARIABLE, "value": script}]},
        },
    }


RUN = DistillRun.parse(manifest("run", ""))
STEPS = RUN.steps()


@dataclass
class Observer:
    """When this process saw what, in monotonic seconds. Keys are a run's name and a step."""

    running: dict[tuple[str, str], float] = field(default_factory=dict)
    """The Job's pods run."""
    complete: dict[tuple[str, str], float] = field(default_factory=dict)
    running_told: dict[tuple[str, str], float] = field(default_factory=dict)
    """The run's status says so."""
    complete_told: dict[tuple[str, str], float] = field(default_factory=dict)
    finished: dict[str, str] = field(default_factory=dict)
    """Phase of each run that has ended."""
    template: dict[str, Json] = field(default_factory=dict)
    """A Job of each step."""
    on_complete: Callable[[str, str], object] = lambda run, step: None
    changed: float = field(default_factory=time.monotonic)
    last_run_event: float = field(default_factory=time.monotonic)
    run_events: int = 0

    def job(self, event: str, obj: Json) -> None:
        del event
        own = obj["metadata"]["labels"]
        key = own[labels.RUN], own[labels.STEP]
        self.template.setdefault(key[1], obj)
        state, _ = child_state(obj)
        now = time.monotonic()
        if state == "Running" and key not in self.running:
            self.running[key] = self.changed = now
        if state == "Succeeded" and key not in self.complete:
            self.complete[key] = self.changed = now
            self.on_complete(*key)

    def run(self, event: str, obj: Json) -> None:
        del event
        name, status = obj["metadata"]["name"], obj.get("status", {})
        self.last_run_event = now = time.monotonic()
        self.run_events += 1
        for step in status.get("steps", []):
            key = name, step["name"]
            done = step["state"] == "Succeeded"
            if (done or step.get("reason") == "Running") and key not in self.running_told:
                self.running_told[key] = now
            if done and key not in self.complete_told:
                self.complete_told[key] = self.changed = now
        if status.get("phase") in ("Succeeded", "Failed"):
            self.finished[name] = status["phase"]

    @contextlib.asynccontextmanager
    async def watching(self, api: ApiServer) -> AsyncIterator[None]:
        """Watch until the end of the context."""

        def each(change: Callable[[str, Json], None]) -> Callable[[list[Json]], None]:
            def change_all(objects: list[Json]) -> None:
                for obj in objects:
                    change("ADDED", obj)

            return change_all

        jobs, runs = JOB.path(RUNS_NAMESPACE, ""), DISTILLRUN.path(RUNS_NAMESPACE, "")
        tasks = [
            asyncio.create_task(api.list_and_watch(jobs, each(self.job), self.job, labelSelector=labels.RUN)),
            asyncio.create_task(api.list_and_watch(runs, each(self.run), self.run)),
        ]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


@dataclass
class Stand:
    """Control plane, hollow node and operator."""

    plane: ControlPlane
    node: subprocess.Popen[bytes]
    operator: subprocess.Popen[bytes] | None = None

    @classmethod
    @contextlib.contextmanager
    def up(cls, phase: str) -> "Iterator[Stand]":
        folder = Path(tempfile.mkdtemp(prefix=f"operator-{phase}-"))
        with ControlPlane(folder, audits=AUDITS) as plane:
            for namespace in (NAMESPACE, RUNS_NAMESPACE):
                plane.create_namespace(namespace)
            stand = cls(
                plane,
                _spawn(folder / "node.log", "tests.fakes.hollow_node", "--kubeconfig", str(plane.kubeconfig)),
            )
            try:
                yield stand
                stand.check()
            finally:
                stand.stop_operator()
                stand.node.kill()
                stand.node.wait()
        shutil.rmtree(folder)

    def start_operator(self) -> None:
        """Start the operator with the chart's roles and, but for port and lease, its settings."""
        folder = self.plane.folder
        objects = chart.Chart(binaries.path("helm")).render(namespace=NAMESPACE)
        roles = [obj for obj in objects if obj["kind"] not in ("Deployment", "ConfigMap")]
        self.plane.kubectl("apply", "--filename", "-", input=yaml.safe_dump_all(roles))
        token = self.plane.kubectl(
            "create", "token", "distill-operator", "--namespace", NAMESPACE, "--duration=8h"
        )
        kubeconfig = self.plane.write_kubeconfig(folder / "operator.kubeconfig", {"token": token.strip()})
        settings: Json = {**chart.settings(objects), "port": free_port()}
        settings["lease"]["seconds"] = LEASE_SECONDS
        (folder / "operator.yaml").write_text(yaml.safe_dump(settings))
        place = (
            "--config",
            str(folder / "operator.yaml"),
            "--namespace",
            NAMESPACE,
            "--identity",
            "benchmark",
        )
        self.operator = _spawn(
            folder / "operator.log", "distill_operator", *place, KUBECONFIG=str(kubeconfig)
        )

    def stop_operator(self) -> None:
        if self.operator is not None:
            self.operator.kill()
            self.operator.wait()

    def check(self) -> None:
        """Raise RuntimeError if a process has ended."""
        self.plane.check()
        for name, process in (("node", self.node), ("operator", self.operator)):
            if process is not None and process.poll() is not None:
                raise RuntimeError(f"the {name} has ended: see {self.plane.folder}/{name}.log")

    def usage(self) -> dict[str, float]:
        """CPU seconds of all processes so far."""
        own = {"node": self.node, **({"operator": self.operator} if self.operator else {})}
        return {
            **self.plane.usage(),
            **{name: cpu_seconds(process.pid) for name, process in own.items()},
            "this": time.process_time(),
        }

    def requests(self, skipped: int = 0) -> tuple[Counter[str], int]:
        """The operator's requests by verb and resource, after `skipped` bytes of the log; and its size."""
        found = Counter[str]()
        with self.plane.audit_log.open("rb") as log:
            log.seek(skipped)
            for line in log:
                if not line.endswith(b"\n"):
                    break
                skipped += len(line)
                record = json.loads(line)
                if record["stage"] == "ResponseComplete" and record["user"]["username"] == ACCOUNT:
                    about = record.get("objectRef", {})
                    parts = (about.get("resource", "discovery"), about.get("subresource"))
                    found[f"{record['verb']} {'/'.join(filter(None, parts))}"] += 1
        return found, skipped


def _spawn(log: Path, module: str, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": ".:operator", **environment},
            stdout=file,
            stderr=file,
            preexec_fn=end_with_parent,
        )


async def create_one(api: ApiServer, path: str, obj: Json) -> None:
    """Create the object. Raises RuntimeError if the API server rejects it."""
    code, answer = await api.call("POST", path, obj)
    if code != 201:
        raise RuntimeError(f"{path}: {code} {answer.get('message', '')}")


async def create(api: ApiServer, path: str, objects: Iterator[Json], rate: float) -> None:
    """Create the objects, at most `rate` a second."""
    slots, started = asyncio.Semaphore(CREATIONS), time.monotonic()

    async def one(obj: Json) -> None:
        async with slots:
            await create_one(api, path, obj)

    async with asyncio.TaskGroup() as group:
        for number, obj in enumerate(objects):
            await asyncio.sleep(started + number / rate - time.monotonic())
            group.create_task(one(obj))


async def until(true: Callable[[], bool], stand: Stand, observer: Observer) -> None:
    """Wait. Raises RuntimeError if a process has ended or nothing happens any more."""
    observer.changed = time.monotonic()
    while not true():
        await asyncio.sleep(0.1)
        stand.check()
        if time.monotonic() - observer.changed > STUCK_SECONDS:
            raise RuntimeError(f"nothing has changed for {STUCK_SECONDS} s (logs: {stand.plane.folder})")


async def measure_floor(runs: int, seconds: float, rate: float) -> None:
    """The Jobs of all runs, without the operator."""
    with Stand.up("floor") as stand:
        templates = await jobs_of_a_run(stand)
        api, observer = ApiServer(stand.plane.kubeconfig), Observer()
        path = JOB.path(RUNS_NAMESPACE, "")
        waiting = {f"run-{number}": set(STEPS[1:]) for number in range(runs)}
        tasks = set[asyncio.Task[Any]]()

        def job(run: str, step: str) -> Json:
            made = copy.deepcopy(templates[step])
            own = {labels.RUN: run}
            made["metadata"] = {"name": f"{run}-{step}-a1", "labels": {**made["metadata"]["labels"], **own}}
            made["spec"]["template"]["metadata"]["labels"].update(own)
            variables = made["spec"]["template"]["spec"]["containers"][0]["env"]
            next(one for one in variables if one["name"] == SCRIPT_VARIABLE)["value"] = f"seconds={seconds}"
            return made

        def start_next(run: str, step: str) -> None:
            ready = {
                name
                for name in waiting.get(run, ())
                if all((run, needed) in observer.complete for needed in RUN.needs(name))
            }
            waiting.get(run, set()).difference_update(ready)
            tasks.update(asyncio.create_task(create_one(api, path, job(run, name))) for name in ready)

        def all_complete() -> bool:
            for task in [task for task in tasks if task.done()]:
                tasks.remove(task)
                task.result()  # raises what has kept it from creating a Job
            return len(observer.complete) >= runs * len(STEPS)

        observer.on_complete = start_next
        before, started = stand.usage(), time.monotonic()
        async with observer.watching(api):
            await create(api, path, (job(run, STEPS[0]) for run in waiting), rate)
            await until(all_complete, stand, observer)
        print(f"floor: {runs * len(STEPS)} Jobs without the operator: {time.monotonic() - started:.0f} s")
        report_cpu(before, stand.usage())
        await api.close()


async def jobs_of_a_run(stand: Stand) -> dict[str, Json]:
    """A Job of each step as the operator creates it, without what the API server has added. The operator and
    its run are gone afterwards."""
    api, observer = ApiServer(stand.plane.kubeconfig), Observer()
    stand.start_operator()
    async with observer.watching(api):
        await create(api, DISTILLRUN.path(RUNS_NAMESPACE, ""), iter([manifest("sample", "seconds=0")]), 1)
        await until(lambda: bool(observer.finished), stand, observer)
    stand.stop_operator()
    stand.operator = None
    stand.plane.kubectl(
        "delete", "distillruns,jobs", "--all", "--namespace", RUNS_NAMESPACE, "--cascade=foreground"
    )
    await api.close()
    for obj in observer.template.values():
        obj.pop("status", None)
        obj["spec"].pop("selector")
        template = obj["spec"]["template"]["metadata"]
        template["labels"] = {k: v for k, v in template["labels"].items() if k.startswith("vpmoe.dev/")}
    return observer.template


async def measure_completion(runs: int, seconds: float, rate: float, silent: int = 0) -> None:
    """Runs until all have succeeded; `silent` more never answer when they are asked for progress."""
    with Stand.up("silent" if silent else "complete") as stand:
        stand.start_operator()
        api, observer = ApiServer(stand.plane.kubeconfig), Observer()
        await until(lambda: _leads(stand), stand, observer)
        _, skipped = stand.requests()
        before, started = stand.usage(), time.monotonic()
        hung = (manifest(f"silent-{n}", "seconds=inf progress=silent") for n in range(silent))
        own = (manifest(f"run-{n}", f"seconds={seconds}") for n in range(runs))
        path = DISTILLRUN.path(RUNS_NAMESPACE, "")
        async with observer.watching(api):
            await create(api, path, hung, rate)
            if silent:
                await until(lambda: len(observer.running_told) >= silent, stand, observer)
                started = time.monotonic()
            await create(api, path, own, rate)
            await until(lambda: len(observer.finished) >= runs, stand, observer)
            took = time.monotonic() - started
        failed = [name for name, phase in observer.finished.items() if phase != "Succeeded"]
        assert not failed, f"{len(failed)} runs have failed, such as {failed[0]}"
        what = f", beside {silent} runs with a pod that never answers" if silent else ""
        print(f"complete: {runs} runs, {runs * len(STEPS)} Jobs{what}: all Succeeded after {took:.0f} s")
        report_latency("a Job's pods run → status", observer.running, observer.running_told)
        report_latency("a Job is complete → status", observer.complete, observer.complete_told)
        report_operator(stand)
        if not silent:
            requests, _ = stand.requests(skipped)
            print(f"  requests a run: {requests.total() / runs:.1f}")
            for name, count in requests.most_common():
                print(f"    {count / runs:7.2f}  {name}")
        report_cpu(before, stand.usage())
        await api.close()


async def measure_idle(runs: int, rate: float, seconds: float) -> None:
    """Runs that are alive while nothing changes."""
    with Stand.up("idle") as stand:
        stand.start_operator()
        api, observer = ApiServer(stand.plane.kubeconfig), Observer()
        await until(lambda: _leads(stand), stand, observer)
        script = "seconds=inf; preprocess: seconds=1"
        path = DISTILLRUN.path(RUNS_NAMESPACE, "")
        async with observer.watching(api):
            await create(api, path, (manifest(f"run-{n}", script) for n in range(runs)), rate)
            await until(lambda: len(observer.running_told) >= 3 * runs, stand, observer)
            began = time.monotonic()
            while (now := time.monotonic()) - observer.last_run_event < SETTLE_SECONDS:
                await asyncio.sleep(1)
                if now - began > STUCK_SECONDS:
                    print(f"idle: statuses still change after {STUCK_SECONDS} s; this machine is too busy")
                    break
            _, skipped = stand.requests()
            before, started, events = stand.usage(), time.monotonic(), observer.run_events
            await asyncio.sleep(seconds)
            took, events = time.monotonic() - started, observer.run_events - events
        requests, _ = stand.requests(skipped)
        print(f"idle: {runs} runs with {2 * runs} running pods, for {took:.0f} s; {events} changes of a run")
        print(f"  requests a second: {requests.total() / took:.2f}")
        for name, count in requests.most_common():
            print(f"    {count / took:7.3f}  {name}")
        report_operator(stand)
        report_cpu(before, stand.usage())
        await api.close()


def report_latency(
    what: str, events: dict[tuple[str, str], float], told: dict[tuple[str, str], float]
) -> None:
    """Percentiles of the time from each event to its status. Runs that never answer do not count."""
    counted = {key: at for key, at in events.items() if not key[0].startswith("silent")}
    seconds = sorted(max(0.0, told[key] - at) for key, at in counted.items() if key in told)

    def percentile(share: float) -> float:
        return seconds[min(len(seconds) - 1, math.ceil(share * len(seconds)) - 1)]

    figures = ", ".join(f"p{share:g} {percentile(share / 100):.2f} s" for share in (50, 90, 99))
    print(f"  {what}: {figures}, longest {seconds[-1]:.2f} s ({len(seconds)} of {len(counted)} events)")


def report_operator(stand: Stand) -> None:
    assert stand.operator is not None
    text = (stand.plane.folder / "operator.log").read_text()
    problems = Counter(
        re.sub(r"[\w.-]*\d[\w.-]*", "…", line[25:100]) for line in text.splitlines() if "INFO" not in line
    )
    print(f"  operator: {peak_mib(stand.operator.pid):.0f} MiB at its peak")
    for line, count in problems.most_common(5):
        print(f"    {count} × {line}")


def report_cpu(before: dict[str, float], after: dict[str, float]) -> None:
    used = {name: after[name] - before.get(name, 0.0) for name in after}
    figures = ", ".join(
        f"{name} {seconds:.0f} s" for name, seconds in sorted(used.items(), key=lambda one: -one[1])
    )
    print(f"  CPU: {figures}; load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


def _leads(stand: Stand) -> bool:
    return "holds lease" in (stand.plane.folder / "operator.log").read_text()


async def measure(arguments: argparse.Namespace) -> None:
    runs, seconds, rate = arguments.runs, arguments.seconds, arguments.rate
    print(
        f"{runs} runs of {len(STEPS)} Jobs, pods run {seconds:g} s, {rate:g} runs created a second; {KUBERAY}"
    )
    print(f"controller manager: {' '.join(CONTROLLER_FLAGS)}")
    print(f"scheduler: {' '.join(SCHEDULER_FLAGS)}")
    if "floor" in arguments.phases:
        await measure_floor(runs, seconds, rate)
    if "complete" in arguments.phases:
        await measure_completion(runs, seconds, rate)
    if "idle" in arguments.phases:
        await measure_idle(runs, rate, arguments.idle)
    if "silent" in arguments.phases:
        await measure_completion(runs, seconds, rate, arguments.silent)


def main() -> None:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.operator",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=20.0, help="that each pod runs (20)")
    parser.add_argument("--rate", type=float, default=100.0, help="runs that are created a second (100)")
    parser.add_argument("--idle", type=float, default=120.0, help="seconds of the phase idle (120)")
    parser.add_argument(
        "--silent", type=int, default=100, help="runs that never answer in the phase silent (100)"
    )
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=PHASES)
    asyncio.run(measure(parser.parse_args()))


if __name__ == "__main__":
    main()
