"""Bucket on a real S3 server: objects are verified when they are read, and altered ones are rejected with the
remedy."""

import hashlib
import random
import resource
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from devcluster import certificates
from tests.fakes.fault_proxy import faulty
from tests.fakes.store import S3
from vpmoe.api.storage import StorageSpec
from vpmoe.storage import BLOCK, Bucket, Patience, StorageError, Stored
from vpmoe.storage.bucket import THREADS

MIB = 2**20
SHORT_PATIENCE = Patience(attempts=3, connect=2, read=1, first_pause=0.01, longest_pause=0.02)


def some_bytes(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def put(bucket: Bucket, folder: Path, size: int, key: str = "things/one") -> tuple[Stored, bytes]:
    data = some_bytes(size)
    (folder / "source").write_bytes(data)
    return bucket.put_file(key, folder / "source", {"step": "test"}), data


def stored_file(s3: S3, bucket: Bucket, key: str) -> Path:
    """The file in which the server stores an object."""
    return s3.folder / bucket.name / (bucket.prefix + key)


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 20 * MIB])
def test_an_object_is_read_as_it_was_written(bucket: Bucket, tmp_path: Path, size: int) -> None:
    stored, data = put(bucket, tmp_path, size)
    assert (stored.key, stored.size, stored.sha256) == ("things/one", size, hashlib.sha256(data).hexdigest())
    assert list(stored.blocks) == [
        hashlib.sha256(data[start : start + BLOCK]).hexdigest() for start in range(0, size, BLOCK)
    ]
    bucket.download(stored, tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == data
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


def test_any_range_is_read_as_it_was_written(bucket: Bucket, tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    chance = random.Random(seed)
    stored, data = put(bucket, tmp_path, 2 * BLOCK + chance.randrange(BLOCK))
    borders = [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, stored.size - 1, stored.size]
    for _ in range(12):
        start, stop = sorted(chance.choice([*borders, chance.randrange(stored.size)]) for _ in range(2))
        assert bucket.read(stored, start, stop) == data[start:stop], (seed, start, stop)


def test_a_range_outside_of_the_object_is_a_value_error(bucket: Bucket) -> None:
    with pytest.raises(ValueError, match=r"\[3, 9\) is not a range of its 5 bytes"):
        bucket.read(Stored("x", 5, "", ("",)), 3, 9)


@pytest.mark.parametrize("size", [5, BLOCK + 5])
@pytest.mark.parametrize(
    "change, message",
    [
        pytest.param(
            lambda data: data[:-1] + bytes([data[-1] ^ 1]),
            r"sha256 of block \d is \w{64}, its manifest says \w{64}",
            id="bit",
        ),
        pytest.param(lambda data: data[:-3], r"\d+ bytes, its manifest says \d+", id="truncated"),
        pytest.param(lambda data: data + b"x", r"\d+ bytes, its manifest says \d+", id="longer"),
        pytest.param(lambda data: b"", r"0 bytes, its manifest says \d+", id="emptied"),
    ],
)
def test_an_altered_object_is_rejected(
    s3: S3, bucket: Bucket, tmp_path: Path, size: int, change, message: str
) -> None:
    stored, data = put(bucket, tmp_path, size)
    stored_file(s3, bucket, "things/one").write_bytes(change(data))
    for read in (
        lambda: bucket.download(stored, tmp_path / "target"),
        lambda: bucket.read(stored, size - 1, size),
    ):
        with pytest.raises(
            StorageError,
            match=f"^{bucket.url('things/one')}: {message}. The object was changed after it was written; "
            "delete the folder whose manifest names it to have it built again.$",
        ) as caught:
            read()
        assert caught.value.reason == "Altered" and not caught.value.retriable
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_an_empty_object_that_has_grown_is_rejected(s3: S3, bucket: Bucket, tmp_path: Path) -> None:
    stored, _ = put(bucket, tmp_path, 0)
    stored_file(s3, bucket, "things/one").write_bytes(b"x")
    with pytest.raises(StorageError, match="1 bytes, its manifest says 0"):
        bucket.download(stored, tmp_path / "target")


@pytest.mark.parametrize("size", [0, 5, BLOCK + 5])
def test_a_missing_object_is_named(bucket: Bucket, tmp_path: Path, size: int) -> None:
    stored, _ = put(bucket, tmp_path, size)
    bucket.delete(stored.key)
    with pytest.raises(StorageError, match=f"{bucket.url(stored.key)}: .* there is no such object") as caught:
        bucket.download(stored, tmp_path / "target")
    assert caught.value.reason == "Missing"


def test_a_small_object_is_verified_with_its_metadata(s3: S3, bucket: Bucket) -> None:
    bucket.put_bytes("small", b"right", {})
    assert bucket.get("small") == b"right"
    stored_file(s3, bucket, "small").write_bytes(b"wrong")
    with pytest.raises(
        StorageError,
        match=r"small: sha256 is \w{64}, its metadata says \w{64}\. .*; delete it to have it built",
    ) as caught:
        bucket.get("small")
    assert caught.value.reason == "Altered"


def test_equal_values_are_equal_json_bytes(bucket: Bucket) -> None:
    bucket.write_json("j", {"b": [1, 2.5, None], "a": "ü"})
    assert bucket.get("j") == '{"a":"ü","b":[1,2.5,null]}'.encode()
    assert bucket.get_json("j") == {"a": "ü", "b": [1, 2.5, None]}
    bucket.put_bytes("j", b"{", {})
    with pytest.raises(StorageError, match=f"{bucket.url('j')}: not JSON") as caught:
        bucket.get_json("j")
    assert caught.value.reason == "Altered"


def test_the_first_writer_wins(bucket: Bucket) -> None:
    assert bucket.create("once", b"mine", {})
    assert bucket.create("once", b"mine", {})
    assert not bucket.create("once", b"another's", {})
    assert bucket.get("once") == b"mine"


def test_one_of_several_concurrent_writers_wins(bucket: Bucket) -> None:
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda n: bucket.create("race", b"%d" % n, {}), range(8)))
    assert won.count(True) == 1 and bucket.get("race") == b"%d" % won.index(True)


@pytest.mark.parametrize(
    "metadata, message",
    [
        pytest.param({"image": "x" * 2048}, r"metadata of \d+ bytes is above S3's 2048", id="too-long"),
        pytest.param({"image": "naïve"}, "metadata image='naïve' is not printable ASCII", id="not-ascii"),
        pytest.param({"image": "a\nb"}, "is not printable ASCII", id="line-end"),
    ],
)
@pytest.mark.parametrize("size", [1, BLOCK])
def test_metadata_that_s3_cannot_store_is_rejected(
    bucket: Bucket, tmp_path: Path, metadata: dict[str, str], message: str, size: int
) -> None:
    (tmp_path / "f").write_bytes(bytes(size))
    with pytest.raises(StorageError, match=message):
        bucket.put_file("x", tmp_path / "f", metadata)
    assert not bucket.exists("x")


def test_small_and_large_objects_have_their_metadata(bucket: Bucket, tmp_path: Path) -> None:
    for size in (1, BLOCK + 1):
        stored, _ = put(bucket, tmp_path, size)
        found = bucket._client.head_object(Bucket=bucket.name, Key=bucket.prefix + stored.key)["Metadata"]
        assert found["step"] == "test"


@pytest.mark.parametrize(
    "prefix, below",
    [
        pytest.param("", "", id="root"),
        pytest.param("a/b", "a/b/", id="bare"),
        pytest.param("a/b/", "a/b/", id="slash"),
    ],
)
def test_keys_are_relative_to_the_prefix(
    s3: S3, bucket: Bucket, tmp_path: Path, prefix: str, below: str
) -> None:
    spec = StorageSpec(bucket=bucket.name, endpoint=s3.endpoint).model_copy(update={"prefix": prefix})
    prefixed = Bucket.open(spec)
    prefixed.probe()
    stored, data = put(prefixed, tmp_path, BLOCK + 1, "runs/x")
    assert prefixed.url("runs/x") == f"s3://{bucket.name}/{below}runs/x"
    assert [found.key for found in prefixed.list("runs/")] == ["runs/x"]
    assert [found.key for found in bucket.list("")] == [f"{below}runs/x"]
    assert prefixed.read(stored, 0, stored.size) == data
    assert prefixed.exists("runs/x") and prefixed.head("runs/x").size == BLOCK + 1
    assert prefixed.other(bucket.name).get(f"{below}runs/x") == data
    assert prefixed.delete_prefix("runs") == 1 and not list(bucket.list(""))


def test_a_listing_of_several_pages_is_complete_and_in_order(s3: S3, bucket: Bucket) -> None:
    folder = s3.folder / bucket.name / "many"
    folder.mkdir()
    for number in range(2100):
        (folder / f"{number:05d}").touch()
    assert [found.key for found in bucket.list("many/")] == [f"many/{number:05d}" for number in range(2100)]
    assert [found.key for found in bucket.list("many/0209")] == [
        f"many/{number:05d}" for number in range(2090, 2100)
    ]
    assert [found.key for found in bucket.list("many/", after="many/00998")] == [
        f"many/{number:05d}" for number in range(999, 2100)
    ]
    assert not list(bucket.list("none/")) and not list(bucket.list("many/", after="many/02099"))


def test_deleting_a_folder_keeps_folders_with_the_same_prefix(bucket: Bucket) -> None:
    for key in ("runs/a-1/x", "runs/a-1/deep/y", "runs/a-12/z", "runs/a-1"):
        if key != "runs/a-1":
            bucket.put_bytes(key, b"", {})
    assert bucket.delete_prefix("runs/a-1") == 2
    assert [found.key for found in bucket.list("")] == ["runs/a-12/z"]
    assert bucket.delete_prefix("runs/a-1/") == 0
    for folder in ("", "/"):
        with pytest.raises(ValueError, match="would remove all runs"):
            bucket.delete_prefix(folder)


def test_manifests_are_deleted_before_the_objects_that_they_name(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in ("d/a", "d/manifest.json", "d/z", "d/e/manifest.json", "d/e/part"):
        bucket.put_bytes(key, b"", {})
    deleted: list[str] = []
    delete = bucket.delete
    monkeypatch.setattr(bucket, "delete", lambda key: (deleted.append(key), delete(key)))
    bucket.delete_prefix("d")
    assert set(deleted[:2]) == {"d/manifest.json", "d/e/manifest.json"} and not list(bucket.list(""))


def test_an_input_that_changed_after_it_was_listed_is_rejected(bucket: Bucket, tmp_path: Path) -> None:
    _, data = put(bucket, tmp_path, BLOCK + 3, "input/rows")
    [listed] = bucket.list("input/")
    for start, stop in ((0, 4), (7, 7), (BLOCK - 1, BLOCK + 3), (0, BLOCK + 3)):
        assert bucket.fetch_range(listed, start, stop) == data[start:stop]
    bucket.put_bytes("input/rows", some_bytes(9, seed=1), {})
    for start in (0, BLOCK):
        with pytest.raises(
            StorageError, match=rf"rows: 9 bytes, ETag .*resolved to {BLOCK + 3} bytes.*start a new run"
        ) as caught:
            bucket.fetch_range(listed, start, start + 1)
        assert caught.value.reason == "Altered"


@pytest.fixture
def small_disk() -> Iterator[None]:
    """Limit files of this process to 10 MiB: writing fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10 * MIB, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_named_and_leaves_no_partial_file(
    bucket: Bucket, tmp_path: Path, small_disk: None
) -> None:
    with (tmp_path / "source").open("wb") as file:
        file.truncate(10 * MIB)
    stored = bucket.put_file("big", tmp_path / "source", {})
    (tmp_path / "old").write_bytes(b"before")
    resource.setrlimit(resource.RLIMIT_FSIZE, (9 * MIB, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    with pytest.raises(
        StorageError,
        match=f"{bucket.url('big')}: its {10 * MIB} bytes cannot be written to {tmp_path}/old: .*Free space",
    ):
        bucket.download(stored, tmp_path / "old")
    assert (tmp_path / "old").read_bytes() == b"before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old", "source"]


def test_a_file_too_large_for_one_object_is_rejected_before_it_is_read(
    bucket: Bucket, tmp_path: Path
) -> None:
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(10_000 * BLOCK + 1)
    with pytest.raises(
        StorageError, match=r"huge: 83886080001 bytes do not fit into one object. Write it as several files."
    ):
        bucket.put_file("huge", tmp_path / "huge", {})


def test_content_that_cannot_be_read_to_its_end_leaves_neither_object_nor_parts(bucket: Bucket) -> None:
    """More blocks than are in flight at a time are sent before."""

    def parts() -> Iterator[bytes]:
        for _ in range(THREADS + 2):
            yield bytes(BLOCK)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        bucket.put_parts("f", (THREADS + 3) * BLOCK, parts(), {})
    assert not bucket.exists("f")
    assert not bucket._client.list_multipart_uploads(Bucket=bucket.name).get("Uploads")


def open_bucket(s3: S3, bucket: Bucket, spec: dict[str, str]) -> Bucket:
    return Bucket.open(
        StorageSpec.model_validate({"bucket": bucket.name, "endpoint": s3.endpoint, **spec}),
        patience=SHORT_PATIENCE,
    )


@pytest.mark.parametrize(
    "environment, spec, message",
    [
        pytest.param(
            {"AWS_SECRET_ACCESS_KEY": "hunter2"},
            {},
            r"denied \(403 SignatureDoesNotMatch\). Check that AWS_",
            id="wrong-secret",
        ),
        pytest.param(
            {"AWS_ACCESS_KEY_ID": "nobody"},
            {},
            r"denied \(404 XAdminUserNotFound\).*storage.credentialsSecret",
            id="wrong-key",
        ),
        pytest.param(
            {},
            {"bucket": "not-there"},
            "the bucket does not exist. Create it, or correct storage.bucket",
            id="no-bucket",
        ),
        pytest.param(
            {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"},
            {},
            r"failed 3 times in \d+ s.*storage.endpoint is right",
            id="no-server",
        ),
        pytest.param(
            {"AWS_ENDPOINT_URL": "http://me:hunter2@127.0.0.1:9"},
            {},
            r"at http://127.0.0.1:9 failed",
            id="password-in-endpoint",
        ),
    ],
)
def test_a_failed_probe_names_the_cause_and_the_remedy(
    s3: S3,
    bucket: Bucket,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    spec: dict[str, str],
    message: str,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StorageError, match=message) as caught:
        open_bucket(s3, bucket, spec).probe()
    assert "hunter2" not in str(caught.value) and s3.secret_key not in str(caught.value)
    assert caught.value.retriable == ("AWS_ENDPOINT_URL" in environment)


NO_SERVERS = (
    "host:0",
    "host:65536",
    "host:-1",
    "host:x",
    "host:１",
    "host:1:2",
    "[::1]x:1",
    "[zzz]:1",
    "1.2.3.4.5",
    "10.0.0.256:9000",
    "0",
    "a..b",
    ".a",
    "-a",
    ":9000",
    "é",
    "a%20b",
    "a_b:9000",
)
"""Host and port of endpoints that the CRD accepts."""
CERTIFICATE = b"-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"
NO_CERTIFICATES = {
    "not UTF-8": b"\xff\xfe\x00",
    "empty": b"",
    "DER": b"\x30\x82\x03\x0b\x30\x82\x01\xf3",
    "text": b"see the wiki\n",
    "cut off": CERTIFICATE[:-10],
    "damaged": CERTIFICATE,
    "UTF-16": CERTIFICATE.decode().encode("utf-16"),
}


@pytest.mark.parametrize(
    "environment, spec, message",
    [
        pytest.param({}, {"region": "eu west 3"}, "storage.region 'eu west 3' is not the name", id="region"),
        pytest.param({}, {"region": "é"}, "storage.region 'é' is not the name", id="region-not-ascii"),
        pytest.param(
            {}, {"region": "eu-west-3\n"}, "storage.region 'eu-west-3.n' is", id="region-with-newline"
        ),
        *(
            pytest.param(
                {},
                {"endpoint": f"http://me:hunter2@{server}"},
                r"storage\.endpoint .* is not the address of a server",
                id=server,
            )
            for server in NO_SERVERS
        ),
        pytest.param(
            {"AWS_ENDPOINT_URL": "http://me:hunter2@host:0/path"},
            {},
            "'host:0/path' is not",
            id="environment",
        ),
        pytest.param({}, {"bucket": "a..b"}, "storage.bucket 'a..b' is not the name", id="bucket-with-dots"),
        pytest.param(
            {}, {"bucket": "10.0.0.1"}, "storage.bucket '10.0.0.1' is not", id="bucket-like-an-address"
        ),
        *(
            pytest.param(
                {}, {"prefix": prefix}, "storage.prefix .* has a control character", id=ascii(prefix)
            )
            for prefix in ("..", "../other", "a/../b", "a/./b", "a/..", "\x00", "a\x01b", "\ud800", "a\x7f")
        ),
        pytest.param(
            {},
            {"endpoint": "http://me:hunter2@under_score:9000"},
            r"storage\.endpoint .*: 'under_score:9000' is not the address",
            id="host-name",
        ),
        pytest.param(
            {}, {"endpoint": "http://[::1"}, r"storage\.endpoint .*\[::1' is not the address", id="brackets"
        ),
        pytest.param(
            {"AWS_ACCESS_KEY_ID": "me\n"}, {}, "AWS_ACCESS_KEY_ID contains a line break", id="newline-in-key"
        ),
        pytest.param({"AWS_SESSION_TOKEN": "hunter2\n"}, {}, "AWS_SESSION_TOKEN contains", id="token"),
        *(
            pytest.param(
                {"AWS_SECRET_ACCESS_KEY": secret},
                {},
                r"AWS_SECRET_ACCESS_KEY contains a line break.*storage\.credentialsSecret",
                id=f"secret-{secret!a}",
            )
            for secret in (
                *(f"hunter2{end}" for end in ("\n", "\r\n", "\t", " ", "é", "\udcff")),
                "\ufeffhunter2",
            )
        ),
        pytest.param({"AWS_ACCESS_KEY_ID": ""}, {}, "AWS_ACCESS_KEY_ID is empty", id="empty-key"),
        pytest.param({"AWS_SECRET_ACCESS_KEY": ""}, {}, "AWS_SECRET_ACCESS_KEY is empty", id="empty-secret"),
        *(
            pytest.param(
                {"AWS_CA_BUNDLE": name},
                {},
                r"holds no certificates.*storage\.caSecret",
                id=f"certificates-{name}",
            )
            for name in NO_CERTIFICATES
        ),
    ],
)
def test_what_no_store_can_accept_is_named_before_anything_is_sent(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    spec: dict[str, str],
    message: str,
) -> None:
    for name, content in NO_CERTIFICATES.items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StorageError, match=message) as caught:
        Bucket.open(StorageSpec.model_validate({"bucket": "vpmoe", **spec}), patience=SHORT_PATIENCE)
    assert "hunter2" not in str(caught.value) and not caught.value.retriable


@pytest.mark.parametrize(
    "endpoint",
    [
        "http://127.0.0.1:9000",
        "http://me:hunter2@store",
        "https://s3.eu-west-3.example.com.",
        "http://[::1]:9000/",
        "http://[fe80::1%25eth0]:65535",
        "http://minio.team-a.svc:01",
        "http://xn--bcher-kva.example",
        "http://s3.1password.com",
    ],
)
def test_every_address_of_a_server_is_accepted(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    assert "hunter2" not in Bucket.open(StorageSpec(bucket="vpmoe", endpoint=endpoint)).endpoint


def test_a_key_without_its_secret_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "me")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY", raising=False)
    with pytest.raises(
        StorageError, match="Set both of AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    ) as caught:
        Bucket.open(StorageSpec(bucket="vpmoe"))
    assert not caught.value.retriable


def test_a_bucket_name_that_the_store_rejects_is_named(s3: S3, bucket: Bucket) -> None:
    with pytest.raises(StorageError, match=r"InvalidBucketName.*Correct storage\.bucket") as caught:
        bucket.other("-none").get("key")
    assert not caught.value.retriable


def test_missing_credentials_are_named(s3: S3, bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    with pytest.raises(
        StorageError, match=r"no credentials\. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; a pod"
    ):
        open_bucket(s3, bucket, {}).probe()


def test_a_probe_leaves_no_object(bucket: Bucket) -> None:
    bucket.probe()
    assert not list(bucket.list(""))


@pytest.mark.parametrize(
    "style, address",
    [
        ("path", "https://s3.example.com/vpmoe/k"),
        ("virtual", "https://vpmoe.s3.example.com/k"),
        ("auto", "https://s3.example.com/vpmoe/k"),
    ],
)
def test_addressing_and_region_are_those_of_the_run(
    monkeypatch: pytest.MonkeyPatch, style: str, address: str
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    spec = StorageSpec.model_validate(
        {
            "endpoint": "https://s3.example.com",
            "bucket": "vpmoe",
            "region": "eu-central-7",
            "addressingStyle": style,
        }
    )
    client = Bucket.open(spec)._client
    url, _, query = client.generate_presigned_url("get_object", {"Bucket": "vpmoe", "Key": "k"}).partition(
        "?"
    )
    assert url == address and "%2Feu-central-7%2Fs3%2F" in query


@pytest.fixture(scope="module")
def certificates_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a certificate authority (ca) and a certificate for 127.0.0.1 (store)."""
    folder = tmp_path_factory.mktemp("tls")
    certificates.authority(folder, "test")
    certificates.certificate(folder, "store", "/CN=store", "subjectAltName=IP:127.0.0.1")
    return folder


def test_a_store_with_a_private_certificate_authority_is_trusted_once_it_is_named(
    s3: S3, bucket: Bucket, certificates_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    with faulty(s3.endpoint, certificate=certificates_folder / "store") as store:
        spec = StorageSpec(bucket=bucket.name, endpoint=store.endpoint)
        with pytest.raises(
            StorageError,
            match=r"certificate is not trusted .*storage.caSecret \(or AWS_CA_BUNDLE\) holds the certificate",
        ):
            Bucket.open(spec, patience=SHORT_PATIENCE).probe()
        monkeypatch.setenv("AWS_CA_BUNDLE", str(certificates_folder / "ca.crt"))
        Bucket.open(spec, patience=SHORT_PATIENCE).probe()


def test_the_endpoint_of_the_environment_overrides_that_of_the_run(s3: S3, bucket: Bucket) -> None:
    Bucket.open(
        StorageSpec(bucket=bucket.name, endpoint="http://127.0.0.1:9"), patience=SHORT_PATIENCE
    ).probe()
