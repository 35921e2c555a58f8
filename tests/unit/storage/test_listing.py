"""A listing ends, whichever rule of LIST a server breaks."""

import re
from collections.abc import Callable
from typing import Any

import pytest

from tests.fakes.fault_proxy import Fault, Response, faulty
from tests.fakes.store import S3
from vpmoe.api.storage import StorageSpec
from vpmoe.storage import Bucket, Patience, StorageError
from vpmoe.storage.listing import ListingFault, Page, entries

KEYS = ("A", "a", "a-b", "a/x", "b", "z", "é", "漢")
"""In the order of their bytes, which is not that of Unicode's collation."""


def page(keys: tuple[str, ...], more: bool, token: str | None = None) -> Page:
    found: dict[str, Any] = {"Contents": [{"Key": key, "Size": 1} for key in keys], "IsTruncated": more}
    return found if token is None else {**found, "NextContinuationToken": token}


def rest(start: str, size: int) -> tuple[tuple[str, ...], bool]:
    found = tuple(key for key in KEYS if key.encode() > start.encode())
    return found[:size], len(found) > size


def server(size: int, tokens: bool, start_after: bool) -> Callable[[str, str | None], Page]:
    """A store with KEYS. Without `tokens` it gives none; without `start_after` it ignores the key."""

    def fetch(start: str, token: str | None) -> Page:
        keys, more = rest(token or (start if start_after else ""), size)
        return page(keys, more, keys[-1] if tokens and more else None)

    return fetch


@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("tokens, start_after", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("after", ["", "A", "a-b", "b0", "漢"])
def test_all_keys_are_listed_if_a_server_knows_tokens_or_start_keys(
    size: int, tokens: bool, start_after: bool, after: str
) -> None:
    found = [entry["Key"] for entry in entries(server(size, tokens, start_after), "", after)]
    assert found == [key for key in KEYS if key.encode() > after.encode()]


BROKEN: dict[str, tuple[Callable[[str, str | None], Page], str]] = {
    "ignores-both": (
        lambda start, token: page(("a", "b"), True),
        "begins with 'a' again.*ignores where a page",
    ),
    "ignores-its-token": (lambda start, token: page(("a", "b"), True, "same"), "begins with 'a' again"),
    "new-tokens": (lambda start, token: page(("a",), True, (token or "") + "x"), "begins with 'a' again"),
    "repeats-the-last": (
        lambda start, token: page(("b", "c"), False) if token else page(("a", "b"), True, "t"),
        "begins with 'b' again",
    ),
    "unsorted": (lambda start, token: page(("b", "a"), False), "'a' after 'b'.*order"),
    "unsorted-pages": (
        lambda start, token: page(("a",), False) if token else page(("b",), True, "t"),
        "begins with 'a' again",
    ),
    "twice": (lambda start, token: page(("a", "a"), False), "'a' after 'a'"),
    "empty-pages": (lambda start, token: page((), True), "does not end"),
    "empty-pages-with-a-token": (lambda start, token: page((), True, "t"), "does not end"),
    "empty-pages-with-new-tokens": (lambda start, token: page((), True, (token or "") + "x"), "does not end"),
}


NOT_ASKED_FOR: dict[str, tuple[dict[str, Any], str]] = {
    "another-folder": ({"Key": "other/x", "Size": 1}, "begin with 'a/' it lists 'other/x'"),
    "a-slash-before": ({"Key": "/a/x", "Size": 1}, "it lists '/a/x'"),
    "a-longer-name": ({"Key": "a-b", "Size": 1}, "it lists 'a-b'"),
    "another-case": ({"Key": "A/x", "Size": 1}, "it lists 'A/x'"),
    "no-key": ({"Size": 1}, "without a key"),
    "empty-key": ({"Key": "", "Size": 1}, "without a key"),
    "no-size": ({"Key": "a/x"}, "without a size"),
}


@pytest.mark.parametrize("name", NOT_ASKED_FOR)
def test_an_entry_that_was_not_asked_for_is_an_error(name: str) -> None:
    """Whoever deletes a folder would delete the objects of others."""
    entry, message = NOT_ASKED_FOR[name]
    with pytest.raises(ListingFault, match=message):
        list(entries(lambda start, token: {"Contents": [entry], "IsTruncated": False}, "a/", ""))


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("after", ["", "0"])
def test_a_listing_that_would_not_end_is_an_error(name: str, after: str) -> None:
    fetch, message = BROKEN[name]
    with pytest.raises(ListingFault, match=message):
        list(entries(fetch, "", after))


def test_a_store_that_gives_the_first_page_again_is_named(
    s3: S3, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in ("x/a", "x/b"):
        bucket.put_bytes(key, b"", {})

    def more(given: Response) -> Response:
        return given[0], given[1], re.sub(rb"<IsTruncated>\w+", b"<IsTruncated>true", given[2])

    with faulty(s3.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        patience = Patience(attempts=3, connect=2, read=2, first_pause=0.01)
        proxied = Bucket.open(StorageSpec(bucket=bucket.name), patience=patience)
        proxy.faults = [Fault("edited", "list-type=2", times=1, edit=more)]
        assert [found.key for found in proxied.list("x/")] == ["x/a", "x/b"], "start-after is understood"
        first: list[bytes] = []

        def again(given: Response) -> Response:
            first.append(more(given)[2])
            return given[0], given[1], first[0]

        for call in (lambda: list(proxied.list("x/")), lambda: proxied.delete_prefix("x")):
            proxy.reset()
            first.clear()
            proxy.faults = [Fault("edited", "list-type=2", edit=again)]
            start = f"s3://{bucket.name}/x/: ListObjectsV2 at {proxy.endpoint}: the store lists wrongly"
            message = rf"{start}: .*'x/b'.*'x/a' again"
            with pytest.raises(StorageError, match=message) as caught:
                call()
            assert caught.value.reason == "Refused" and proxy.count("list-type=2") == 2
    assert bucket.exists("x/a"), "nothing was deleted after a listing that is wrong"
