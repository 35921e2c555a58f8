"""The init step: makes a run's initial weights from a dense model and writes them to the bucket, once.

    init/weights-00000.safetensors …  fp32, in the format of checkpoints (vpmoe/checkpoint/format.py): the
                                      tensor `name` has the key `name[0:elements]`
    init/manifest.json                last

The model's files are pinned when the step first starts, so that a later attempt makes the same bits. The pins
of a model that cannot be used are deleted: it may be repaired. Files without a manifest do not exist: the
next attempt of a step that was killed makes and uploads them again. What becomes of which tensor is in
plan.py and build.py.
"""

import logging
import math
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from vpmoe.api import DistillRun
from vpmoe.api.student import UpcycleSpec
from vpmoe.checkpoint.train_state import initial_state
from vpmoe.data.vocabulary import TOKENIZER, VOCABULARY_SHA256
from vpmoe.data.vocabulary_file import PACKAGE
from vpmoe.failure import Permanent
from vpmoe.model.shapes import SHAPES, Shape
from vpmoe.pretrained.cache import Purpose
from vpmoe.pretrained.model_files import ModelRef, fetch_model, resolve_model
from vpmoe.process.board import ProgressBoard
from vpmoe.process.step_worker import StepWorker
from vpmoe.provenance import Provenance
from vpmoe.storage import Bucket, Subject, manifest, paths
from vpmoe.storage.manifest import Input, Manifest
from vpmoe.upcycle.build import Upcycling, prepare

log = logging.getLogger(__name__)

KIND = "init"
"""Kind of the manifest."""
FIELD = "student.init.upcycle.model"
PURPOSE = Purpose(
    FIELD,
    "the dense model",
    if_full="Free space there, or point TMPDIR to more (in a pod: raise the ephemeral-storage in "
    "runtime.resources.init).",
    if_read_only="Point TMPDIR to a disk that can be written.",
)
FILE_BYTES = 1 << 30
"""Most bytes of a file, unless a single tensor has more. One file at a time is in memory, twice while it is
written to disk."""


def make_initial_weights(
    run: DistillRun,
    wanted: UpcycleSpec,
    bucket: Bucket,
    provenance: Provenance,
    stopping: threading.Event,
    board: ProgressBoard,
) -> Manifest:
    """Make the run's initial weights unless that was done; returns their manifest.

    Raises Permanent, with the field and the remedy, if the model cannot become this student; Retriable if the
    hub does not answer; StorageError, also if the local disk is full; Terminated if it was asked to stop.
    """
    job = StepWorker(run, bucket, provenance, stopping, board, None)
    key = paths.manifest(paths.init(run))
    if bucket.exists(key):
        found = manifest.load(bucket, key)
        log.info("Reused: %s", bucket.url(key))
        job.report_success("Reused", len(found.subjects), reused=True)
        return found
    started = time.monotonic()
    job.publish_progress(f"Downloading {wanted.model}")
    source = resolve_model(FIELD, wanted.model, bucket, paths.init_source(run), run.config_hash)
    with tempfile.TemporaryDirectory(prefix="vpmoe-init-") as scratch:
        directory = fetch_model(PURPOSE, source, bucket, Path(scratch), job.check_stop)
        job.publish_progress(f"Planning what becomes of {wanted.model}")
        try:
            upcycling = prepare_upcycling(directory, wanted, SHAPES[run.spec.student.shape])
        except Permanent:
            bucket.delete(paths.init_source(run))  # so that the next attempt finds the model repaired
            raise
        for line in upcycling.table():
            log.info("%s", line)
        subjects = write(job, upcycling, Path(scratch))
        made = statement(upcycling, source, subjects, provenance)
    written = manifest.write(bucket, key, made)
    size = sum(subject.size for subject in subjects)
    message = f"Made {size / 1e6:,.1f} MB of initial weights from {wanted.model}"
    log.info("%s in %.1f s: %s", message, time.monotonic() - started, bucket.url(key))
    job.report_success(message, len(subjects))
    return written


def prepare_upcycling(directory: Path, wanted: UpcycleSpec, shape: Shape) -> Upcycling:
    """The plan for the model in `directory`. Raises Permanent, with the field, if it cannot become this
    student."""
    try:
        return prepare(directory, shape, wanted.seed)
    except Permanent as error:
        why = str(error).replace(f"{directory}: ", "").replace(f"{directory}/", "")
        raise Permanent(f"{FIELD}: {wanted.model}: {why}") from error


def write(job: StepWorker, upcycling: Upcycling, scratch: Path) -> list[Subject]:
    """Make the weights and upload them, file by file. Returns the files."""
    folder, files = paths.init(job.run), divide(upcycling.sizes())
    subjects: list[Subject] = []
    for number, names in enumerate(files):
        job.report(f"Making file {number + 1} of {len(files)}", number, len(files))
        flat: dict[str, Tensor] = {}
        for name in names:
            job.check_stop()
            tensor = upcycling.tensor(name).flatten()
            flat[f"{name}[0:{tensor.numel()}]"] = tensor
        path = scratch / f"weights-{number:05d}.safetensors"
        save_file(flat, path, metadata={"format": "pt"})
        stored = job.bucket.put_file(f"{folder}/{path.name}", path, job.provenance.metadata())
        subjects.append(stored.subject(folder))
        path.unlink()
    return subjects


def divide(sizes: Mapping[str, tuple[int, ...]]) -> list[list[str]]:
    """The names of the fp32 tensors of each file: all names in order, as many as fit into FILE_BYTES."""
    files: list[list[str]] = []
    room = 0
    for name in sorted(sizes):
        size = 4 * math.prod(sizes[name])
        if not files or size > room:
            files.append([])
            room = FILE_BYTES
        files[-1].append(name)
        room -= size
    return files


def statement(
    upcycling: Upcycling, source: ModelRef, subjects: list[Subject], provenance: Provenance
) -> dict[str, Any]:
    """The manifest of the weights. Among its facts are the train state and, as of a checkpoint, the student's
    parts."""
    digest = {"sha256": source.sha256} | ({"gitCommit": source.commit} if source.commit else {})
    return manifest.statement(
        KIND,
        subjects,
        {"position": initial_state(KIND).dump(), **upcycling.facts()},
        provenance,
        [
            Input("model", source.model, digest, {"files": len(source.files)}),
            Input("tokenizer", PACKAGE, {"sha256": VOCABULARY_SHA256}, {"id": TOKENIZER}),
        ],
    )
