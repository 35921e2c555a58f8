"""A hollow node: registers a node with an API server and plays its pods, which run nothing.

`python -m tests.fakes.hollow_node --kubeconfig FILE` is one as a process, `HollowNode` one in a thread.

As in Kubernetes' kubemark, everything but the containers is real: pods are bound by a scheduler, get an
address, run, end, and are deleted. A pod of a run serves /progress at its address, and leaves a termination
record. What it does follows from a Behavior, by default from the variable HOLLOW of its environment
(runtime.env of the run): see `scripted`.

Addresses are of 198.18.0.0/15, which RFC 2544 reserves for benchmarks: the operator asks no pod at a loopback
address. After one `ip route add local`, which needs root, Linux takes all of them for its own.
"""

import argparse
import asyncio
import contextlib
import hashlib
import ipaddress
import itertools
import math
import os
import random
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import aiohttp
from distill_operator.pod_template import POD_PORT

from tests.fakes.api_server import ApiServer
from vpmoe.api import labels
from vpmoe.api.progress import Amount, CheckpointStatus, DatasetStatus, Progress
from vpmoe.api.termination import EXIT_CODES, TerminationRecord
from vpmoe.clock import now, timestamp

Json = dict[str, Any]

ADDRESSES = ipaddress.ip_network("198.18.0.0/15")
POD_BITS = 14
"""Of each node: 16,382 pods that have an address at a time, and 8 nodes on a machine."""
SCRIPT_VARIABLE = "HOLLOW"
HEARTBEAT_SECONDS = 10.0
PARTS = 100
NODE_INFO = (
    "architecture",
    "bootID",
    "containerRuntimeVersion",
    "kernelVersion",
    "kubeProxyVersion",
    "kubeletVersion",
    "machineID",
    "operatingSystem",
    "osImage",
    "systemUUID",
)
"""Fields that the API server requires."""


@dataclass(frozen=True)
class Behavior:
    """What a pod does."""

    start: float = 0.0
    """Seconds until it runs."""
    seconds: float = 1.0
    """Seconds that it runs, unless it is deleted; math.inf: for ever."""
    exit: int = 0
    """Its exit code. The class of the termination record follows from it."""
    message: str = ""
    """Of the termination record."""
    record: bool = True
    """Whether it leaves a termination record. A process that was killed does not."""
    progress: Literal["advances", "stands", "none", "refused", "silent"] = "advances"
    """advances: its parts and tokens grow over `seconds`. stands: they do not. none: there is no report yet
    (204). refused: it listens at no port. silent: it accepts connections and never answers."""
    stop: float = 0.0
    """Seconds that it takes to end when it is deleted."""
    stop_exit: int = EXIT_CODES["Terminated"]
    """Its exit code then."""
    tokens: int = 0
    """Tokens of a training step at the end. 0: PARTS of a thousand."""


@dataclass
class HollowPod:
    """A pod that is played. `obj` is its newest state as the watch has shown it."""

    obj: Json
    ip: str
    behavior: Behavior = field(default_factory=Behavior)
    started: float = math.inf
    """Monotonic time since which it runs."""
    deleted: asyncio.Event = field(default_factory=asyncio.Event)
    failing: asyncio.Event = field(default_factory=asyncio.Event)
    over: bool = False
    """It has ended. It is forgotten when the watch has shown that."""
    task: asyncio.Task[None] | None = None

    @property
    def uid(self) -> str:
        return str(self.obj["metadata"]["uid"])

    @property
    def name(self) -> str:
        return str(self.obj["metadata"]["name"])

    @property
    def namespace(self) -> str:
        return str(self.obj["metadata"]["namespace"])

    @property
    def run(self) -> str:
        """Name of its run; empty for a pod of no run."""
        return str(self.obj["metadata"].get("labels", {}).get(labels.RUN, ""))

    @property
    def step(self) -> str:
        return str(self.obj["metadata"].get("labels", {}).get(labels.STEP, ""))

    @property
    def attempt(self) -> int:
        return int(self.obj["metadata"].get("labels", {}).get(labels.ATTEMPT, 1))

    @property
    def identity(self) -> str | None:
        """DistillRun.identity, from the name of the run's ConfigMap; None if it mounts none."""
        for volume in self.obj["spec"].get("volumes", []):
            name, found, uid = volume.get("configMap", {}).get("name", "").rpartition("-config-")
            if found and name == self.run:
                return f"{self.namespace}/{name}-{uid}"
        return None

    @property
    def trains(self) -> bool:
        return "jobs.train" in self.obj["spec"]["containers"][0].get("command", [])

    def report(self, state: Literal["Running", "Succeeded"] = "Running") -> Progress:
        """Its progress now."""
        share = 1.0 if state == "Succeeded" else self._share()
        total = (self.behavior.tokens or PARTS * 1000) if self.trains else PARTS
        amount = Amount(done=int(share * total), total=total)
        digest = hashlib.sha256(f"{self.identity}/{self.step}".encode()).hexdigest()
        checkpoint = None
        if self.trains and amount.done:
            manifest = f"s3://hollow/{self.identity}/{self.step}/{amount.done}"
            checkpoint = CheckpointStatus(
                iteration=1 + amount.done // 1000, tokens=amount.done, manifest=manifest, sha256=digest
            )
        dataset = None
        if self.step == "preprocess" and state == "Succeeded":
            dataset = DatasetStatus(id=digest, manifest=f"s3://hollow/datasets/{digest}", sha256=digest)
        return Progress(
            run=self.identity,
            step=self.step,
            attempt=self.attempt,
            state=state,
            message=f"{amount.done} of {total}",
            updated=now(),
            tokens=amount if self.trains else None,
            parts=None if self.trains else amount,
            dataset=dataset,
            checkpoint=checkpoint,
        )

    def _share(self) -> float:
        if self.behavior.progress == "stands" or math.isinf(self.behavior.seconds):
            return 0.5
        return max(0.0, min((time.monotonic() - self.started) / max(self.behavior.seconds, 1e-3), 1.0))

    def termination_message(self, code: int, message: str) -> str:
        """What its container leaves, as Kubernetes keeps it."""
        if not self.behavior.record or not self.step:
            return message
        kind = "Succeeded" if code == 0 else next((k for k, c in EXIT_CODES.items() if c == code), "Internal")
        progress = self.report("Succeeded" if code == 0 else "Running")
        record = TerminationRecord(kind=kind, exit=code, message=message, progress=progress)
        return record.to_json_line().decode()


def scripted(pod: HollowPod) -> Behavior:
    """What the variable HOLLOW of the pod's own container says.

    It has clauses between semicolons. Each is a list of fields of a Behavior, such as `seconds=2 exit=75`,
    after the pods that it is about: `rescore@1: progress=silent` (step and attempt), `rescore:`, `@1:`.
    Without these it is about all. Of the clauses about a pod, later ones replace fields of earlier ones.
    """
    variables = pod.obj["spec"]["containers"][0].get("env", [])
    script = next((one.get("value", "") for one in variables if one["name"] == SCRIPT_VARIABLE), "")
    return parse_script(script, pod.step, pod.attempt)


def parse_script(script: str, step: str, attempt: int) -> Behavior:
    """The behavior of one attempt of one step. Raises ValueError for a field that does not exist."""
    behavior = Behavior()
    kinds = {name: type(value) for name, value in vars(behavior).items()}
    for clause in filter(str.strip, script.split(";")):
        about, _, fields = clause.rpartition(":")
        wanted_step, _, wanted_attempt = about.strip().partition("@")
        if wanted_step not in ("", step) or wanted_attempt not in ("", str(attempt)):
            continue
        changes = dict(one.partition("=")[::2] for one in fields.split())
        if unknown := changes.keys() - kinds.keys():
            raise ValueError(f"{SCRIPT_VARIABLE}: {', '.join(sorted(unknown))} is no field of a Behavior")
        behavior = replace(
            behavior,
            **{n: v == "true" if kinds[n] is bool else kinds[n](v) for n, v in changes.items()},
        )
    return behavior


class HollowNode:
    """A node whose pods are played in a thread: `with HollowNode(kubeconfig):`.

    `behave` decides what a pod does, in that thread, when it is seen first. With `binds` the node takes every
    pod that waits for one: use it where there is no scheduler.
    """

    def __init__(
        self,
        kubeconfig: Path,
        name: str = "hollow-0",
        behave: Callable[[HollowPod], Behavior] = scripted,
        binds: bool = False,
        capacity: Json | None = None,
    ) -> None:
        self.name = name
        self.pods: dict[str, HollowPod] = {}
        """Pods that are played, by uid. Read it from any thread; change nothing."""
        self.alive = True
        """False: the kubelet does not answer any more (no heartbeats, nothing is played on)."""
        self.lists = 0
        """How often it has listed its pods."""
        self._kubeconfig, self._behave, self._binds = kubeconfig, behave, binds
        self._capacity = {
            "cpu": "100k",
            "memory": "1Pi",
            "ephemeral-storage": "1Pi",
            "pods": "20000",
            "nvidia.com/gpu": "100k",
            **(capacity or {}),
        }
        self._loop = asyncio.new_event_loop()
        self._failure: BaseException | None = None

    def __enter__(self) -> Self:
        ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ready,), name=self.name, daemon=True)
        self._thread.start()
        ready.wait(60)
        if self._failure is not None:
            raise RuntimeError(f"hollow node {self.name} has failed") from self._failure
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._main.cancel)
        self._thread.join(30)

    def fail(self, chosen: Callable[[HollowPod], bool], **changes: Any) -> list[str]:
        """End the running pods that are chosen, now, with these changes of their Behavior (such as exit=1).
        Returns their names."""

        def end() -> list[str]:
            found = [pod for pod in self.pods.values() if not math.isinf(pod.started) and chosen(pod)]
            for pod in found:
                pod.behavior = replace(pod.behavior, **changes)
                pod.failing.set()
            return [pod.name for pod in found]

        return self._in_loop(end)

    def lose_watch(self) -> None:
        """Cut the connections of its watches. It lists its pods again, as after 410."""
        self._in_loop(self._api.cut_watches)

    def _in_loop(self, function: Callable[[], Any]) -> Any:
        async def call() -> Any:
            return function()

        return asyncio.run_coroutine_threadsafe(call(), self._loop).result(30)

    def _run(self, ready: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        self._main = self._loop.create_task(self._live(ready))
        try:
            self._loop.run_until_complete(self._main)
        except asyncio.CancelledError:
            pass
        except BaseException as error:
            self._failure = error
            if ready.is_set():
                raise
        finally:
            ready.set()
            self._loop.close()

    async def _live(self, ready: threading.Event) -> None:
        with claimed_subnet() as subnet:
            self._addresses = itertools.cycle(subnet.hosts())
            self._used: set[str] = {next(self._addresses).compressed}
            self._api = ApiServer(self._kubeconfig)
            try:
                await self._register()
                ready.set()
                async with asyncio.TaskGroup() as group:
                    self._group = group
                    group.create_task(self._beat())
                    own = {"fieldSelector": f"spec.nodeName={self.name}"}
                    group.create_task(
                        self._api.list_and_watch("/api/v1/pods", self._replace_all, self._change, **own)
                    )
                    if self._binds:
                        unbound = {"fieldSelector": "spec.nodeName="}
                        group.create_task(
                            self._api.list_and_watch("/api/v1/pods", self._bind_all, self._bind, **unbound)
                        )
            finally:
                await self._api.close()

    async def _register(self) -> None:
        node = {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {
                "name": self.name,
                "labels": {"kubernetes.io/hostname": self.name, "kubernetes.io/os": "linux"},
            },
            "status": self._node_status(),
        }
        code, answer = await self._api.call("POST", "/api/v1/nodes", node)
        if code not in (201, 409):
            raise RuntimeError(f"node {self.name}: {code} {answer.get('message', '')}")
        await self._patch("/api/v1/nodes/" + self.name + "/status", {"status": self._node_status()})

    def _node_status(self) -> Json:
        healthy = {"MemoryPressure", "DiskPressure", "PIDPressure"}
        return {
            "capacity": self._capacity,
            "allocatable": self._capacity,
            "conditions": [
                {
                    "type": kind,
                    "status": "False" if kind in healthy else "True",
                    "reason": "Hollow",
                    "lastHeartbeatTime": timestamp(),
                }
                for kind in (*sorted(healthy), "Ready")
            ],
            "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}],
            "nodeInfo": dict.fromkeys(NODE_INFO, "hollow"),
        }

    async def _beat(self) -> None:
        """Renew the node's Lease, and its status every tenth time."""
        for beat in itertools.count():
            if self.alive:
                with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                    await self._renew_lease()
                    if beat % 10 == 0:
                        path = f"/api/v1/nodes/{self.name}/status"
                        code, _ = await self._patch(path, {"status": self._node_status()})
                        if code == 404:
                            await self._register()
            await asyncio.sleep(HEARTBEAT_SECONDS)

    async def _renew_lease(self) -> None:
        leases = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases"
        renewed = now().isoformat().replace("+00:00", "Z")
        spec = {"holderIdentity": self.name, "leaseDurationSeconds": 40, "renewTime": renewed}
        code, _ = await self._patch(f"{leases}/{self.name}", {"spec": spec})
        if code == 404:
            lease = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": self.name}}
            await self._api.call("POST", leases, {**lease, "spec": spec})

    async def _patch(self, path: str, body: Json) -> tuple[int, Json]:
        return await self._api.call("PATCH", path, body, "application/merge-patch+json")

    def _bind_all(self, pods: list[Json]) -> None:
        for pod in pods:
            self._bind("ADDED", pod)

    def _bind(self, event: str, pod: Json) -> None:
        """Bind a new pod to this node."""
        if event != "ADDED" or "deletionTimestamp" in pod["metadata"] or pod["spec"].get("schedulingGates"):
            return
        meta = pod["metadata"]
        binding = {
            "apiVersion": "v1",
            "kind": "Binding",
            "metadata": {"name": meta["name"], "namespace": meta["namespace"], "uid": meta["uid"]},
            "target": {"apiVersion": "v1", "kind": "Node", "name": self.name},
        }
        path = f"/api/v1/namespaces/{meta['namespace']}/pods/{meta['name']}/binding"
        self._group.create_task(self._insist("POST", path, binding))

    def _replace_all(self, pods: list[Json]) -> None:
        self.lists += 1
        present = {pod["metadata"]["uid"] for pod in pods}
        for uid in [uid for uid in self.pods if uid not in present]:
            self._forget(uid)
        for pod in pods:
            self._change("MODIFIED", pod)

    def _change(self, event: str, obj: Json) -> None:
        """A pod of this node is new, has changed, or is gone."""
        meta = obj["metadata"]
        uid, deleting = meta["uid"], "deletionTimestamp" in meta
        ended = obj.get("status", {}).get("phase") in ("Succeeded", "Failed")
        pod = self.pods.get(uid)
        if event == "DELETED" or (pod is not None and pod.over and ended):
            self._forget(uid)
            pod = None
        if event == "DELETED" or (
            pod is None and ended and (not deleting or meta.get("deletionGracePeriodSeconds") == 0)
        ):
            return
        if pod is None:
            pod = self.pods[uid] = HollowPod(obj, self._address())
            pod.task = self._group.create_task(self._play(pod), name=pod.name)
        pod.obj = obj
        if deleting:
            pod.deleted.set()

    def _forget(self, uid: str) -> None:
        pod = self.pods.pop(uid, None)
        if pod is not None:
            self._used.discard(pod.ip)
            if pod.task is not None:
                pod.task.cancel()

    def _address(self) -> str:
        """An address that no pod has."""
        address = next(one for one in map(str, self._addresses) if one not in self._used)
        self._used.add(address)
        return address

    async def _play(self, pod: HollowPod) -> None:
        """Run the pod to its end, or to its deletion."""
        try:
            pod.behavior = self._behave(pod)
            code, message = await self._live_out(pod)
            if pod.obj.get("status", {}).get("phase") not in ("Succeeded", "Failed"):
                await self._set_status(pod, self._ended(pod, code, message))
            if pod.deleted.is_set():
                options = {"gracePeriodSeconds": 0, "preconditions": {"uid": pod.uid}}
                await self._insist("DELETE", f"/api/v1/namespaces/{pod.namespace}/pods/{pod.name}", options)
        except (RuntimeError, ValueError, LookupError, TypeError) as error:  # about one pod
            sys.stderr.write(f"hollow pod {pod.namespace}/{pod.name}: {type(error).__name__}: {error}\n")
        pod.over = True

    async def _live_out(self, pod: HollowPod) -> tuple[int, str]:
        """Start the pod and wait for its end. Returns its exit code and message."""
        with contextlib.ExitStack() as stack:
            await self._wait(pod, pod.behavior.start)
            if not pod.deleted.is_set():
                await self._serve(pod, stack)
                pod.started = time.monotonic()
                await self._set_status(pod, self._running(pod))
                await self._wait(pod, pod.behavior.seconds)
            behavior = pod.behavior
            code, message = behavior.exit, behavior.message
            if pod.deleted.is_set() and not pod.failing.is_set():
                await asyncio.sleep(behavior.stop)
                code, message = behavior.stop_exit, "stopped by SIGTERM"
            while not self.alive:
                await asyncio.sleep(0.1)
            return code, message

    async def _wait(self, pod: HollowPod, seconds: float) -> None:
        """Wait until the pod is deleted or made to fail, at most so long."""
        waits = [asyncio.ensure_future(event.wait()) for event in (pod.deleted, pod.failing)]
        try:
            await asyncio.wait(
                waits,
                timeout=None if math.isinf(seconds) else seconds,
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            for wait in waits:
                wait.cancel()

    async def _serve(self, pod: HollowPod, stack: contextlib.ExitStack) -> None:
        """Listen at the pod's address, until the stack ends."""
        ports = [p["containerPort"] for c in pod.obj["spec"]["containers"] for p in c.get("ports", [])]
        if POD_PORT not in ports or pod.behavior.progress == "refused":
            return
        listener = stack.enter_context(socket.create_server((pod.ip, POD_PORT), backlog=64))
        if pod.behavior.progress == "silent":
            return  # Linux accepts connections for it

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, TimeoutError):
                async with asyncio.timeout(10):
                    request = await reader.readuntil(b"\r\n\r\n")
                    writer.write(_answer(pod, request))
                    await writer.drain()
            writer.close()

        listener.setblocking(False)
        server = await asyncio.start_server(answer, sock=listener)
        stack.callback(server.close)

    def _running(self, pod: HollowPod) -> Json:
        return self._pod_status(pod, "Running", {"running": {"startedAt": timestamp()}}, ready=True)

    def _ended(self, pod: HollowPod, code: int, message: str) -> Json:
        terminated = {
            "exitCode": code,
            "reason": "Error" if code else "Completed",
            "message": pod.termination_message(code, message),
            "startedAt": pod.obj.get("status", {}).get("startTime", timestamp()),
            "finishedAt": timestamp(),
        }
        phase = "Failed" if code else "Succeeded"
        return self._pod_status(pod, phase, {"terminated": terminated}, ready=False)

    def _pod_status(self, pod: HollowPod, phase: str, state: Json, ready: bool) -> Json:
        """The whole status. Other containers than the first do as it does; restarts there are none."""
        since, known = timestamp(), pod.obj.get("status", {})
        kept = [c for c in known.get("conditions", []) if c["type"] in ("PodScheduled", "DisruptionTarget")]
        common = {"lastTransitionTime": since, **({} if ready else {"reason": "PodCompleted"})}
        conditions = [
            {"type": kind, "status": str(ready or kind == "Initialized"), **common}
            for kind in ("Initialized", "Ready", "ContainersReady")
        ]
        statuses = [
            {
                "name": container["name"],
                "image": container["image"],
                "imageID": _image_id(container["image"]),
                "containerID": f"hollow://{pod.uid}-{container['name']}",
                "ready": ready,
                "started": ready,
                "restartCount": 0,
                "state": state if number == 0 else _without_message(state),
            }
            for number, container in enumerate(pod.obj["spec"]["containers"])
        ]
        return {
            "phase": phase,
            "podIP": pod.ip,
            "podIPs": [{"ip": pod.ip}],
            "hostIP": "127.0.0.1",
            "startTime": known.get("startTime", since),
            "conditions": [*kept, *conditions],
            "containerStatuses": statuses,
        }

    async def _set_status(self, pod: HollowPod, status: Json) -> None:
        path = f"/api/v1/namespaces/{pod.namespace}/pods/{pod.name}/status"
        await self._insist("PATCH", path, {"metadata": {"uid": pod.uid}, "status": status})

    async def _insist(self, method: str, path: str, body: Json) -> None:
        """Send a request until it is answered for good: the object may be gone by then."""
        kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
        for pause in (0.1, 0.3, 1.0, 3.0, 10.0):
            with contextlib.suppress(aiohttp.ClientError, TimeoutError, ValueError):
                code, answer = await self._api.call(method, path, body, kind)
                if code < 400 or code in (404, 409):
                    return
                if code < 500 and code != 429:
                    raise RuntimeError(f"{method} {path}: {code} {answer.get('message', '')}")
            await asyncio.sleep(pause)


def _answer(pod: HollowPod, request: bytes) -> bytes:
    """The HTTP answer of the pod's server."""
    if not request.startswith(b"GET /progress "):
        return b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    if pod.behavior.progress == "none":
        return b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n"
    body = pod.report().to_json()
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"Connection: close\r\n\r\n" + body


def _image_id(image: str) -> str:
    """A digest that differs with the image's name."""
    return f"{image.partition(':')[0]}@sha256:{hashlib.sha256(image.encode()).hexdigest()}"


def _without_message(state: Json) -> Json:
    return {kind: {k: v for k, v in about.items() if k != "message"} for kind, about in state.items()}


@contextlib.contextmanager
def claimed_subnet() -> Iterator[ipaddress.IPv4Network]:
    """A part of ADDRESSES that no other process of this machine uses: one that listens at its first address.
    Raises RuntimeError if there is none."""
    subnets = list(ADDRESSES.subnets(new_prefix=32 - POD_BITS))
    if not _is_local(str(ADDRESSES[1])):
        added = subprocess.run(
            ["ip", "route", "replace", "local", str(ADDRESSES), "dev", "lo"],
            capture_output=True,
            text=True,
            check=False,
        )
        if added.returncode != 0:
            raise RuntimeError(
                f"hollow pods need local addresses: run `ip route add local {ADDRESSES} dev lo` as root "
                f"({added.stderr.strip()})"
            )
    for subnet in random.sample(subnets, len(subnets)):
        with contextlib.suppress(OSError):
            claim = socket.create_server((str(subnet[1]), POD_PORT))
            with claim:
                yield subnet
                return
    raise RuntimeError(f"{len(subnets)} hollow nodes run on this machine already")


def _is_local(address: str) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fakes.hollow_node", description="A hollow node.")
    parser.add_argument("--kubeconfig", type=Path, default=os.environ.get("KUBECONFIG"), metavar="FILE")
    parser.add_argument("--name", default="hollow-0", metavar="NAME")
    parser.add_argument("--binds", action="store_true", help="bind pods too: there is no scheduler")
    arguments = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # each pod that runs has a socket
    with HollowNode(arguments.kubeconfig, arguments.name, binds=arguments.binds) as node:
        print(f"node {node.name} is registered", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
