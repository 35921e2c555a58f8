"""What has happened to one run of a batch, for people who look for the cause of a violation: the changes of
its objects in etcd, and the requests of each replica of the operator, in order of time.
"""

import json
import re
import urllib.parse
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.fakes.chaos.history import Change

Json = dict[str, Any]

MOST_BYTES = 64 * 2**20
"""Of all bodies that are kept."""
MOST_BODY = 2**16
"""Of one body. Larger ones are lists of all runs or of all children, which are not kept."""
MOST_RUNS = 3
"""Runs with violations whose timelines are printed."""


@dataclass(frozen=True)
class Request:
    """A request of a replica, and what the API server answered. `fate` (proxy.Fate) is what the proxy made of
    them: of "half", half of the answer arrived; "late" and "kill late" reach the API server somewhat later.
    """

    time: float
    """Monotonic seconds of the answer."""
    identity: str
    method: str
    path: str
    """With its query, as it was sent. Of a POST also the name of the object."""
    fate: str
    status: int
    """0 if there was no answer."""
    body: bytes = b""
    """The answer to a GET; empty if it was larger than MOST_BODY."""


@dataclass
class Requests:
    """The last requests of all replicas, watches excepted."""

    most_bytes: int = MOST_BYTES
    kept: deque[Request] = field(default_factory=deque)
    bytes: int = 0
    """Of the answers and paths that are kept."""

    def add(self, request: Request) -> None:
        """Keep a request, and drop the oldest ones for it. Parses nothing."""
        self.kept.append(request)
        self.bytes += _size(request)
        while self.bytes > self.most_bytes:
            self.bytes -= _size(self.kept.popleft())


def _size(request: Request) -> int:
    return len(request.body) + len(request.path)


def timelines(
    violations: Iterable[str], names: Iterable[str], changes: Sequence[Change], requests: Iterable[Request]
) -> Iterator[str]:
    """The timelines of the runs among `names` that violations mention, of at most MOST_RUNS of them."""
    text, requests = "\n".join(violations), list(requests)
    mentioned = [name for name in names if re.search(rf"\b{re.escape(name)}\b", text)]
    for name in mentioned[:MOST_RUNS]:
        yield f"timeline of {name}"
        yield from timeline(name, changes, requests)


def timeline(name: str, changes: Iterable[Change], requests: Iterable[Request]) -> list[str]:
    """The changes of a run and of what belongs to it, and the requests about them, oldest first, with the
    seconds since the first. The recorder sees a change somewhat later than it happens: go by resourceVersion.
    """
    own = re.compile(rf"[/=]{re.escape(name)}\b")
    found = [
        *((change.seen, _change(change)) for change in changes if _belongs(change.name, name)),
        *((one.time, _request(one)) for one in requests if own.search(urllib.parse.unquote(one.path))),
    ]
    found.sort(key=lambda one: one[0])
    start = found[0][0] if found else 0.0
    return [f"{time - start:8.3f} {line}" for time, line in found]


def _belongs(object_name: str, run: str) -> bool:
    """Whether an object's name is that of the run, or begins with it, as those of its children and pods."""
    return re.match(rf"{re.escape(run)}(?:[-.]|$)", object_name) is not None


def _change(change: Change) -> str:
    return f"{change.version} {change.type} {change.kind} {_describe(change.obj)}"


def _request(request: Request) -> str:
    head = f"{request.identity} {request.method} {urllib.parse.unquote(request.path)}: "
    head += f"[{request.fate}] " if request.fate != "pass" else ""
    if not request.status:
        return f"{head}no answer"
    head += f"{request.status}"
    try:
        answer: Json = json.loads(request.body)
    except ValueError:
        return head
    if "items" not in answer:
        return f"{head} {_describe(answer)}"
    version = answer.get("metadata", {}).get("resourceVersion", "")
    items = "; ".join(map(_describe, answer["items"])) or "nothing"
    return f"{head} at {version}: {items}"


def _describe(obj: Json) -> str:
    """An object on one line: a Status by its message, anything else by what decides about it."""
    if obj.get("kind") == "Status":
        return str(obj.get("message", ""))
    meta, status = obj.get("metadata", {}), obj.get("status")
    status = status if isinstance(status, dict) else {}
    steps = [
        f"{step['name']} {step['state']} {step.get('attempt', 0)}: {step.get('message', '')}"
        for step in status.get("steps", [])
    ]
    conditions = [one["type"] for one in status.get("conditions", []) if one.get("status") == "True"]
    about = [
        f"uid {meta.get('uid', '')[:8]}",
        f"version {meta.get('resourceVersion', '')}",
        f"deleted {meta['deletionTimestamp']}" if "deletionTimestamp" in meta else "",
        status.get("phase", ""),
        " ".join(conditions),
        obj.get("reason", ""),
        status.get("message", ""),
        *steps,
    ]
    return f"{meta.get('name', '')} ({', '.join(filter(None, about))})"
