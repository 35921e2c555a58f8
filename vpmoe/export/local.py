"""`vpmoe export`: the student of a run's stage, from the bucket into a folder on this machine.

A model that the run has exported is downloaded, each block verified. Otherwise the same files are made here
from the stage's last checkpoint.
"""

import os
from collections.abc import Callable
from pathlib import Path

from vpmoe.api import DistillRun, Stage
from vpmoe.clock import timestamp
from vpmoe.export.stage_model import load_exported, open_stage_model
from vpmoe.failure import Permanent
from vpmoe.provenance import Provenance, git_sha
from vpmoe.storage import Bucket, Subject, paths
from vpmoe.storage.blocks import hash_file
from vpmoe.storage.bucket import json_bytes
from vpmoe.storage.manifest import Manifest
from vpmoe.storage.scratch import temporary_folder

MANIFEST = "manifest.json"


def export_to(
    folder: Path, run: DistillRun, stage: Stage, bucket: Bucket, report: Callable[[str], None]
) -> None:
    """Write the student at the end of a stage into the new folder `folder`, which appears whole or not at
    all.

    `report` is called with a line about what is done. Raises Permanent if `folder` exists, the stage has not
    finished or its checkpoint is damaged; StorageError; OSError if the disk cannot be written.
    """
    if os.path.lexists(folder):
        raise Permanent(f"{folder} exists. Name a new folder, or remove it.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(folder.parent) as scratch:
        made = scratch / "model"
        if found := load_exported(run, stage.name, bucket):
            report(f"Downloading {bucket.url(paths.model(run, stage.name))}")
            download(found, bucket, made)
        else:
            model = open_stage_model(run, stage, bucket)
            report(f"Exporting {bucket.url(model.checkpoint.manifest.key)}")
            model.write(made, model.checkpoint.read)
            statement = model.statement(
                _subjects(run, stage, made), _provenance(run, stage, model.facts.config)
            )
            (made / MANIFEST).write_bytes(json_bytes(statement))
        made.rename(folder)


def download(found: Manifest, bucket: Bucket, folder: Path) -> None:
    """Download what a manifest names into the new folder `folder`, and the manifest."""
    folder.mkdir()
    for name, subject in found.subjects.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        bucket.download(subject, path)
    (folder / MANIFEST).write_bytes(bucket.get(found.key))


def _subjects(run: DistillRun, stage: Stage, made: Path) -> list[Subject]:
    key = paths.model(run, stage.name)
    files = [path for path in sorted(made.rglob("*")) if path.is_file()]
    return [hash_file(f"{key}/{path.relative_to(made).as_posix()}", path).subject(key) for path in files]


def _provenance(run: DistillRun, stage: Stage, config: str) -> Provenance:
    return Provenance(
        git_sha=git_sha(),
        image=os.environ.get("VPMOE_IMAGE") or None,
        config=config,
        namespace=run.metadata.namespace,
        name=run.metadata.name,
        uid8=run.uid8,
        step=f"{stage.name}-export",
        attempt=1,
        started=timestamp(),
    )
