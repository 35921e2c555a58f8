"""What storage does when the store misbehaves: a real one behind a proxy that breaks chosen requests."""

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

from tests.fakes.fault_proxy import Fault, Faulty, Kind, faulty
from tests.fakes.store import S3
from tests.fakes.waiting import wait_until
from vpmoe.api.storage import StorageSpec
from vpmoe.storage import BLOCK, Bucket, Credentials, Patience, StorageError

HASTY = Patience(attempts=4, connect=2, read=1, first_pause=0.01, longest_pause=0.02)
DATA = random.Random(0).randbytes(2 * BLOCK + 99)


@pytest.fixture(scope="module")
def connected(s3: S3) -> Iterator[tuple[Faulty, Bucket]]:
    """A proxy and one connection through it, for all tests of this module."""
    with faulty(s3.endpoint) as proxy:
        spec = StorageSpec(bucket="none", endpoint=proxy.endpoint)
        yield proxy, Bucket.open(spec, credentials=Credentials(s3.access_key, s3.secret_key), patience=HASTY)


@pytest.fixture
def proxy(connected: tuple[Faulty, Bucket]) -> Faulty:
    """The proxy, without a fault and having seen nothing."""
    connected[0].reset()
    return connected[0]


@pytest.fixture
def shaky(connected: tuple[Faulty, Bucket], bucket: Bucket) -> Bucket:
    """The test's bucket, through the proxy."""
    return connected[1].other(bucket.name)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "source").write_bytes(DATA)
    return tmp_path / "source"


UPLOAD = [
    pytest.param("503", r"partNumber=2", id="part-503"),
    pytest.param("lost", r"partNumber=3", id="part-answer-lost"),
    pytest.param("stalled", r"partNumber=1", id="part-stalls"),
    pytest.param("503", r"POST .*uploads", id="create-503"),
    pytest.param("503", r"POST .*uploadId", id="complete-503"),
    pytest.param("lost", r"POST .*uploadId", id="complete-answer-lost"),
]


@pytest.mark.parametrize("kind, request_", UPLOAD)
def test_an_upload_survives_a_fault(
    proxy: Faulty, shaky: Bucket, bucket: Bucket, source: Path, kind: Kind, request_: str
) -> None:
    bucket.put_file("f", source, {})  # an older object under the same key must not be taken for ours
    source.write_bytes(DATA[::-1])
    proxy.faults = [Fault(kind, request_, times=1)]
    stored = shaky.put_file("f", source, {})
    assert stored.sha256 == hashlib.sha256(DATA[::-1]).hexdigest()
    assert bucket.read(stored, 0, stored.size) == DATA[::-1]
    assert proxy.count(request_) == 2


@pytest.mark.parametrize("request_", ["partNumber=2", "POST .*uploadId", "POST .*uploads"])
def test_an_upload_that_fails_for_good_leaves_neither_object_nor_parts(
    proxy: Faulty, shaky: Bucket, bucket: Bucket, source: Path, request_: str
) -> None:
    proxy.faults = [Fault("503", request_)]
    says = (
        rf"^{bucket.url('f')}: \w+ at {proxy.endpoint} failed 4 times in \d+ s, last with 503\. "
        "Check that storage.endpoint is right"
    )
    with pytest.raises(StorageError, match=says) as caught:
        shaky.put_file("f", source, {})
    assert caught.value.retriable and not bucket.exists("f")
    assert not bucket._client.list_multipart_uploads(Bucket=bucket.name).get("Uploads")


READ = [
    pytest.param("503", id="503"),
    pytest.param("lost", id="no-answer"),
    pytest.param("reset", id="reset-in-the-body"),
    pytest.param("truncated", id="body-ends-early"),
    pytest.param("stalled", id="stalls"),
    pytest.param("flipped", id="bit-flips-on-the-way"),
]


@pytest.mark.parametrize("kind", READ)
def test_a_read_survives_a_fault(
    proxy: Faulty, shaky: Bucket, bucket: Bucket, source: Path, tmp_path: Path, kind: Kind
) -> None:
    stored = bucket.put_file("f", source, {})
    bucket.put_bytes("small", b"right", {})
    proxy.faults = [Fault(kind, "GET .*/f", times=2), Fault(kind, "GET .*/small", times=1)]
    shaky.download(stored, tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == DATA
    assert shaky.get("small") == b"right"
    assert proxy.count("GET .*/f") == 3 + 2 and proxy.count("GET .*/small") == 2


@pytest.mark.parametrize(
    "kind, reason, says",
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
def test_a_read_that_fails_for_good_leaves_no_file(
    proxy: Faulty,
    shaky: Bucket,
    bucket: Bucket,
    source: Path,
    tmp_path: Path,
    kind: Kind,
    reason: str,
    says: str,
) -> None:
    stored = bucket.put_file("f", source, {})
    proxy.faults = [Fault(kind, "GET .*/f")]
    with pytest.raises(StorageError, match=says) as caught:
        shaky.download(stored, tmp_path / "target")
    assert caught.value.reason == reason
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_conditional_put_that_meets_its_own_object_is_ours(proxy: Faulty, shaky: Bucket) -> None:
    proxy.faults = [Fault("lost", "PUT .*/once", times=1)]
    assert shaky.create("once", b"mine", {})
    assert proxy.count("PUT .*/once") == 2


def test_a_conditional_put_that_meets_another_s_object_is_not_ours(
    proxy: Faulty, shaky: Bucket, bucket: Bucket
) -> None:
    bucket.create("once", b"another's", {})
    proxy.faults = [Fault("503", "PUT .*/once", times=1)]
    assert not shaky.create("once", b"mine", {})
    assert bucket.get("once") == b"another's"


def test_a_store_that_ignores_the_condition_is_refused(proxy: Faulty, shaky: Bucket, bucket: Bucket) -> None:
    proxy.faults = [Fault("unconditional", "PUT .*/.probe/")]
    with pytest.raises(
        StorageError, match=r"ignores `If-None-Match: \*`.*Use a store that has conditional PUT"
    ) as caught:
        shaky.probe()
    assert caught.value.reason == "Refused" and not list(bucket.list(""))


def test_a_listing_and_a_removal_survive_faults(proxy: Faulty, shaky: Bucket, bucket: Bucket) -> None:
    for name in "abc":
        bucket.put_bytes(f"d/{name}", b"", {})
    proxy.faults = [Fault("503", "GET .*list-type", times=2), Fault("lost", "DELETE .*/b", times=1)]
    assert shaky.delete_prefix("d") == 3
    assert not list(bucket.list(""))


def test_what_is_refused_is_not_tried_again(proxy: Faulty, shaky: Bucket) -> None:
    with pytest.raises(StorageError, match="there is no such object"):
        shaky.get("not-there")
    assert proxy.count("GET") == 1


def test_no_request_asks_for_what_some_store_lacks(
    proxy: Faulty, shaky: Bucket, source: Path, tmp_path: Path
) -> None:
    shaky.probe()
    stored = shaky.put_file("d/f", source, {"step": "x"})
    shaky.download(stored, tmp_path / "target")
    shaky.write_json("d/progress.json", {})
    shaky.delete_prefix("d")
    assert {request.partition(" ")[0] for request in proxy.requests} == {"PUT", "POST", "GET", "DELETE"}
    for request, headers in zip(proxy.requests, proxy.headers, strict=True):
        extra = [
            name
            for name in headers
            if re.match("x-amz-(checksum|trailer|sdk-checksum|tagging)|if-match|content-encoding", name)
        ]
        assert not extra, request
        assert re.fullmatch(r"[0-9a-f]{64}", headers["x-amz-content-sha256"]), (
            "the store is told what each body must be"
        )
        assert "if-none-match" not in headers or re.match(r"PUT [^?]*/\.probe/", request), request
    assert not proxy.count(r"\?delete"), "removal of many at once wants a checksum that stores disagree on"


UPLOADER = """
import sys
from pathlib import Path
from vpmoe.api.storage import StorageSpec
from vpmoe.storage import Bucket
Bucket.open(StorageSpec(bucket=sys.argv[1])).put_file("f", Path(sys.argv[2]), {})
"""


def test_a_kill_in_mid_upload_leaves_no_object(proxy: Faulty, bucket: Bucket, source: Path) -> None:
    proxy.faults = [Fault("held", "partNumber=3")]
    environment = {**os.environ, "AWS_ENDPOINT_URL": proxy.endpoint}
    uploader = subprocess.Popen([sys.executable, "-c", UPLOADER, bucket.name, source], env=environment)
    try:
        wait_until(lambda: proxy.count("partNumber=") == 3, "all parts are on their way")
    finally:
        uploader.send_signal(signal.SIGKILL)
        uploader.wait()
    proxy.release.set()
    assert not bucket.exists("f") and not list(bucket.list(""))
    bucket.put_file("f", source, {})
    assert [found.size for found in bucket.list("")] == [len(DATA)]
