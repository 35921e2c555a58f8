"""Publishes policy versions: the student after some windows, with a probe by which the sampler verifies what
it loads.

Training waits while the weights are copied, but not while they are written and uploaded; one upload runs at a
time. With runtime.weightsVolume the files are written to the volume, where the sampler finds them before they
are in the bucket (vpmoe/rollout/version_volume.py). A version whose manifest exists is never published again,
even by a resumed attempt. A version that no window can need any more loses its weights and keeps its
manifest. coordinator.py decides when a version is due; its record is in vpmoe/rollout/policy_version.py.
"""

import logging
import re
import time
from collections.abc import Sequence
from datetime import timedelta
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vpmoe.api.metrics import Sample
from vpmoe.api.pod_metrics import WAIT_SECONDS
from vpmoe.checkpoint.train_state import TrainState
from vpmoe.data.packing import PackedDocument
from vpmoe.data.reader import DatasetReader
from vpmoe.data.tokenizer import Ids
from vpmoe.failure import Permanent
from vpmoe.model import distributed, hf_export, state
from vpmoe.model.batch import Batch
from vpmoe.model.learner import Learner
from vpmoe.model.shapes import Shape
from vpmoe.rollout import policy_version
from vpmoe.rollout.policy_version import PolicyVersion, Probe
from vpmoe.rollout.version_volume import VersionVolume
from vpmoe.rollout.window_files import MIN_LOGP
from vpmoe.storage import StorageError, Subject, manifest, paths
from vpmoe.storage.blocks import hash_files, in_order
from vpmoe.storage.manifest import Input
from vpmoe.storage.scratch import temporary_folder
from vpmoe.trainer.background_upload import BackgroundUpload
from vpmoe.trainer.context import ObjectGroup, StageContext

log = logging.getLogger(__name__)

PROBE_DOCUMENTS = 4
"""Documents of a version's probe."""
PROBE_TOKENS = 64
"""Ids of each of them at most."""
THREADS = 12
"""Files of a version that are written, and parts of them that are hashed, at the same time."""
UPLOADS = 2
"""Files that are uploaded at the same time: while one ends, the next has begun."""
PATIENCE = timedelta(hours=1)
"""How long the ranks wait for rank 0 to hear from the store whether a version exists."""
POLL = 1.0
"""Seconds between two counts of the time that an upload is waited for."""
WEIGHT_FILE = re.compile(r"/v(\d+)/(?!manifest\.json$)")


class Publisher:
    """Publishes a stage's versions. Every rank has one; rank 0 writes."""

    def __init__(self, context: StageContext, inputs: Sequence[Input], probe: Sequence[Ids]) -> None:
        """`inputs`: what the stage's weights are made from, for the manifests. `probe`: the sequences of the
        probe."""
        self._context = context
        self._inputs = inputs
        self._probe = probe
        self._group = ObjectGroup(PATIENCE)
        self._upload = BackgroundUpload("publish")
        self._copy: dict[str, Tensor] = {}
        """Memory of the weights that are being uploaded."""
        self._volume: VersionVolume | None = None
        """The volume of runtime.weightsVolume; rank 0's alone."""
        if distributed.rank() == 0 and context.weights_volume is not None:
            self._volume = VersionVolume(context.weights_volume, context.run, context.stage.name)
            self._volume.clean(context.bucket)
        folder = paths.weights(context.run, context.stage.name, 0).rpartition("/")[0]
        found = context.bucket.list(folder + "/") if distributed.rank() == 0 else ()
        self._with_weights = {int(match[1]) for one in found if (match := WEIGHT_FILE.search(one.key))}
        """Versions that still have weights; rank 0's alone."""
        self._latest_content: tuple[int, str] | None = None

    def exists(self, version: int) -> bool:
        """Whether a version is published. Every rank calls it and gets the same answer."""
        key = paths.manifest(paths.weights(self._context.run, self._context.stage.name, version))
        return self._group.gather(distributed.rank() == 0 and self._context.bucket.exists(key))[0]

    def content(self, version: int) -> str:
        """The content of a published version (policy_version.weights_digest). Raises Permanent if its
        manifest is gone."""
        if (
            self._latest_content is None or self._latest_content[0] != version
        ):  # windows in a row need the same
            run, stage, bucket = self._context.run, self._context.stage.name, self._context.bucket
            found = policy_version.find_version(bucket, run, stage, version)
            if found is None:
                where = bucket.url(paths.manifest(paths.weights(run, stage, version)))
                raise Permanent(
                    f"{where}: the manifest of the version is gone, but the next window was sampled from it. "
                    f"Restore it, or delete {bucket.url(paths.checkpoints(run, stage))}, the stage's weights "
                    "and its rollouts to train the stage again."
                )
            self._latest_content = (version, policy_version.weights_digest(found[0]))
        return self._latest_content[1]

    def publish(self, learner: Learner, at: TrainState, oldest: int = 0) -> float:
        """Copy the weights and begin to upload them as the version of the state `at`. Every rank calls it.

        Returns the seconds that it has waited before, until the upload of the version before had ended: 0 but
        on rank 0, for which the others wait in the copy.

        `oldest`: oldest version that a window may still need. Older ones leave the volume before this one is
        written to it, so that it never holds more than it must.
        """
        waited = self._wait_counted()
        assert at.windows is not None
        student = learner.student
        read, sizes = state.copy_weights(learner, self._copy), state.sizes(learner)
        version = PolicyVersion(
            version=at.windows.trained,
            steps=at.steps,
            tokens=at.tokens,
            iteration=at.iteration,
            first_sequence=at.first_sequence,
            first_prompt=at.windows.first_prompt,
            probe=compute_probe(learner, self._probe),
        )
        if distributed.rank() == 0:
            self._upload.start(
                self._write,
                version,
                oldest,
                read,
                sizes,
                student.shape,
                student.sequence_length,
                student.config.params_dtype,
            )
        return waited

    def prune(self, below: int) -> None:
        """Delete the weights of all versions below `below`, which no window that is still to be sampled can
        need."""
        for version in [
            old for old in list(self._with_weights) if old < below
        ]:  # the upload's thread adds to it
            folder = paths.weights(self._context.run, self._context.stage.name, version)
            for found in self._context.bucket.list(folder + "/"):
                if found.key != paths.manifest(folder):
                    self._context.bucket.delete(found.key)
            self._with_weights.discard(version)
        if self._volume is not None:
            self._volume.prune(below)

    def empty_volume(self) -> None:
        """Remove the stage's versions from the volume, if there is one: the stage has ended."""
        if self._volume is not None:
            self._volume.prune(1 << 62)

    def wait(self) -> None:
        """Return once the version that is being uploaded, if any, exists. Raises on rank 0 what prevented
        it."""
        self._upload.wait()

    def _wait_counted(self) -> float:
        """Wait as `wait` does, and count the time while it passes. Returns its seconds."""
        waited, looked = 0.0, time.monotonic()
        while self._upload.running:
            self._upload.join(POLL)
            seconds = (now := time.monotonic()) - looked
            waited, looked = waited + seconds, now
            self._context.board.metrics.record([Sample(WAIT_SECONDS, seconds, {"reason": "upload"})])
        self.wait()
        return waited

    def check(self) -> None:
        """Raise the error of an upload that has failed; does not wait."""
        self._upload.check()

    def close(self) -> None:
        """End the thread, after the upload that may still be running."""
        self._upload.close()

    def _write(
        self,
        version: PolicyVersion,
        oldest: int,
        read: hf_export.ReadTensor,
        sizes: dict[str, int],
        shape: Shape,
        positions: int,
        dtype: torch.dtype,
    ) -> None:
        context, started = self._context, time.monotonic()
        key = paths.weights(context.run, context.stage.name, version.version)
        if self._volume is not None:
            self._volume.prune(oldest)
        with self._volume.new_version() if self._volume else temporary_folder(context.scratch) as folder:
            hf_export.export_student(folder, shape, positions, sizes, read, dtype, THREADS)
            files = {f"{key}/{file.name}": file for file in sorted(folder.iterdir())}
            subjects = [stored.subject(key) for stored in hash_files(files, THREADS)]
            statement = manifest.statement(
                policy_version.KIND, subjects, version.dump(), context.provenance, list(self._inputs)
            )
            if self._volume is not None:
                folder = self._volume.add(folder, version.version, statement)
            written = time.monotonic() - started
            self._upload_files(folder, subjects)
        manifest.write(context.bucket, paths.manifest(key), statement)
        self._with_weights.add(version.version)
        log.info(
            "Published policy version %d to %s: after %d steps, %.1f MB, written in %.1f s, sent in %.1f s",
            version.version,
            context.bucket.url(key),
            version.steps,
            sum(subject.size for subject in subjects) / 1e6,
            written,
            time.monotonic() - started - written,
        )

    def _upload_files(self, folder: Path, subjects: Sequence[Subject]) -> None:
        """Upload the files of a version. Raises StorageError if one is not what it was when it was hashed."""
        metadata = self._context.provenance.metadata()

        def upload(subject: Subject) -> None:
            path = folder / subject.name
            if self._context.bucket.put_file(subject.key, path, metadata).sha256 != subject.sha256:
                raise StorageError(
                    f"{path}: it was altered before it was uploaded. Keep other programs out of "
                    f"{folder.parent}, and check the disk.",
                    "Local",
                )

        for _ in in_order(upload, subjects, UPLOADS):
            pass


def probe_sequences(documents: DatasetReader) -> list[Ids]:
    """The sequences of the probe: the first ids of the split's first documents that have more than one
    token."""
    candidates = (
        PackedDocument(part, number, int(length))
        for part, lengths in enumerate(documents.lengths)
        for number, length in enumerate(lengths)
        if length > 1
    )
    return [documents.read_document(one)[0][:PROBE_TOKENS] for one in islice(candidates, PROBE_DOCUMENTS)]


def compute_probe(learner: Learner, sequences: Sequence[Ids]) -> Probe:
    """The student's log p of each id but the first of each sequence, given those before it. Every rank calls
    it."""
    logp = []
    for ids_T in sequences:
        ids = torch.from_numpy(ids_T.astype(np.int64))[None]
        batch = Batch.from_rows(
            ids, torch.ones_like(ids, dtype=torch.uint8), torch.zeros_like(ids, dtype=torch.int32)
        )
        logp.append(tuple(learner.logp(batch)[:-1].clamp(min=MIN_LOGP).tolist()))
    return Probe(ids=tuple(tuple(ids_T.tolist()) for ids_T in sequences), logp=tuple(logp))
