"""Listing: the entries of all pages of a LIST, and proof that the pages end.

Some servers ignore where a page is to begin. Asked for the next page they give the first again, for ever.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

EMPTY_PAGES = 1000
"""Pages without a key in a row after which a listing counts as endless."""

type Page = Mapping[str, Any]
"""botocore's answer to ListObjectsV2."""


class ListingFault(Exception):
    """A listing that breaks the rules of S3. The message says how."""


def entries(fetch: Callable[[str, str | None], Page], prefix: str, after: str) -> Iterator[Mapping[str, Any]]:
    """The entries of all pages, sorted by the UTF-8 bytes of their keys; only those after the key `after` if
    it is given.

    `fetch` gives the page after a key, or of a continuation token if that is not None. Raises ListingFault if
    a key does not begin with `prefix`, the keys are not in order, or the pages do not end.
    """
    last, token, empty = "", None, 0
    while True:
        page = fetch(max(last, after, key=str.encode), token)
        given = page.get("Contents", [])
        for position, entry in enumerate(given):
            key = entry.get("Key")
            if not key or "Size" not in entry:
                raise ListingFault(f"it lists an object without a {'size' if key else 'key'}")
            if not key.startswith(prefix):
                raise ListingFault(f"asked for keys that begin with {prefix!r} it lists {key!r}")
            if last and key.encode() <= last.encode():
                raise ListingFault(_disorder(key, last, position))
            last = key
            if key.encode() > after.encode():  # some servers ignore the key to start after
                yield entry
        if not page.get("IsTruncated"):
            return
        empty = 0 if given else empty + 1
        before, token = token, page.get("NextContinuationToken") or None
        if empty and (token in (None, before) or empty > EMPTY_PAGES):
            raise ListingFault(
                "it says that there are more keys and gives none, so that the listing does not end"
            )


def _disorder(key: str, last: str, position: int) -> str:
    if position == 0:
        return (
            f"asked for the keys after {last!r} it begins with {key!r} again: it ignores where a page begins"
        )
    replaced = (
        ". It may have \ufffd in place of a control character, which XML cannot hold: rename that object"
        if "\ufffd" in key + last
        else ""
    )
    return f"it lists {key!r} after {last!r}: the keys are not in the order of their bytes{replaced}"
