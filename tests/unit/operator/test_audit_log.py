"""What counts as a permission that the operator has used, in the audit log's own format."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

from devcluster.configuration import AUDIT_LOG
from tests.fakes.audit_log import POD, permissions_used

ACCOUNT = "system:serviceaccount:vpmoe-system:distill-operator"
SINCE = datetime.fromisoformat("2026-01-01T12:00:00Z")


def record(
    verb: str,
    resource: str,
    time: str,
    group: str = "",
    code: int = 200,
    pod: str = "",
    user: str = ACCOUNT,
) -> dict[str, Any]:
    name, _, subresource = resource.partition("/")
    about = {"resource": name, "apiGroup": group, "subresource": subresource}
    return {
        "verb": verb,
        "requestURI": f"/{resource}",
        "user": {"username": user, "extra": {POD: [pod]} if pod else {}},
        **({"objectRef": {key: value for key, value in about.items() if value}} if resource else {}),
        "responseStatus": {"code": code},
        "requestReceivedTimestamp": f"2026-01-01T{time}.000001Z",
    }


def used(folder: Path, *records: dict[str, Any]) -> set[tuple[str, str, str]]:
    (folder / AUDIT_LOG).write_text("".join(json.dumps(found) + "\n" for found in records) + '{"verb": "ge')
    return set(permissions_used(folder, ACCOUNT, SINCE))


def test_a_request_needs_the_permission_that_it_names_whether_it_was_allowed_or_not(tmp_path: Path) -> None:
    found = used(
        tmp_path,
        record("list", "pods", "12:00:01"),
        record("update", "distillruns/status", "12:00:01", group="vpmoe.dev"),
        record("get", "secrets", "12:00:01", code=403),
        record("get", "", "12:00:01"),  # discovery
        record("delete", "pods", "12:00:01", user="system:serviceaccount:vpmoe-system:default"),
    )
    assert found == {
        ("", "pods", "list"),
        ("vpmoe.dev", "distillruns/status", "update"),
        ("", "secrets", "get"),
    }


def test_a_server_side_apply_needs_create_only_if_it_creates(tmp_path: Path) -> None:
    crds = "customresourcedefinitions"
    assert {verb for *_, verb in used(tmp_path, record("patch", crds, "12:00:01"))} == {"patch"}
    found = used(tmp_path, record("patch", crds, "12:00:01", code=201))
    assert {verb for *_, verb in found} == {"patch", "create"}


def test_requests_of_an_earlier_operator_do_not_count(tmp_path: Path) -> None:
    """Before the session, and afterwards from a pod that is still ending. A token of no pod always counts."""
    (tmp_path / "audit-2026-01-01T11-59-59.000.log").write_text(
        json.dumps(record("get", "secrets", "11:00:00", pod="old")) + "\n"
    )
    found = used(
        tmp_path,
        record("list", "nodes", "11:59:59"),
        record("get", "secrets", "12:00:01", pod="old"),
        record("list", "pods", "12:00:01", pod="new"),
        record("get", "configmaps", "12:00:01"),
    )
    assert found == {("", "pods", "list"), ("", "configmaps", "get")}
