"""One bucket of an S3-compatible store. Writes record hashes; reads verify them.

It uses only what every store has: plain and multipart PUT, ranged GET, HEAD, LIST, DELETE, and
`If-None-Match: *` on plain PUT. No tags, no If-Match, no checksum trailers. Content is streamed: an upload or
download holds a few blocks, whatever the size. manifest.py defines what a set of objects means.
"""

import contextlib
import hashlib
import json
import logging
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from botocore.exceptions import ClientError

from vpmoe.storage.answers import UnusableAnswer
from vpmoe.storage.blocks import (
    BLOCK,
    Stored,
    block_range,
    hash_bytes,
    in_order,
    join_blocks,
    read_blocks,
    read_range,
)
from vpmoe.storage.client import connect
from vpmoe.storage.errors import Incomplete, Request, StorageError, explain, shown, status_and_code
from vpmoe.storage.listing import ListingFault, entries
from vpmoe.storage.local import written_whole
from vpmoe.storage.ranges import encoded, sent_range
from vpmoe.storage.retries import JOB, Patience, persist

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef

    from vpmoe.api.storage import StorageSpec

log = logging.getLogger(__name__)

THREADS = 16
"""Blocks in flight for one upload or download, each on a connection of its own and in memory. AWS's guide
counts 85 MB/s for a connection of S3; four to a versitygw carried 0.39 GB/s (docs/benchmarks.md)."""

MAX_PARTS = 10_000
"""Limit of S3 on the parts of one upload; with one block a part, 78 GiB an object."""

MAX_METADATA = 2048
"""Limit of S3 on an object's metadata: bytes of all names and values."""

FOLDER = "the folder whose manifest names it"
"""The folder to delete if an object in it was altered. Deleting its manifest alone is not enough, because
records beside it say that its parts are done."""


@dataclass(frozen=True)
class Object:
    """An object as LIST shows it: its key below the bucket's prefix, bytes, ETag without quotes."""

    key: str
    size: int
    etag: str


class Bucket:
    """A bucket below a prefix. All keys are relative to the prefix; `url` gives the whole address.

    Every method raises StorageError if the store refuses, or cannot be reached until the retries end. Threads
    may share a bucket; processes may not: open it after a fork.
    """

    def __init__(
        self, client: "S3Client", name: str, prefix: str, patience: Patience, field: str = "storage.bucket"
    ) -> None:
        self.name = name
        self.field = field
        self.prefix = prefix.strip("/") + "/" if prefix.strip("/") else ""
        self.endpoint = shown(client.meta.endpoint_url)
        self._client = client
        self._patience = patience

    @classmethod
    def open(cls, spec: "StorageSpec", *, patience: Patience = JOB) -> "Bucket":
        """Open the bucket that a run's `storage` describes. Sends nothing; `probe` tests it.

        Credentials come from where AWS tools look (environment, service account), AWS_ENDPOINT_URL overrides
        the spec's endpoint, and AWS_CA_BUNDLE names the authority.
        """
        return cls(connect(spec, patience), spec.bucket, spec.prefix, patience)

    def other(self, name: str, field: str = "storage.bucket") -> "Bucket":
        """Another bucket of the same store, without a prefix. Inputs are in such buckets.

        field: the field of the run that names it, such as dataset.source, for errors.
        """
        return Bucket(self._client, name, "", self._patience, field)

    def url(self, key: str) -> str:
        """s3://bucket/prefix/key"""
        return f"s3://{self.name}/{self.prefix}{key}"

    def probe(self) -> None:
        """Test that the credentials may write, read and delete, and that a conditional PUT works. Removes its
        object."""
        key = f".probe/{uuid.uuid4().hex}"
        self.create(key, b"first", {})
        second = self.create(key, b"second", {})
        self.delete(key)
        if second:
            raise StorageError(
                f"{self.url(key)}: the store at {self.endpoint} ignores `If-None-Match: *` and overwrote an "
                "object, so two writers could "
                "undo each other's work. Use a store that has conditional PUT.",
                "Refused",
            )

    # Writing

    def put_bytes(
        self, key: str, data: bytes, metadata: Mapping[str, str], *, content_type: str | None = None
    ) -> Stored:
        """Write a small object, replacing any. Its sha256 is in its metadata, and `get` verifies it.

        `content_type`: for an object that a browser opens; by default the store's.
        """
        stored = hash_bytes(key, data)
        checked = self._checked(key, {**metadata, "sha256": stored.sha256})
        self._put(key, data, checked, **({"ContentType": content_type} if content_type else {}))
        return stored

    def write_json(self, key: str, value: object, metadata: Mapping[str, str] = {}) -> Stored:
        """Write `value` as JSON, replacing any. For progress.json, which changes."""
        return self.put_bytes(key, json_bytes(value), metadata)

    def create(self, key: str, data: bytes, metadata: Mapping[str, str]) -> bool:
        """Write a small object unless it exists. True if it now holds `data`, written now or before; False if
        it holds something else."""
        metadata = self._checked(key, {**metadata, "sha256": hashlib.sha256(data).hexdigest()})
        try:
            self._put(key, data, metadata, IfNoneMatch="*")
        except AlreadyThere:
            return self.get(key) == data  # a retry meets its own object when the first answer was lost
        return True

    def put_file(self, key: str, path: Path, metadata: Mapping[str, str]) -> Stored:
        """Write a file of any size, replacing any object. Reads it once, a block at a time. The object
        appears whole or not at all.

        Raises StorageError, also for a file of more than MAX_PARTS blocks; OSError if the file cannot be
        read.
        """
        with path.open("rb") as file:
            return self._put_blocks(key, path.stat().st_size, str(path), read_blocks(file), metadata)

    def put_parts(
        self, key: str, size: int, parts: Iterable[bytes | memoryview], metadata: Mapping[str, str]
    ) -> Stored:
        """Write an object of `size` bytes that are in memory, in these parts, as `put_file` does that of a
        file: a block is copied at a time. Raises StorageError."""
        return self._put_blocks(key, size, self.url(key), join_blocks(parts), metadata)

    def _put_blocks(
        self, key: str, size: int, source: str, blocks: Iterator[bytes], metadata: Mapping[str, str]
    ) -> Stored:
        """`source`: what has the content, for a message."""
        if size > MAX_PARTS * BLOCK:
            raise StorageError(
                f"{source}: {size} bytes do not fit into one object. Write it as several files.", "Local"
            )
        first = next(blocks, b"")
        if len(first) < BLOCK:
            return self.put_bytes(key, first, metadata)
        return self._put_multipart(key, chain([first], blocks), metadata)

    def _put(self, key: str, data: bytes, metadata: Mapping[str, str], **further: Any) -> None:
        condition = "IfNoneMatch" in further

        def put() -> None:
            try:
                self._client.put_object(
                    Bucket=self.name, Key=self.prefix + key, Body=data, Metadata=metadata, **further
                )
            except ClientError as error:
                if condition and status_and_code(error)[0] == 412:
                    raise AlreadyThere(key) from error
                raise

        self._persist("PutObject with If-None-Match" if condition else "PutObject", key, put)

    def _put_multipart(self, key: str, blocks: Iterable[bytes], metadata: Mapping[str, str]) -> Stored:
        ours = (
            uuid.uuid4().hex
        )  # tells our object from an earlier one if the answer to the last request is lost
        name, path = self.name, self.prefix + key
        metadata = self._checked(key, {**metadata, "upload": ours})
        size, whole = 0, hashlib.sha256()

        def numbered() -> Iterator[tuple[int, bytes, Future[None]]]:
            nonlocal size
            for number, block in enumerate(blocks, 1):
                size += len(block)
                yield number, block, hashing.submit(whole.update, block)

        def upload(part: tuple[int, bytes, Future[None]]) -> tuple["CompletedPartTypeDef", str]:
            number, block, hashed = part
            answer = self._persist(
                "UploadPart",
                key,
                lambda: self._client.upload_part(
                    Bucket=name, Key=path, UploadId=upload_id, PartNumber=number, Body=block
                ),
            )
            digest = hashlib.sha256(block).hexdigest()
            hashed.result()
            # Quoted and without a proxy's W/, as the store compares it.
            return {"ETag": f'"{etag_of(answer)}"', "PartNumber": number}, digest

        def complete() -> None:
            try:
                self._client.complete_multipart_upload(
                    Bucket=name, Key=path, UploadId=upload_id, MultipartUpload={"Parts": parts}
                )
            except ClientError as error:
                if status_and_code(error)[1] != "NoSuchUpload":
                    raise
                try:
                    found = self._client.head_object(Bucket=name, Key=path)
                except ClientError:
                    raise error from None
                if found["Metadata"].get("upload") != ours:
                    raise

        created = self._persist(
            "CreateMultipartUpload",
            key,
            lambda: self._client.create_multipart_upload(Bucket=name, Key=path, Metadata=metadata),
        )
        upload_id = created["UploadId"]
        try:
            with ThreadPoolExecutor(1) as hashing:  # of the whole, beside reading and sending
                sent = list(in_order(upload, numbered(), THREADS))
            parts = [part for part, _ in sent]
            self._persist("CompleteMultipartUpload", key, complete)
        except BaseException:
            self._abort(key, upload_id)
            raise
        return Stored(key, size, whole.hexdigest(), tuple(digest for _, digest in sent))

    def _abort(self, key: str, upload_id: str) -> None:
        """Free the space of a failed upload. One attempt, because the error to report is that of the
        upload."""
        once = Patience(attempts=1, connect=self._patience.connect, read=self._patience.read)
        try:
            persist(
                lambda: self._client.abort_multipart_upload(
                    Bucket=self.name, Key=self.prefix + key, UploadId=upload_id
                ),
                once,
                self._request("AbortMultipartUpload", key),
            )
        except StorageError as error:
            log.warning(
                "The parts of a failed upload stay until the bucket's lifecycle rule removes them: %s", error
            )

    def _checked(self, key: str, metadata: Mapping[str, str]) -> dict[str, str]:
        size = sum(len(name.encode()) + len(value.encode()) for name, value in metadata.items())
        if size > MAX_METADATA:
            raise StorageError(
                f"{self.url(key)}: metadata of {size} bytes is above S3's {MAX_METADATA}. Shorten the "
                "image's name.",
                "Refused",
            )
        for name, value in metadata.items():
            if not (value.isascii() and value.isprintable()):
                raise StorageError(
                    f"{self.url(key)}: metadata {name}={value!r} is not printable ASCII, and S3 carries "
                    "nothing else.",
                    "Refused",
                )
        return dict(metadata)

    # Reading

    def get(self, key: str) -> bytes:
        """A whole small object, verified against the sha256 in its metadata if it has one. Objects of other
        writers have none."""

        def fetch() -> tuple[bytes, str | None, str]:
            answer = self._client.get_object(Bucket=self.name, Key=self.prefix + key)
            return answer["Body"].read(), answer["Metadata"].get("sha256"), answer.get("ContentEncoding", "")

        def proved() -> tuple[bytes, str | None]:
            data, stated, encoding = self._persist("GetObject", key, fetch)
            found = hashlib.sha256(data).hexdigest()
            if encoding and stated not in (None, found):
                raise encoded(self._request("GetObject", key), encoding)
            return data, None if stated in (None, found) else f"sha256 is {found}, its metadata says {stated}"

        return self._prove(key, proved, "it")

    def get_json(self, key: str) -> Any:
        """The value of a JSON object. Raises StorageError (Altered) if it is not JSON."""
        try:
            return json.loads(self.get(key))
        except (ValueError, RecursionError) as error:  # RecursionError: thousands of nested lists
            raise StorageError(
                f"{self.url(key)}: not JSON ({error}). The object was altered; delete it to have it written "
                "again.",
                "Altered",
            ) from error

    def exists(self, key: str) -> bool:
        """Whether an object with this key exists."""
        try:
            self.head(key)
        except StorageError as error:
            if error.reason != "Missing":
                raise
            return False
        return True

    def list(self, prefix: str, after: str = "") -> Iterator[Object]:
        """All objects whose key starts with `prefix`, sorted by key; only those after the key `after` if it
        is given."""

        def page(start: str, token: str | None) -> Mapping[str, Any]:
            name, wanted = self.name, self.prefix + prefix
            return self._persist(
                "ListObjectsV2",
                prefix,
                lambda: (
                    self._client.list_objects_v2(Bucket=name, Prefix=wanted, StartAfter=start)
                    if token is None
                    else self._client.list_objects_v2(Bucket=name, Prefix=wanted, ContinuationToken=token)
                ),
            )

        try:
            for entry in entries(page, self.prefix + prefix, after and self.prefix + after):
                yield Object(entry["Key"].removeprefix(self.prefix), entry["Size"], etag_of(entry))
        except ListingFault as error:
            raise explain(error, self._request("ListObjectsV2", prefix), "once") from error

    def download(self, stored: Stored, path: Path) -> None:
        """Download an object to `path`. Each block is verified before it is written; `path` appears whole or
        not at all."""
        with written_whole(path, stored.size, self.url(stored.key)) as file:
            for block in self.blocks(stored):
                file.write(block)

    def read(self, stored: Stored, start: int, stop: int) -> bytearray:
        """Bytes [start, stop) of an object. Their blocks are fetched whole and verified."""
        self.check_range(stored.key, start, stop, stored.size)
        if start == stop:
            return bytearray()
        return read_range(lambda index: self.block(stored, index), start, stop, THREADS)

    def blocks(self, stored: Stored) -> Iterator[bytes]:
        """All blocks of an object in order, each verified. An empty object is checked to exist and be
        empty."""
        if stored.size == 0:
            self._prove(stored.key, lambda: (b"", size_fault(self.head(stored.key).size, 0)), FOLDER)
        return in_order(lambda index: self.block(stored, index), range(len(stored.blocks)), THREADS)

    def block(self, stored: Stored, index: int) -> bytes:
        """Block `index` of an object, verified."""

        def proved() -> tuple[bytes, str | None]:
            data, size, _ = self._range(stored.key, *block_range(stored.size, index))
            found, stated = hashlib.sha256(data).hexdigest(), stored.blocks[index]
            return data, size_fault(size, stored.size) or (
                None if found == stated else f"sha256 of block {index} is {found}, its manifest says {stated}"
            )

        return self._prove(stored.key, proved, FOLDER)

    def head(self, key: str) -> Object:
        """Size and ETag of an object. Raises StorageError (Missing) if it does not exist."""
        found = self._persist("HeadObject", key, lambda: self._head(key))
        return Object(key, found["ContentLength"], etag_of(found))

    def metadata(self, key: str) -> dict[str, str]:
        """The metadata of an object, such as Provenance.metadata. Raises StorageError (Missing) if it does
        not exist."""
        found = self._persist("HeadObject", key, lambda: self._head(key))
        return dict(found["Metadata"])

    def _head(self, key: str) -> Mapping[str, Any]:
        """The answer to HEAD. An error of HEAD has no body and so no code; GET is asked for it."""
        try:
            return self._client.head_object(Bucket=self.name, Key=self.prefix + key)
        except (ClientError, UnusableAnswer) as error:
            status, code = status_and_code(error)
            if code or not (300 <= status < 400 or status in (400, 401, 403)):
                raise
            try:
                self._client.get_object(Bucket=self.name, Key=self.prefix + key, Range="bytes=0-0")
            except (ClientError, UnusableAnswer) as told:
                if status_and_code(told)[0] != 416:  # an empty object
                    raise told from error
            raise StorageError(
                f"{self.url(key)}: HeadObject at {self.endpoint} was refused ({status}), although GetObject "
                "is allowed. Allow HEAD in the store's policy and in proxies before it.",
                "Denied",
            ) from error

    def pin(self, found: Object) -> Object:
        """A listed object with the ETag that reads have: some stores list none."""
        return found if found.etag else self.head(found.key)

    def fetch_range(self, wanted: Object, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of an object that another writer made, and that has none of our hashes.

        Raises StorageError (Altered) if the answer's size or ETag is not the expected one, ValueError if the
        range is not in the object.
        """
        self.check_range(wanted.key, start, stop, wanted.size)
        if start == stop:
            return b""
        data, size, etag = self._range(wanted.key, start, stop)
        expected = strong(wanted.etag)  # runs of older versions have recorded a proxy's W/
        if (size, etag) != (wanted.size, expected):
            removed = " A proxy between here and the store may remove ETags." if not etag and expected else ""
            raise StorageError(
                f"{self.url(wanted.key)}: {size} bytes, ETag {etag or '(none)'}, but the run was resolved to "
                f"{wanted.size} bytes, ETag {expected or '(none)'}. "
                f"The input was changed since; restore it, or start a new run.{removed}",
                "Altered",
            )
        return data

    def check_range(self, key: str, start: int, stop: int, size: int) -> None:
        """Raise ValueError unless [start, stop) is a range of an object of `size` bytes."""
        if not 0 <= start <= stop <= size:
            raise ValueError(f"{self.url(key)}: [{start}, {stop}) is not a range of its {size} bytes")

    def _range(self, key: str, start: int, stop: int) -> tuple[bytes, int, str]:
        """The bytes in [start, stop) that exist, the size of the whole object, and its ETag."""

        def fetch() -> tuple[bytes, int, str]:
            try:
                answer = self._client.get_object(
                    Bucket=self.name, Key=self.prefix + key, Range=f"bytes={start}-{stop - 1}"
                )
            except ClientError as error:
                if status_and_code(error)[0] != 416:  # the object ends before `start`
                    raise
                found = self._client.head_object(Bucket=self.name, Key=self.prefix + key)
                return b"", found["ContentLength"], etag_of(found)
            with contextlib.closing(answer["Body"]) as body:
                sent = sent_range(self._request("GetObject", key), answer, start, stop)
                data = body.read()
            if len(data) != sent.stop - sent.start and answer.get("ContentEncoding"):
                raise encoded(self._request("GetObject", key), answer["ContentEncoding"])
            if len(data) != sent.stop - sent.start:
                raise Incomplete(f"{len(data)} of {sent.stop - sent.start} bytes")
            return data, sent.size, etag_of(answer)

        return self._persist("GetObject", key, fetch)

    def _prove(self, key: str, read: Callable[[], tuple[bytes, str | None]], to_delete: str) -> bytes:
        """The result of `read`, verified. Raises StorageError (Altered) if a second read has the same fault.

        A fault that the second read does not have was a transfer error. `to_delete` is the remedy: what to
        delete so that the object is built again.
        """
        data, fault = read()
        if fault:
            data, fault = read()
        if fault:
            raise StorageError(
                f"{self.url(key)}: {fault}. The object was changed after it was written; delete {to_delete} "
                "to have it built again.",
                "Altered",
            )
        return data

    # Removing

    def delete(self, key: str) -> None:
        """Delete an object. It is no error if it does not exist."""

        def delete() -> None:
            try:
                self._client.delete_object(Bucket=self.name, Key=self.prefix + key)
            except ClientError as error:
                if status_and_code(error)[1] != "NoSuchKey":  # some stores say so
                    raise

        self._persist("DeleteObject", key, delete)

    def delete_prefix(self, folder: str) -> int:
        """Delete everything in a folder, manifests first, so that none names a deleted object. Returns the
        number of objects."""
        if not folder.strip("/"):
            raise ValueError(
                "delete_prefix takes the name of a folder: an empty one would remove all runs of all people"
            )
        folder = folder.rstrip("/") + "/"
        keys = [found.key for found in self.list(folder)]
        manifests = [key for key in keys if key.endswith("/manifest.json")]
        others = [key for key in keys if not key.endswith("/manifest.json")]
        return sum(1 for group in (manifests, others) for _ in in_order(self.delete, group, THREADS))

    def _persist[T](self, operation: str, key: str, call: Callable[[], T]) -> T:
        return persist(call, self._patience, self._request(operation, key))

    def _request(self, operation: str, key: str) -> Request:
        return Request(operation, self.url(key), self.endpoint, self.field, self._client.meta.region_name)


class AlreadyThere(Exception):
    """A conditional PUT met an object."""


def size_fault(size: int, stated: int) -> str | None:
    """What is wrong with an object of `size` bytes whose manifest says `stated`; empty if nothing is."""
    return None if size == stated else f"{size} bytes, its manifest says {stated}"


def etag_of(answer: Mapping[str, Any]) -> str:
    """The ETag of an answer without quotes; empty for an object that was put into the store behind its
    back."""
    return strong(str(answer.get("ETag", "")))


def strong(etag: str) -> str:
    """An ETag without quotes, and without the W/ of a proxy that may have compressed the content."""
    return etag.strip().removeprefix("W/").strip('"')


def json_bytes(value: object) -> bytes:
    """JSON as it is stored: sorted keys, no spaces, UTF-8. Equal values have equal bytes."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()
