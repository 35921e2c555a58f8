"""Reads a step's progress.json from the bucket, with the credentials of the run's own Secret.

A bucket that does not answer is reported in the ProgressReading, not raised: jobs continue without the
operator, and so does the run.
"""

import asyncio
import base64
import hashlib
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from distill_operator.kube import SECRET, Json, Kube
from distill_operator.metrics import STORAGE_FAILURES
from vpmoe.api import DistillRun
from vpmoe.api.progress import Progress
from vpmoe.storage import OPERATOR, Bucket, Credentials, StorageError, paths

THREADS = 4
OPEN_BUCKETS = 64
KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")


@dataclass(frozen=True)
class ProgressReading:
    """One reading of a step's progress report.

    `progress` is None if there is none yet, or if it could not be read.
    """

    progress: Progress | None = None
    attempted: bool = False
    """Whether the bucket was asked."""
    problem: str = ""
    """Why the report could not be read; empty if it could."""
    reason: str = ""
    """The problem as a condition's reason: Unreachable, Denied, Missing, Refused, Altered, SecretMissing
    or NotProgress."""


class SecretMissing(Exception):
    """The Secret with the credentials or the certificates does not exist, or lacks a key."""


class Buckets:
    """Connections to the buckets of runs, cached until a Secret changes.

    Blocking calls run in a few threads.
    """

    def __init__(self, kube: Kube) -> None:
        self._kube = kube
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="storage")
        self._open: OrderedDict[tuple[str, ...], Bucket] = OrderedDict()
        self._opening = asyncio.Lock()
        # boto3 reads certificates from a file, at every connection.
        self._folder = tempfile.TemporaryDirectory(prefix="ca-")

    async def read_progress(self, run: DistillRun, step: str) -> ProgressReading:
        """Read the step's progress.json.

        A missing one is no problem: a step that has just started has not written it yet.
        """
        try:
            bucket = await self._connect(run)
            progress = await self._in_thread(_read_progress, bucket, paths.progress(run, step))
        except SecretMissing as error:
            return ProgressReading(attempted=True, problem=str(error), reason="SecretMissing")
        except StorageError as error:
            STORAGE_FAILURES.labels(error.reason).inc()
            return ProgressReading(attempted=True, problem=str(error), reason=error.reason)
        except ValidationError as error:
            url, why = bucket.url(paths.progress(run, step)), error.errors()[0]["msg"]
            problem = f"{url} is not a progress report: {why}"
            return ProgressReading(attempted=True, problem=problem, reason="NotProgress")
        return ProgressReading(progress, attempted=True)

    async def delete_run_folder(self, run: DistillRun) -> int:
        """Delete the run's folder.

        Returns the number of objects deleted. Raises SecretMissing and StorageError.
        """
        bucket = await self._connect(run)
        return await self._in_thread(bucket.delete_prefix, paths.run(run))

    async def _connect(self, run: DistillRun) -> Bucket:
        """A connection to the run's bucket. Raises SecretMissing."""
        storage, namespace = run.spec.storage, run.metadata.namespace
        secret = await self._secret(namespace, storage.credentials_secret, KEYS)
        ca = await self._secret(namespace, storage.ca_secret, ("ca.crt",))
        versions = [found["metadata"]["resourceVersion"] if found else "" for found in (secret, ca)]
        key = (namespace, storage.model_dump_json(), *versions)
        async with self._opening:  # opening takes 0.2 s of CPU: once for runs that share a bucket
            if key not in self._open:
                self._open[key] = await self._in_thread(
                    _open_bucket, run, secret, ca, Path(self._folder.name)
                )
        self._open.move_to_end(key)
        while len(self._open) > OPEN_BUCKETS:
            self._open.popitem(last=False)
        return self._open[key]

    async def _secret(self, namespace: str, name: str | None, keys: tuple[str, ...]) -> Json | None:
        if name is None:
            return None
        secret = await self._kube.get(SECRET, namespace, name)
        if secret is None:
            raise SecretMissing(
                f"Secret {name} does not exist in namespace {namespace}. "
                f"Create it with the keys {', '.join(keys)}."
            )
        missing = [key for key in keys if not secret.get("data", {}).get(key)]
        if missing:
            raise SecretMissing(
                f"Secret {name} in namespace {namespace} lacks the keys {', '.join(missing)}."
            )
        return secret

    async def _in_thread[**P, T](self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, lambda: call(*args, **kwargs))


def _read_progress(bucket: Bucket, key: str) -> Progress | None:
    try:
        return Progress.model_validate(bucket.get_json(key))
    except StorageError as error:
        if error.reason != "Missing":
            raise
    next(bucket.list(key), None)  # raises if the bucket itself is missing
    return None


def _open_bucket(run: DistillRun, secret: Json | None, ca: Json | None, folder: Path) -> Bucket:
    """Connect with the credentials and certificates of the Secrets.

    Certificates are written to `folder`, in a file named by their hash.
    """
    credentials = Credentials(*(_decode(secret, key) for key in KEYS)) if secret else None
    bundle = None
    if ca is not None:
        certificates = _decode(ca, "ca.crt")
        bundle = folder / hashlib.sha256(certificates.encode()).hexdigest()
        bundle.write_text(certificates)
    return Bucket.open(run.spec.storage, credentials=credentials, ca_bundle=bundle, patience=OPERATOR)


def _decode(secret: Json, key: str) -> str:
    return base64.b64decode(secret["data"][key]).decode()
