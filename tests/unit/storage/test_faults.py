"""Bucket on a store with faults: a real S3 server behind a proxy that breaks selected requests."""

import hashlib
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.fault_proxy import Fault, FaultProxy, Kind, faulty
from tests.fakes.store import S3
from tests.fakes.waiting import wait_until
from vpmoe.api.storage import StorageSpec
from vpmoe.storage import BLOCK, Bucket, Patience, StorageError

SHORT_PATIENCE = Patience(attempts=4, connect=2, read=1, first_pause=0.01, longest_pause=0.02)
DATA = random.Random(0).randbytes(2 * BLOCK + 99)


@pytest.fixture(scope="module")
def proxy_and_bucket(s3: S3) -> Iterator[tuple[FaultProxy, Bucket]]:
    """A proxy and one connection through it, shared by the tests of this module."""
    with faulty(s3.endpoint) as proxy:
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
            bucket = Bucket.open(StorageSpec(bucket="none"), patience=SHORT_PATIENCE)
        yield proxy, bucket


@pytest.fixture
def proxy(proxy_and_bucket: tuple[FaultProxy, Bucket]) -> FaultProxy:
    """The proxy, without faults and recorded requests."""
    proxy_and_bucket[0].reset()
    return proxy_and_bucket[0]


@pytest.fixture
def proxied_bucket(proxy_and_bucket: tuple[FaultProxy, Bucket], bucket: Bucket) -> Bucket:
    """The test's bucket, through the proxy."""
    return proxy_and_bucket[1].other(bucket.name)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "source").write_bytes(DATA)
    return tmp_path / "source"


UPLOAD = [
    pytest.param("503", r"partNumber=2", id="part-503"),
    pytest.param("lost", r"partNumber=3", id="part-response-lost"),
    pytest.param("stalled", r"partNumber=1", id="part-stalls"),
    pytest.param("503", r"POST .*uploads", id="create-503"),
    pytest.param("503", r"POST .*uploadId", id="complete-503"),
    pytest.param("lost", r"POST .*uploadId", id="complete-response-lost"),
]


@pytest.mark.parametrize("kind, request_", UPLOAD)
def test_an_upload_is_retried_after_a_fault(
    proxy: FaultProxy, proxied_bucket: Bucket, bucket: Bucket, source: Path, kind: Kind, request_: str
) -> None:
    bucket.put_file("f", source, {})  # an older object with the same key must not be mistaken for the upload
    source.write_bytes(DATA[::-1])
    proxy.faults = [Fault(kind, request_, times=1)]
    stored = proxied_bucket.put_file("f", source, {})
    assert stored.sha256 == hashlib.sha256(DATA[::-1]).hexdigest()
    assert bucket.read(stored, 0, stored.size) == DATA[::-1]
    assert proxy.count(request_) == 2


@pytest.mark.parametrize("request_", ["partNumber=2", "POST .*uploadId", "POST .*uploads"])
def test_an_upload_that_fails_permanently_leaves_neither_object_nor_parts(
    proxy: FaultProxy, proxied_bucket: Bucket, bucket: Bucket, source: Path, request_: str
) -> None:
    proxy.faults = [Fault("503", request_)]
    message = (
        rf"^{bucket.url('f')}: \w+ at {proxy.endpoint} failed 4 times in \d+ s, last with 503\. "
        "Check that storage.endpoint is right"
    )
    with pytest.raises(StorageError, match=message) as caught:
        proxied_bucket.put_file("f", source, {})
    assert caught.value.retriable and not bucket.exists("f")
    assert not bucket._client.list_multipart_uploads(Bucket=bucket.name).get("Uploads")


READ = [
    pytest.param("503", id="503"),
    pytest.param("lost", id="no-response"),
    pytest.param("reset", id="reset-in-the-body"),
    pytest.param("truncated", id="body-ends-early"),
    pytest.param("stalled", id="stalls"),
    pytest.param("flipped", id="bit-flips-in-transit"),
]


@pytest.mark.parametrize("kind", READ)
def test_a_read_is_retried_after_a_fault(
    proxy: FaultProxy, proxied_bucket: Bucket, bucket: Bucket, source: Path, tmp_path: Path, kind: Kind
) -> None:
    stored = bucket.put_file("f", source, {})
    bucket.put_bytes("small", b"right", {})
    proxy.faults = [Fault(kind, "GET .*/f", times=2), Fault(kind, "GET .*/small", times=1)]
    proxied_bucket.download(stored, tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == DATA
    assert proxied_bucket.get("small") == b"right"
    assert proxy.count("GET .*/f") == 3 + 2 and proxy.count("GET .*/small") == 2


@pytest.mark.parametrize(
    "kind, reason, message",
    [
        pytest.param("503", "Unreachable", "GetObject at .* failed 4 times in .* last with 503", id="503"),
        pytest.param(
            "truncated",
            "Unreachable",
            "failed 4 times in .* last with (ResponseStreamingError|IncompleteReadError)",
            id="truncated",
        ),
        pytest.param("flipped", "Altered", "sha256 of block 0 is .*, its manifest says", id="flipped"),
    ],
)
def test_a_read_that_fails_permanently_leaves_no_file(
    proxy: FaultProxy,
    proxied_bucket: Bucket,
    bucket: Bucket,
    source: Path,
    tmp_path: Path,
    kind: Kind,
    reason: str,
    message: str,
) -> None:
    stored = bucket.put_file("f", source, {})
    proxy.faults = [Fault(kind, "GET .*/f")]
    with pytest.raises(StorageError, match=message) as caught:
        proxied_bucket.download(stored, tmp_path / "target")
    assert caught.value.reason == reason
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_retried_conditional_put_that_finds_its_own_object_has_succeeded(
    proxy: FaultProxy, proxied_bucket: Bucket
) -> None:
    proxy.faults = [Fault("lost", "PUT .*/once", times=1)]
    assert proxied_bucket.create("once", b"mine", {})
    assert proxy.count("PUT .*/once") == 2


def test_a_retried_conditional_put_that_finds_another_object_has_failed(
    proxy: FaultProxy, proxied_bucket: Bucket, bucket: Bucket
) -> None:
    bucket.create("once", b"another's", {})
    proxy.faults = [Fault("503", "PUT .*/once", times=1)]
    assert not proxied_bucket.create("once", b"mine", {})
    assert bucket.get("once") == b"another's"


def test_a_store_that_ignores_the_condition_is_rejected(
    proxy: FaultProxy, proxied_bucket: Bucket, bucket: Bucket
) -> None:
    proxy.faults = [Fault("unconditional", "PUT .*/.probe/")]
    with pytest.raises(
        StorageError, match=r"ignores `If-None-Match: \*`.*Use a store that has conditional PUT"
    ) as caught:
        proxied_bucket.probe()
    assert caught.value.reason == "Refused" and not list(bucket.list(""))


def test_listing_and_deleting_are_retried_after_faults(
    proxy: FaultProxy, proxied_bucket: Bucket, bucket: Bucket
) -> None:
    for name in "abc":
        bucket.put_bytes(f"d/{name}", b"", {})
    proxy.faults = [Fault("503", "GET .*list-type", times=2), Fault("lost", "DELETE .*/b", times=1)]
    assert proxied_bucket.delete_prefix("d") == 3
    assert not list(bucket.list(""))


def test_a_permanent_error_is_not_retried(proxy: FaultProxy, proxied_bucket: Bucket) -> None:
    with pytest.raises(StorageError, match="there is no such object"):
        proxied_bucket.get("not-there")
    assert proxy.count("GET") == 1


def test_requests_use_only_what_every_store_has(
    proxy: FaultProxy, proxied_bucket: Bucket, source: Path, tmp_path: Path
) -> None:
    proxied_bucket.probe()
    stored = proxied_bucket.put_file("d/f", source, {"step": "x"})
    proxied_bucket.download(stored, tmp_path / "target")
    proxied_bucket.write_json("d/progress.json", {})
    proxied_bucket.delete_prefix("d")
    assert {request.partition(" ")[0] for request in proxy.requests} == {"PUT", "POST", "GET", "DELETE"}
    for request, headers in zip(proxy.requests, proxy.headers, strict=True):
        extra = [
            name
            for name in headers
            if re.match("x-amz-(checksum|trailer|sdk-checksum|tagging)|if-match|content-encoding", name)
        ]
        assert not extra, request
        assert re.fullmatch(r"[0-9a-f]{64}", headers["x-amz-content-sha256"]), (
            "every request states the sha256 of its body"
        )
        assert "if-none-match" not in headers or re.match(r"PUT [^?]*/\.probe/", request), request
    assert not proxy.count(r"\?delete"), "DeleteObjects requires a checksum that stores implement differently"


UPLOADER = """
import sys
from pathlib import Path
from vpmoe.api.storage import StorageSpec
from vpmoe.storage import Bucket
Bucket.open(StorageSpec(bucket=sys.argv[1])).put_file("f", Path(sys.argv[2]), {})
"""


def test_a_killed_upload_leaves_no_object(proxy: FaultProxy, bucket: Bucket, source: Path) -> None:
    proxy.faults = [Fault("held", "partNumber=3")]
    environment = {**os.environ, "AWS_ENDPOINT_URL": proxy.endpoint}
    uploader = subprocess.Popen([sys.executable, "-c", UPLOADER, bucket.name, source], env=environment)
    try:
        wait_until(lambda: proxy.count("partNumber=") == 3, "all parts are being uploaded")
    finally:
        uploader.send_signal(signal.SIGKILL)
        uploader.wait()
    proxy.release.set()
    assert not bucket.exists("f") and not list(bucket.list(""))
    bucket.put_file("f", source, {})
    assert [found.size for found in bucket.list("")] == [len(DATA)]
