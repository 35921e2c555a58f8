"""What a step says about itself: reads its progress.json from the bucket, with the credentials of that run's own Secret.

A bucket that does not answer is a finding, never an error: jobs go on without the operator, and so does the run.
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
    """One look at a step's progress. `asked`: the bucket was asked at all; `problem`: why it did not tell, for people."""

    progress: Progress | None = None
    asked: bool = False
    problem: str = ""
    reason: str = ""
    """The problem in one word: Unreachable, Denied, Missing, Refused, Altered, SecretMissing, NotProgress."""


class SecretMissing(Exception):
    """The Secret that holds the credentials, or the certificates, is not there or lacks a key."""


class Buckets:
    """Connections to the buckets of runs, kept as long as their Secrets do not change. Blocking work happens in a few threads."""

    def __init__(self, kube: Kube) -> None:
        self._kube = kube
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="storage")
        self._open: OrderedDict[tuple[str, ...], Bucket] = OrderedDict()
        self._opening = asyncio.Lock()
        self._folder = tempfile.TemporaryDirectory(
            prefix="ca-"
        )  # boto3 reads certificates from files, at every connection

    async def read(self, run: DistillRun, step: str) -> ProgressReading:
        """The step's progress.json; its absence is no problem, a step that has just started has written none."""
        try:
            bucket = await self.bucket(run)
            progress = await self._in_thread(_read, bucket, paths.progress(run, step))
        except SecretMissing as error:
            return ProgressReading(asked=True, problem=str(error), reason="SecretMissing")
        except StorageError as error:
            STORAGE_FAILURES.labels(error.reason).inc()
            return ProgressReading(asked=True, problem=str(error), reason=error.reason)
        except ValidationError as error:
            problem = f"{bucket.url(paths.progress(run, step))} is not what a job writes: {error.errors()[0]['msg']}"
            return ProgressReading(asked=True, problem=problem, reason="NotProgress")
        return ProgressReading(progress, asked=True)

    async def clear(self, run: DistillRun) -> int:
        """Remove the run's folder; the number of objects removed. Raises SecretMissing and StorageError."""
        bucket = await self.bucket(run)
        return await self._in_thread(bucket.delete_prefix, paths.run(run))

    async def bucket(self, run: DistillRun) -> Bucket:
        """The run's bucket. Raises SecretMissing."""
        storage, namespace = run.spec.storage, run.metadata.namespace
        secret = await self._secret(namespace, storage.credentials_secret, KEYS)
        ca = await self._secret(namespace, storage.ca_secret, ("ca.crt",))
        versions = [found["metadata"]["resourceVersion"] if found else "" for found in (secret, ca)]
        key = (namespace, storage.model_dump_json(), *versions)
        async with self._opening:  # a fifth of a second of CPU: once is enough for runs that share a bucket
            if key not in self._open:
                self._open[key] = await self._in_thread(_open, run, secret, ca, Path(self._folder.name))
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
                f"Secret {name} is not in namespace {namespace}: create it with the keys {', '.join(keys)}"
            )
        missing = [key for key in keys if not secret.get("data", {}).get(key)]
        if missing:
            raise SecretMissing(f"Secret {name} in namespace {namespace} lacks {', '.join(missing)}")
        return secret

    async def _in_thread[**P, T](self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, lambda: call(*args, **kwargs))


def _read(bucket: Bucket, key: str) -> Progress | None:
    try:
        return Progress.model_validate(bucket.get_json(key))
    except StorageError as error:
        if error.reason != "Missing":
            raise
    next(bucket.list(key), None)  # raises where the bucket itself is what is missing
    return None


def _open(run: DistillRun, secret: Json | None, ca: Json | None, folder: Path) -> Bucket:
    """A connection with what the Secrets hold. Certificates become a file in `folder`, named by their hash."""
    credentials = Credentials(*(_text(secret, key) for key in KEYS)) if secret else None
    bundle = None
    if ca is not None:
        certificates = _text(ca, "ca.crt")
        bundle = folder / hashlib.sha256(certificates.encode()).hexdigest()
        bundle.write_text(certificates)
    return Bucket.open(run.spec.storage, credentials=credentials, ca_bundle=bundle, patience=OPERATOR)


def _text(secret: Json, key: str) -> str:
    return base64.b64decode(secret["data"][key]).decode()
