"""Answers of a store that says no, and of what is no S3 store: a real S3 server whose answers are edited on
the way. Each message names bucket or object, endpoint, answer and remedy."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fakes.fault_proxy import Fault, FaultProxy, Response, faulty
from vpmoe.api.storage import StorageSpec
from vpmoe.storage import BLOCK, Bucket, Patience, StorageError
from vpmoe.storage.bucket import Object

SHORT_PATIENCE = Patience(attempts=3, connect=2, read=2, first_pause=0.01, longest_pause=0.02)

type Edit = Callable[[Response], Response]


@pytest.fixture(scope="module")
def proxy_and_bucket(s3: object) -> Iterator[tuple[FaultProxy, Bucket]]:
    """A proxy and one connection through it, shared by the tests of this module."""
    with faulty(s3.endpoint) as proxy, pytest.MonkeyPatch.context() as environment:  # type: ignore[attr-defined]
        environment.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy, Bucket.open(StorageSpec(bucket="none"), patience=SHORT_PATIENCE)


@pytest.fixture
def proxy(proxy_and_bucket: tuple[FaultProxy, Bucket]) -> FaultProxy:
    """The proxy, without faults and recorded requests."""
    proxy_and_bucket[0].reset()
    return proxy_and_bucket[0]


@pytest.fixture
def proxied(proxy_and_bucket: tuple[FaultProxy, Bucket], bucket: Bucket) -> Bucket:
    """The test's bucket, through the proxy."""
    return proxy_and_bucket[1].other(bucket.name)


def answer(status: int, headers: dict[str, str], body: bytes = b"") -> Edit:
    """An answer of another program than the store."""
    return lambda given: (status, dict(headers), body)


def error(status: int, code: str, rest: str = "", headers: dict[str, str] | None = None) -> Edit:
    """An answer of an S3 store with its error document."""
    document = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code>{rest}</Error>'
    return answer(status, {"content-type": "application/xml", **(headers or {})}, document.encode())


def page(status: int, title: str = "", server: str = "nginx", start: str = "<!DOCTYPE html>\n<html>") -> Edit:
    """An HTML page."""
    body = f"{start}<head><title>{title}</title></head><body>{'.' * 3000}</body></html>"
    return answer(status, {"content-type": "text/html; charset=utf-8", "server": server}, body.encode())


def without(name: str) -> Edit:
    """The store's answer without a header."""
    return lambda given: (given[0], {key: v for key, v in given[1].items() if key != name}, given[2])


def operations(bucket: Bucket, path: Path) -> dict[str, Callable[[], object]]:
    """One call for each request that we send, by a pattern of the request."""
    thing = Object("thing", 5, "e")
    return {
        "PUT .*/small": lambda: bucket.put_bytes("small", b"x", {}),
        "PUT .*/once": lambda: bucket.create("once", b"x", {}),
        "POST .*uploads": lambda: bucket.put_file("large", path, {}),
        "PUT .*partNumber=1": lambda: bucket.put_file("large", path, {}),
        "POST .*uploadId": lambda: bucket.put_file("large", path, {}),
        "GET .*list-type=2": lambda: list(bucket.list("x")),
        "(GET|HEAD) .*/thing": lambda: bucket.head("thing"),
        "GET .*/thing": lambda: bucket.fetch_range(thing, 1, 3),
        "GET .*/whole": lambda: bucket.get("whole"),
        "DELETE .*/small": lambda: bucket.delete("small"),
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "large").write_bytes(bytes(BLOCK + 1))
    return tmp_path / "large"


def message_of(call: Callable[[], object]) -> StorageError:
    with pytest.raises(StorageError) as caught:
        call()
    return caught.value


HTTPS = {"location": "https://store.example/bucket/key?X-Amz-Signature=hunter2"}
EUROPE = {"x-amz-bucket-region": "eu-central-7"}
TOKEN = "the token has expired.*AWS_SESSION_TOKEN.*storage.credentialsSecret"
FOREIGN = r"not answered by an S3 store \(%s.*Correct the endpoint"
FULL = "the store is full.*Free space"
QUOTA = "a quota of the store is used up.*quota enlarged"
GLACIER = r"archived \(storage class GLACIER\).*restore-object"
CAUSES: dict[str, tuple[Edit, str, str]] = {
    # Redirects
    "301-region-header": (
        error(301, "PermanentRedirect", headers=EUROPE),
        "Refused",
        "region, eu-central-7.*Set storage.region",
    ),
    "301-endpoint": (
        error(301, "PermanentRedirect", "<Endpoint>s3.eu.example</Endpoint>"),
        "Refused",
        r"301.*storage\.region",
    ),
    "301-https": (page(301), "Refused", "redirected to another address"),
    "302-login": (
        answer(302, {"location": "https://login.corp.example/?next=%2F&token=hunter2"}),
        "Refused",
        r"login\.corp\.example \(302\).*The endpoint is https",
    ),
    "303-http": (
        answer(303, {"location": "http://me:hunter2@login.corp.example/sso"}),
        "Refused",
        r"the answer is none of S3.*NO_PROXY",
    ),
    "307-https": (
        answer(307, HTTPS),
        "Refused",
        r"https://store\.example \(307\).*The endpoint is https: write storage.endpoint",
    ),
    "307-temporary": (
        error(307, "TemporaryRedirect", "<Endpoint>b.s3.eu.example</Endpoint>"),
        "Refused",
        r"307.*storage\.endpoint",
    ),
    "308-https": (
        answer(308, HTTPS, b"<html>Permanent Redirect</html>"),
        "Refused",
        "308.*The endpoint is https",
    ),
    "308-empty": (answer(308, {}), "Refused", r"308.*storage\.region or storage\.endpoint"),
    "400-region": (
        error(400, "AuthorizationHeaderMalformed", "<Region>ap-5</Region>"),
        "Refused",
        "another region, ap-5.*Set storage.region to ap-5",
    ),
    # Tokens
    "token-400": (error(400, "ExpiredToken"), "Denied", TOKEN),
    "token-403": (error(403, "ExpiredToken"), "Denied", TOKEN),
    "token-invalid-400": (error(400, "InvalidToken"), "Denied", TOKEN),
    "token-invalid-403": (error(403, "InvalidToken"), "Denied", TOKEN),
    "token-refresh": (error(400, "TokenRefreshRequired"), "Denied", TOKEN),
    "token-exception": (error(401, "ExpiredTokenException"), "Denied", TOKEN),
    "token-text": (
        error(403, "AccessDenied", "<Message>The provided token has expired.</Message>"),
        "Denied",
        TOKEN,
    ),
    # Clocks
    "clock": (
        error(403, "RequestTimeTooSkewed", headers={"date": "Sat, 01 Jan 2000 00:00:00 GMT"}),
        "Denied",
        r"clock.*s later than its answer's date.*Set the clock",
    ),
    "clock-expired": (error(400, "RequestExpired"), "Denied", "clock.*Set the clock"),
    "clock-text": (error(403, "AccessDenied", "<Message>Request has expired</Message>"), "Denied", "clock"),
    # Quotas and full disks
    "quota-ceph": (error(403, "QuotaExceeded"), "Refused", QUOTA),
    "quota-minio": (error(400, "XMinioAdminBucketQuotaExceeded"), "Refused", QUOTA),
    "quota-swift": (
        error(413, "EntityTooLarge", "<Message>Upload exceeds quota.</Message>"),
        "Refused",
        QUOTA,
    ),
    "quota-text": (
        error(500, "InternalError", "<Message>write: disk quota exceeded</Message>"),
        "Refused",
        QUOTA,
    ),
    "quota-edquot": (error(500, "InternalError", "<Message>EDQUOT: 122</Message>"), "Refused", QUOTA),
    "full-minio": (error(507, "XMinioStorageFull"), "Refused", FULL),
    "full-507": (answer(507, {}), "Refused", FULL),
    "full-507-page": (page(507, "Insufficient Storage"), "Refused", FULL),
    "full-code": (error(503, "InsufficientStorage"), "Refused", FULL),
    "full-text": (
        error(500, "InternalError", "<Message>open x: no space left on device</Message>"),
        "Refused",
        FULL,
    ),
    # Archived objects
    "archived": (
        error(403, "InvalidObjectState", "<StorageClass>GLACIER</StorageClass>"),
        "Refused",
        GLACIER,
    ),
    "archived-400": (error(400, "InvalidObjectState"), "Refused", "archived.*restore-object"),
    # Proxies and other services
    "login-200": (page(200, "Sign in - Corp"), "Refused", FOREIGN % "200.*" + ".*NO_PROXY"),
    "login-xhtml": (
        page(200, start='<?xml version="1.0"?><!DOCTYPE html PUBLIC "-//W3C"><html>'),
        "Refused",
        FOREIGN % "200",
    ),
    "login-511": (page(511, "Login"), "Refused", "a proxy .*wants a login.*NO_PROXY"),
    "page-403": (page(403, "Blocked by policy"), "Refused", FOREIGN % "403"),
    "page-404": (page(404), "Refused", FOREIGN % "404"),
    "page-405": (page(405), "Refused", FOREIGN % "405"),
    "page-407": (page(407), "Refused", r"a proxy .*wants a login \(407.*HTTP_PROXY"),
    "empty-407": (answer(407, {"proxy-authenticate": "Basic"}), "Refused", r"a proxy .*wants a login \(407"),
    "page-413": (page(413), "Refused", r"body is too large \(413.*client_max_body_size"),
    "page-502": (
        page(502, "Bad Gateway"),
        "Unreachable",
        r"failed 3 times in \d+ s, last with 502 of a proxy or another service \(text/html",
    ),
    "page-503-xhtml": (
        page(503, start='<?xml version="1.0"?><!DOCTYPE html><html>'),
        "Unreachable",
        "failed 3 times.* last with 503 of a proxy",
    ),
    "json-404": (
        answer(404, {"content-type": "application/json"}, b'{"detail":"Not Found"}'),
        "Refused",
        FOREIGN % "404, application/json",
    ),
    "json-200": (
        answer(200, {"content-type": "application/json"}, b'{"status":"ok"}'),
        "Refused",
        "200, application/json.*correct|Correct",
    ),
    "json-401": (answer(401, {"content-type": "application/json"}, b"{}"), "Refused", FOREIGN % "401"),
    "soap-400": (
        answer(400, {"content-type": "text/xml"}, b"<?xml version='1.0'?><soap:Envelope/>"),
        "Refused",
        "400",
    ),
    "tls-go": (
        answer(400, {}, b"Client sent an HTTP request to an HTTPS server.\n"),
        "Refused",
        "The endpoint is https",
    ),
    "tls-nginx": (
        answer(
            400,
            {"content-type": "text/html"},
            b"<html><head><title>400 The plain HTTP request was sent to HTTPS port</title>",
        ),
        "Refused",
        "The endpoint is https",
    ),
    # Other answers
    "no-bucket": (
        error(404, "NoSuchBucket"),
        "Missing",
        r"404 NoSuchBucket: the bucket does not exist.*storage\.bucket",
    ),
    "denied": (error(403, "AccessDenied"), "Denied", r"denied \(403 AccessDenied\).*this request needs s3:"),
    "long-code": (error(400, "x" * 5000), "Refused", r"refused \(400 x+…\)"),
    "slow": (error(503, "SlowDown"), "Unreachable", "last with 503 SlowDown.*fewer requests"),
    "body": (error(400, "XAmzContentSHA256Mismatch"), "Refused", "failed 3 times.*changed or cut"),
}
"""Edited answer; reason; message."""


@pytest.mark.parametrize("name", CAUSES)
def test_an_answer_is_explained_for_every_request(
    proxy: FaultProxy, proxied: Bucket, bucket: Bucket, path: Path, name: str
) -> None:
    edit, reason, message = CAUSES[name]
    for request, call in operations(proxied, path).items():
        if name.startswith(("quota", "full")) and not request.startswith(("PUT", "POST")):
            continue  # a full store is read as before
        if name in ("no-bucket", "slow") and "HEAD" in request:
            continue  # an answer to HEAD has no code, and GET is asked only if the status says too little
        proxy.reset()
        bucket.put_bytes("thing", b"12345", {})
        proxy.faults = [Fault("answered", request, edit=edit)]
        found = message_of(call)
        text = str(found)
        assert found.reason == reason, (request, text)
        assert re.search(message, text, re.IGNORECASE), (request, text)
        assert text.startswith(f"s3://{bucket.name}/") and f" at {proxy.endpoint}" in text, text
        assert len(text) < 800 and text.isprintable() and "hunter2" not in text, text
        if (
            "region" not in name and "HEAD" not in request
        ):  # botocore follows to a region, and asks HEAD for it
            assert proxy.count(request) == (3 if "failed 3 times" in text else 1), (request, proxy.requests)


@pytest.mark.parametrize(
    "field", ["dataset.source", "teacher.model", "evaluation.canary", "student.init.checkpoint", "resumeFrom"]
)
def test_a_bucket_that_another_field_names_is_told_apart(
    proxy: FaultProxy, proxied: Bucket, bucket: Bucket, field: str
) -> None:
    missing = message_of(lambda: list(bucket.other("not-there", field).list("")))
    assert re.search(
        rf"s3://not-there/: .*does not exist\. Correct {re.escape(field)} or storage\.endpoint", str(missing)
    )
    proxy.faults = [Fault("answered", "GET", edit=error(403, "AccessDenied"))]
    denied = message_of(lambda: proxied.other(bucket.name, field).get("x"))
    assert re.search(rf"may list and read in this bucket \({re.escape(field)}\).*s3:GetObject", str(denied))
    unnamed = message_of(lambda: bucket.other("-none", field).get("key"))
    assert f"Correct {field}." in str(unnamed)


def test_head_that_alone_is_forbidden_is_named(proxy: FaultProxy, proxied: Bucket, bucket: Bucket) -> None:
    for key, data in (("full", b"12345"), ("empty", b"")):
        bucket.put_bytes(key, data, {})
        proxy.faults = [Fault("answered", "HEAD", edit=answer(403, {}))]
        found = message_of(lambda key=key: proxied.head(key))
        assert re.search(r"HeadObject at .* refused \(403\), although GetObject is allowed", str(found))


WEAK: dict[str, Edit] = {
    "weak": lambda given: (given[0], {**given[1], "etag": f"W/{given[1].get('etag', '')}"}, given[2]),
    "weak-unquoted": lambda given: (
        given[0],
        {**given[1], "etag": "W/" + given[1].get("etag", "").strip('"')},
        given[2],
    ),
    "unquoted": lambda given: (given[0], {**given[1], "etag": given[1].get("etag", "").strip('"')}, given[2]),
    "weak-in-body": lambda given: (given[0], given[1], given[2].replace(b"<ETag>", b"<ETag>W/")),
    "unquoted-in-body": lambda given: (
        given[0],
        given[1],
        given[2].replace(b"&#34;", b"").replace(b"&quot;", b""),
    ),
    "none-in-a-listing": lambda given: (given[0], given[1], re.sub(rb"<ETag>.*?</ETag>", b"", given[2])),
}


@pytest.mark.parametrize("name", WEAK)
@pytest.mark.parametrize("size", [5, BLOCK + 5])
def test_an_etag_may_be_written_in_any_way(
    proxy: FaultProxy, proxied: Bucket, bucket: Bucket, tmp_path: Path, name: str, size: int
) -> None:
    (tmp_path / "source").write_bytes(bytes(size))
    methods = "GET .*list-type" if "body" in name or "listing" in name else "^(PUT|HEAD|GET [^?]*(\\?x-id|$))"
    proxy.faults = [Fault("edited", methods, edit=WEAK[name])]
    proxied.put_file("source", tmp_path / "source", {})
    [listed] = proxied.list("source")
    pinned = proxied.pin(listed)
    assert pinned == bucket.head("source")
    assert proxied.fetch_range(pinned, 1, 4) == bytes(3)
    assert proxied.fetch_range(Object("source", size, f'W/"{pinned.etag}'), 1, 4) == bytes(3), (
        "as old runs have it"
    )


def test_an_answer_without_etag_is_named(
    proxy: FaultProxy, proxied: Bucket, bucket: Bucket, path: Path
) -> None:
    bucket.put_bytes("thing", b"12345", {})
    listed = bucket.head("thing")
    proxy.faults = [Fault("edited", ".", edit=without("etag"))]
    read = message_of(lambda: proxied.fetch_range(listed, 0, 2))
    assert read.reason == "Altered" and "ETag (none), but" in str(read) and "may remove ETags" in str(read)
    for call in (lambda: proxied.put_bytes("thing", b"1", {}), lambda: proxied.put_file("large", path, {})):
        stored = message_of(call)
        assert stored.reason == "Refused" and "answered without an ETag (200" in str(stored)


RANGES: dict[str, tuple[Edit, str]] = {
    "ignored": (
        lambda given: (200, {k: v for k, v in given[1].items() if k != "content-range"}, b"0123456789"),
        "got 0 to 9 of 10",
    ),
    "other-start": (
        lambda given: (206, {**given[1], "content-range": "bytes 0-3/10"}, b"0123"),
        "got 0 to 3 of 10",
    ),
    "short": (lambda given: (206, {**given[1], "content-range": "bytes 2-3/10"}, b"23"), "got 2 to 3 of 10"),
    "long": (
        lambda given: (206, {**given[1], "content-range": "bytes 2-9/10"}, b"23456789"),
        "got 2 to 9 of 10",
    ),
    "unknown-size": (
        lambda given: (206, {**given[1], "content-range": "bytes 2-5/*"}, b"2345"),
        "Content-Range of the answer is 'bytes 2-5/.'",
    ),
    "malformed": (
        lambda given: (206, {**given[1], "content-range": "2-5\x01"}, b"2345"),
        "Content-Range of the answer is '2-5",
    ),
    "cut": (
        lambda given: (206, {**given[1], "content-range": "bytes 2-5/10"}, b"23"),
        r"failed 3 times.*last with Incomplete",
    ),
}


@pytest.mark.parametrize("name", RANGES)
def test_a_range_is_never_taken_for_another(
    proxy: FaultProxy, proxied: Bucket, bucket: Bucket, name: str
) -> None:
    edit, message = RANGES[name]
    bucket.put_bytes("thing", b"0123456789", {})
    listed = bucket.head("thing")
    proxy.faults = [Fault("edited", "GET", edit=edit)]
    found = message_of(lambda: proxied.fetch_range(listed, 2, 6))
    assert re.search(message, str(found)), str(found)
    proxy.reset()
    assert proxied.fetch_range(listed, 2, 6) == b"2345"
    proxy.faults = [Fault("edited", "GET", edit=RANGES["ignored"][0])]
    assert proxied.fetch_range(listed, 0, 10) == b"0123456789", "the whole object needs no range"


def replaced(pattern: bytes, by: bytes) -> Edit:
    """The store's answer with another body."""
    return lambda given: (given[0], given[1], re.sub(pattern, by, given[2]))


def with_header(name: str, value: str) -> Edit:
    return lambda given: (given[0], {**given[1], name: value}, given[2])


LIST, NEW_UPLOAD = "GET .*list-type=2", "POST .*uploads"
MALFORMED: dict[str, tuple[str, Edit]] = {
    "size-no-number": (LIST, replaced(rb"<Size>\d+", b"<Size>many")),
    "size-fraction": (LIST, replaced(rb"<Size>(\d+)", rb"<Size>\1.0")),
    "size-negative": (LIST, replaced(rb"<Size>", b"<Size>-")),
    "truncated-in-capitals": (LIST, replaced(rb"<IsTruncated>false", b"<IsTruncated>True")),
    "truncated-by-number": (LIST, replaced(rb"<IsTruncated>false", b"<IsTruncated>1")),
    "no-upload-id": (NEW_UPLOAD, replaced(rb"<UploadId>.*?</UploadId>", b"")),
    "empty-upload-id": (NEW_UPLOAD, replaced(rb"<UploadId>.*?</UploadId>", b"<UploadId></UploadId>")),
    "head-without-length": ("HEAD", without("content-length")),
    "head-length-no-number": ("HEAD", with_header("content-length", "many")),
    "head-empty": ("HEAD", answer(200, {})),
    "head-204": ("HEAD", answer(204, {})),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_an_answer_that_lacks_what_is_read_from_it_is_named(
    proxy: FaultProxy, proxied: Bucket, bucket: Bucket, path: Path, name: str
) -> None:
    request, edit = MALFORMED[name]
    bucket.put_bytes("x", b"1", {})
    call = {
        LIST: lambda: list(proxied.list("x")),
        NEW_UPLOAD: lambda: proxied.put_file("large", path, {}),
        "HEAD": lambda: proxied.exists("x"),
    }[request]
    call()
    proxy.faults = [Fault("edited", request, edit=edit)]
    found = message_of(call)
    assert found.reason == "Refused" and re.search("without S3's content.*correct the endpoint", str(found))


@pytest.mark.parametrize("time", ["never", "", "0", "2026-99-99T00:00:00Z", "32503680000000000000"])
def test_times_of_objects_do_not_matter(
    proxy: FaultProxy, proxied: Bucket, bucket: Bucket, time: str
) -> None:
    bucket.put_bytes("x", b"1", {})
    proxy.faults = [
        Fault("edited", LIST, edit=replaced(rb"<LastModified>.*?<", f"<LastModified>{time}<".encode())),
        Fault("edited", ".", edit=with_header("last-modified", time)),
    ]
    (listed,) = proxied.list("x")
    assert proxied.head("x") == listed and proxied.get("x") == proxied.fetch_range(listed, 0, 1) == b"1"


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate"])
def test_a_proxy_that_compresses_is_named(
    proxy: FaultProxy, proxied: Bucket, bucket: Bucket, encoding: str
) -> None:
    bucket.put_bytes("thing", b"0123456789", {})
    listed = bucket.head("thing")
    proxy.faults = [
        Fault(
            "edited",
            "GET",
            edit=lambda given: (*with_header("content-encoding", encoding)(given)[:2], b"zip"),
        )
    ]
    for call in (lambda: proxied.get("thing"), lambda: proxied.fetch_range(listed, 2, 6)):
        assert re.search(f"Content-Encoding is '{encoding}'. A proxy .*compresses", str(message_of(call)))


def test_what_was_stored_compressed_is_read_as_it_is(
    proxy: FaultProxy, proxied: Bucket, bucket: Bucket
) -> None:
    bucket.put_bytes("thing", b"0123456789", {})
    proxy.faults = [Fault("edited", "GET", edit=with_header("content-encoding", "gzip"))]
    assert proxied.get("thing") == b"0123456789"
    assert proxied.fetch_range(bucket.head("thing"), 2, 6) == b"2345"


def test_a_store_that_finds_nothing_to_delete_is_no_error(proxy: FaultProxy, proxied: Bucket) -> None:
    proxy.faults = [Fault("answered", "DELETE", edit=error(404, "NoSuchKey"))]
    proxied.delete("gone")


def test_an_upload_that_a_lifecycle_rule_removed_is_named(
    proxy: FaultProxy, proxied: Bucket, path: Path
) -> None:
    proxy.faults = [Fault("answered", "POST .*uploadId", edit=error(404, "NoSuchUpload"))]
    found = message_of(lambda: proxied.put_file("new", path, {}))
    assert "upload was removed while it ran" in str(found)


def test_no_request_waits_for_100_continue(proxy: FaultProxy, proxied: Bucket, path: Path) -> None:
    proxied.probe()
    proxied.put_file("large", path, {})
    proxied.put_bytes("empty", b"", {})
    proxied.write_json("progress.json", {})
    assert len(proxy.headers) == len(proxy.requests) > 8
    assert not [headers for headers in proxy.headers if "expect" in headers]


def test_an_error_behind_status_200_is_tried_again(
    proxy: FaultProxy, proxied: Bucket, bucket: Bucket, path: Path
) -> None:
    edit = error(200, "InternalError")
    proxy.faults = [Fault("answered", "POST .*uploadId", times=2, edit=edit)]
    assert proxied.put_file("large", path, {}).size == BLOCK + 1 == bucket.head("large").size
    proxy.faults = [Fault("answered", "GET .*list-type", edit=edit)]
    found = message_of(lambda: list(proxied.list("large")))
    assert found.retriable and "failed 3 times" in str(found) and "200 InternalError" in str(found)
