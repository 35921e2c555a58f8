"""The operator applies its CRD over an older one, over one without a release, and never over a newer one."""

import asyncio
import copy
import logging

import pytest
from distill_operator.crd import CONFLICT_RETRIES, apply, is_newer, release
from distill_operator.kube import CRD, Json, KubeError

from tests.fakes.fake_api import FakeApi, status
from vpmoe.api.crd import RELEASE_ANNOTATION, crd

NAME = crd()["metadata"]["name"]


def definition(version: str | None, mark: str) -> Json:
    """A CRD of that release; None for one from the time when it did not carry it."""
    made: Json = copy.deepcopy(crd())
    made["spec"]["mark"] = mark
    made["metadata"]["annotations"] = {} if version is None else {RELEASE_ANNOTATION: version}
    made["metadata"]["uid"] = "crd"
    made["status"] = {"conditions": [{"type": "Established", "status": "True"}]}
    return made


def ours() -> Json:
    return {key: value for key, value in definition("1.2.3", "ours").items() if key != "status"}


@pytest.mark.parametrize(
    "stored, newer",
    [
        ("", False),
        ("1.2.3", False),
        ("1.2.2", False),
        ("1.1.9", False),
        ("0.9.9", False),
        ("v1.2.3", False),
        ("1.2.4", True),
        ("1.3.0", True),
        ("1.10.0", True),
        ("2.0.0", True),
        ("v2.0.0", True),
        ("2", True),
        ("2026.1", True),
        ("next", True),
    ],
)
def test_releases_are_compared_by_number_and_an_unknown_form_counts_as_newer(
    stored: str, newer: bool
) -> None:
    assert is_newer(stored, "1.2.3") is newer


def test_the_operators_own_crd_carries_a_release_that_it_can_read() -> None:
    assert not is_newer(release(crd()), release(crd()))
    assert is_newer("999.0.0", release(crd()))


@pytest.mark.parametrize(
    "stored, applied",
    [
        pytest.param(None, True, id="without a release, by kubectl or an older operator"),
        pytest.param("1.2.2", True, id="older"),
        pytest.param("1.2.3", True, id="the same"),
        pytest.param("1.2.4", False, id="newer"),
        pytest.param("next", False, id="unknown"),
    ],
)
def test_a_stored_crd_is_replaced_unless_it_is_newer(
    stored: str | None, applied: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "distill_operator")
    api = FakeApi()
    api.add(CRD, definition(stored, "stored"))
    asyncio.run(apply(api.client(), ours()))
    assert api.get(CRD, None, NAME)["spec"]["mark"] == ("ours" if applied else "stored")
    assert bool(api.writes()) is applied
    assert ("it stays as it is" in caplog.text) is not applied
    assert "is established" in caplog.text


def test_a_crd_that_does_not_exist_is_created() -> None:
    api = FakeApi()

    def establish(method: str, path: str) -> None:
        if method == "GET" and api.writes():
            established = [{"type": "Established", "status": "True"}]
            api.objects[path]["status"] = {"conditions": established}

    api.fault = establish
    asyncio.run(apply(api.client(), ours()))
    assert api.get(CRD, None, NAME)["spec"]["mark"] == "ours"


def test_a_newer_crd_that_another_operator_applies_meanwhile_stays() -> None:
    """Between the look at the stored one and the write."""
    api = FakeApi()
    api.add(CRD, definition("1.2.2", "older"))

    def upgrade(method: str, path: str) -> None:
        if method == "PATCH" and len(api.writes()) == 1:
            api.add(CRD, definition("1.2.4", "newer"))

    api.fault = upgrade
    asyncio.run(apply(api.client(), ours()))
    assert api.get(CRD, None, NAME)["spec"]["mark"] == "newer"
    assert len(api.writes()) == 1


def test_a_crd_that_never_stays_the_same_is_an_error() -> None:
    api = FakeApi()
    api.add(CRD, definition("1.2.2", "older"))
    api.fault = lambda method, path: status(409, "modified", NAME) if method == "PATCH" else None
    with pytest.raises(KubeError, match=f"was changed {CONFLICT_RETRIES} times"):
        asyncio.run(apply(api.client(), ours()))
