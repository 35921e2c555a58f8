"""Verify manifests: each object exists, has its size, and every block and the whole have their sha256.

`vpmoe verify` and `python -m vpmoe.storage verify` do it. Endpoint, region and credentials come from the
environment, as for AWS's own tools.

Read-only. Objects that no manifest names are noted and are no error, because readers ignore them. Neither is
a policy version without weights: the trainer removes them when no window needs them.
"""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass

from vpmoe.api.storage import StorageSpec
from vpmoe.storage import manifest
from vpmoe.storage.blocks import Subject
from vpmoe.storage.bucket import Bucket
from vpmoe.storage.errors import StorageError


@dataclass
class Verdict:
    """Sums over all manifests; `failed` counts manifests."""

    manifests: int = 0
    failed: int = 0
    objects: int = 0
    size: int = 0


def open_bucket(name: str) -> Bucket:
    """The bucket of this name, with the region of the environment. Raises StorageError if it is unusable."""
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return Bucket.open(StorageSpec(bucket=name, region=region or StorageSpec.model_fields["region"].default))


def verify(bucket: Bucket, prefix: str, say: Callable[[str], None]) -> Verdict:
    """Verify every manifest in the folder `prefix` ("" is the whole bucket), calling `say` with a line about
    each.

    Raises StorageError if the store fails or there is no manifest (Missing).
    """
    folder = prefix.strip("/") + "/" if prefix.strip("/") else ""
    verdict = Verdict()
    for found in bucket.list(folder):
        if f"/{found.key}".endswith("/manifest.json"):
            _verify_one(bucket, found.key, verdict, say)
    if not verdict.manifests:
        raise StorageError(
            f"{bucket.url(folder)}: there is no manifest. Give the address of a dataset, a run, or a whole "
            "prefix.",
            "Missing",
        )
    say(
        f"{verdict.manifests} manifests, {verdict.objects} objects, {verdict.size} bytes; "
        f"{verdict.failed or 'none'} failed"
    )
    return verdict


def _verify_one(bucket: Bucket, key: str, verdict: Verdict, say: Callable[[str], None]) -> None:
    verdict.manifests += 1
    try:
        found = manifest.load(bucket, key)
    except StorageError as error:
        verdict.failed += 1
        say(f"FAILED {_finding(error)}")
        return
    folder = key.rpartition("manifest.json")[0]
    there = [other for other in bucket.list(folder) if other.key != key]
    if found.kind == "weights" and not any(other.key.endswith(".safetensors") for other in there):
        say(f"note   {bucket.url(key)}: {found.kind}, removed since no window is sampled from them any more")
        return
    faults = [fault for subject in found.subjects.values() if (fault := _fault(bucket, subject))]
    size = sum(subject.size for subject in found.subjects.values())
    verdict.objects += len(found.subjects)
    verdict.size += size
    about = f"{bucket.url(key)}: {found.kind}, {len(found.subjects)} objects, {size} bytes"
    if faults:
        verdict.failed += 1
        say(f"FAILED {about}, {len(faults)} objects wrong")
    else:
        say(f"proved {about}")
    for fault in faults:
        say(f"       {fault}")
    named = {subject.key for subject in found.subjects.values()}
    for other in there:
        if other.key not in named:
            say(f"note   {bucket.url(other.key)}: {other.size} bytes that this manifest does not name")


def _fault(bucket: Bucket, subject: Subject) -> str | None:
    """What is wrong with an object; None if it is as its manifest says."""
    whole = hashlib.sha256()
    try:
        for block in bucket.blocks(subject):
            whole.update(block)
    except StorageError as error:
        return _finding(error)
    if whole.hexdigest() != subject.sha256:
        return (
            f"{bucket.url(subject.key)}: sha256 is {whole.hexdigest()}, its manifest says {subject.sha256} "
            "beside blocks that are right. "
            "The manifest was altered; delete it to have what it names built again."
        )
    return None


def _finding(error: StorageError) -> str:
    """The message of an error about an object. Re-raises an error about the store."""
    if error.reason not in ("Altered", "Missing"):
        raise error
    return str(error)
