"""What has happened to one run of a batch, for people who look for the cause of a violation: the changes of
its objects in etcd, and what each replica of the operator read meanwhile, in order of time.
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
class Read:
    """A read by a replica, and what the API server answered. `fate` (proxy.Fate) is what the proxy made of
    the answer: of "half", half of the body arrived."""

    time: float
    """Monotonic seconds of the answer."""
    identity: str
    path: str
    """With its query, as it was sent."""
    fate: str
    status: int
    """0 if there was no answer."""
    body: bytes
    """Empty if it was larger than MOST_BODY."""


@dataclass
class Reads:
    """The last reads of all replicas."""

    most_bytes: int = MOST_BYTES
    kept: deque[Read] = field(default_factory=deque)
    bytes: int = 0
    """Of the bodies and paths that are kept."""

    def add(self, read: Read) -> None:
        """Keep a read, and drop the oldest ones for it. Parses nothing."""
        self.kept.append(read)
        self.bytes += _size(read)
        while self.bytes > self.most_bytes:
            self.bytes -= _size(self.kept.popleft())


def _size(read: Read) -> int:
    return len(read.body) + len(read.path)


def timelines(
    violations: Iterable[str], names: Iterable[str], changes: Sequence[Change], reads: Iterable[Read]
) -> Iterator[str]:
    """The timelines of the runs among `names` that violations mention, of at most MOST_RUNS of them."""
    text, reads = "\n".join(violations), list(reads)
    mentioned = [name for name in names if re.search(rf"\b{re.escape(name)}\b", text)]
    for name in mentioned[:MOST_RUNS]:
        yield f"timeline of {name}"
        yield from timeline(name, changes, reads)


def timeline(name: str, changes: Iterable[Change], reads: Iterable[Read]) -> list[str]:
    """The changes of a run and of what belongs to it, and the reads of them, oldest first. Times are seconds
    since the first. The recorder sees a change somewhat later than it happens: a resourceVersion tells more.
    """
    own = re.compile(rf"[/=]{re.escape(name)}\b")
    found = [
        *((change.seen, _change(change)) for change in changes if _belongs(change.name, name)),
        *((read.time, _read(read)) for read in reads if own.search(urllib.parse.unquote(read.path))),
    ]
    found.sort(key=lambda one: one[0])
    start = found[0][0] if found else 0.0
    return [f"{time - start:8.3f} {line}" for time, line in found]


def _belongs(object_name: str, run: str) -> bool:
    """Whether an object's name is that of the run, or begins with it, as those of its children and pods."""
    return re.match(rf"{re.escape(run)}(?:[-.]|$)", object_name) is not None


def _change(change: Change) -> str:
    return f"{change.version} {change.type} {change.kind} {_describe(change.obj)}"


def _read(read: Read) -> str:
    head = f"{read.identity} reads {urllib.parse.unquote(read.path)}: "
    head += f"[{read.fate}] " if read.fate != "pass" else ""
    if not read.status:
        return f"{head}no answer"
    try:
        answer: Json = json.loads(read.body)
    except ValueError:
        return f"{head}{read.status} ({len(read.body)} bytes kept)"
    if "items" not in answer:
        return f"{head}{read.status} {_describe(answer)}"
    version = answer.get("metadata", {}).get("resourceVersion", "")
    items = "; ".join(map(_describe, answer["items"])) or "nothing"
    return f"{head}{read.status} at {version}: {items}"


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
