"""A run, given the address of its folder in the bucket: for commands that people start, outside a pod."""

import os
import re

from vpmoe.api import DistillRun, Stage
from vpmoe.api.storage import StorageSpec
from vpmoe.failure import Permanent
from vpmoe.storage import Bucket, StorageError, paths

RUN_FOLDER = re.compile(r"(?:(?P<prefix>.+)/)?(?P<folder>runs/[^/]+/[^/]+-(?P<uid8>[0-9a-f]{8}))/?")


def open_run(url: str, store: StorageSpec | None = None) -> tuple[DistillRun, Bucket]:
    """The run in the folder at `url` and its bucket. Endpoint, region and credentials come from the
    environment, as for AWS's own tools; what it does not name, from `store`.

    Raises Permanent if it is no run's folder, Invalid if its run.json is no DistillRun, StorageError.
    """
    name, key = _split(url)
    found = RUN_FOLDER.fullmatch(key)
    if found is None:
        raise Permanent(f"{url} is not the folder of a run. {_WHERE}")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    storage = StorageSpec(
        bucket=name,
        prefix=found["prefix"] or "",
        region=region or (store.region if store else StorageSpec.model_fields["region"].default),
    )
    if store is not None:
        known = {"endpoint": store.endpoint, "addressing_style": store.addressing_style}
        storage = storage.model_copy(update=known)
    bucket, run_json = Bucket.open(storage), f"{found['folder']}/run.json"
    try:
        stored = bucket.get_json(run_json)
    except StorageError as error:
        if error.reason != "Missing":
            raise
        raise Permanent(
            f"{bucket.url(run_json)} does not exist, so no job of this run has started. {_WHERE}"
        ) from None
    if isinstance(stored, dict) and isinstance(stored.get("metadata"), dict):
        # Of a run that was started by hand, an older version may have computed another hash.
        stored["metadata"].setdefault("uid", found["uid8"])
    run = DistillRun.parse(stored, source=bucket.url(run_json), stored=True)
    if run.folder != found["folder"]:
        raise Permanent(
            f"{bucket.url(run_json)} is of the run {run.identity}. It was copied: use that run's folder."
        )
    return run, bucket


def choose_stage(run: DistillRun, name: str | None) -> Stage:
    """The stage of that name, by default the last. Raises Permanent if there is none."""
    if name is None:
        return run.spec.stages[-1]
    try:
        return run.stage(name)
    except KeyError as error:
        raise Permanent(f"--stage {name}: {error.args[0]}.") from None


_WHERE = (
    "Give s3://BUCKET/PREFIX/runs/NAMESPACE/NAME-UID8: kubectl get distillrun NAME "
    "--output=jsonpath='{.status.provenance.folder}' prints it."
)


def _split(url: str) -> tuple[str, str]:
    try:
        return paths.split_url(url)
    except ValueError as error:
        raise Permanent(f"{error} {_WHERE}") from None
