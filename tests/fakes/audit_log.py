"""What the operator has asked of the API server, from the development cluster's audit log."""

import json
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from devcluster.configuration import AUDIT_LOG

Permission = tuple[str, str, str]
"""API group, resource and verb."""

POD = "authentication.kubernetes.io/pod-name"


def permissions_used(logs: Path, account: str, since: datetime) -> dict[Permission, str]:
    """The permissions that requests of a service account needed, each with one request as an example.

    Requests before `since` do not count, nor do those of a pod that had sent some before: it may be of an
    earlier version of the chart.
    """
    used: dict[Permission, str] = {}
    earlier: set[str] = set()
    for record in _records(logs):
        user = record["user"]
        if user["username"] != account:
            continue
        pods = user.get("extra", {}).get(POD, [])
        if datetime.fromisoformat(record["requestReceivedTimestamp"]) < since:
            earlier.update(pods)
        elif earlier.isdisjoint(pods):
            for permission in _needed(record):
                used.setdefault(permission, f"{record['verb']} {record['requestURI']}")
    return used


def _records(logs: Path) -> Iterator[dict[str, Any]]:
    """All records, oldest first. A log that has grown too large has its time in its name."""
    current = logs / AUDIT_LOG
    for path in [*sorted(logs.glob(f"{current.stem}-*{current.suffix}")), current]:
        with path.open() as lines:
            yield from (json.loads(line) for line in lines if line.endswith("\n"))


def _needed(record: dict[str, Any]) -> Iterator[Permission]:
    """Permissions that the request needed; none for discovery, which every account may use."""
    about = record.get("objectRef", {})
    if "resource" not in about:
        return
    resource = "/".join(part for part in (about["resource"], about.get("subresource")) if part)
    yield about.get("apiGroup", ""), resource, record["verb"]
    if record["verb"] == "patch" and record.get("responseStatus", {}).get("code") == 201:
        yield about.get("apiGroup", ""), resource, "create"  # a server-side apply of a new object needs both
