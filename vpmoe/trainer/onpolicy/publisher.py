"""Policy versions: the student after so many windows, put where the sampler takes it, with a proof of what it computes.

Training waits while the weights are copied, not while they are uploaded: one upload goes on at a time. A version whose manifest exists is
never published again, whatever a resumed attempt would make of it; one that no window can ask for any more loses its weights and keeps
its manifest. When a version is due is onpolicy.py's business, its facts are vpmoe.rollout.policy_version's.
"""

import logging
import re
import shutil
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from vpmoe.checkpoint.train_state import TrainState
from vpmoe.data.packing import PackedDocument
from vpmoe.data.reader import DatasetReader
from vpmoe.data.tokenizer import Ids
from vpmoe.model import distributed, hf_export, state
from vpmoe.model.batch import Batch
from vpmoe.model.learner import Learner
from vpmoe.model.shapes import Shape
from vpmoe.rollout import policy_version
from vpmoe.rollout.policy_version import Probe, Version
from vpmoe.rollout.window_files import LEAST_LOGP
from vpmoe.storage import manifest, paths
from vpmoe.storage.manifest import Input
from vpmoe.trainer.context import ObjectGroup, StageContext

log = logging.getLogger(__name__)

PROBED = 4
"""Documents that a version is proved with."""
PROBED_TOKENS = 64
"""Of each its first ids, at most."""
PATIENCE = timedelta(hours=1)
"""How long the store may keep the ranks waiting for the word whether a version exists."""
FOLDER = re.compile(r"/v(\d+)/(?!manifest\.json$)")


class Publisher:
    """Publishes a stage's versions. Every rank makes one; rank 0 writes."""

    def __init__(self, task: StageContext, inputs: list[Input], probed: Sequence[Ids]) -> None:
        """`inputs`: what the stage's weights come from, for the manifests. `probed`: the ids that a version is proved with."""
        self._task = task
        self._inputs = inputs
        self._probed = probed
        self._talk = ObjectGroup(PATIENCE)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="publish")
        self._upload: Future[None] | None = None
        self._copy: dict[str, Tensor] = {}
        """Memory of the weights that are being uploaded."""
        folder = paths.weights(task.run, task.stage.name, 0).rpartition("/")[0]
        found = task.bucket.list(folder + "/") if distributed.rank() == 0 else ()
        self._whole = {int(match[1]) for one in found if (match := FOLDER.search(one.key))}

    def exists(self, number: int) -> bool:
        """Whether a version is published. Every rank asks, and hears the same."""
        key = paths.manifest(paths.weights(self._task.run, self._task.stage.name, number))
        return self._talk.gather(distributed.rank() == 0 and self._task.bucket.exists(key))[0]

    def publish(self, learner: Learner, position: TrainState) -> None:
        """Copy the weights as they are and begin to upload them as the version of `position`. Every rank calls it."""
        self.wait()
        assert position.windows is not None
        student = learner.student
        read, sizes = state.copy_weights(learner, self._copy), state.sizes(learner)
        facts = Version(
            version=position.windows.trained,
            steps=position.steps,
            tokens=position.tokens,
            iteration=position.iteration,
            first_sequence=position.first_sequence,
            first_prompt=position.windows.first_prompt,
            probe=probe(learner, self._probed),
        )
        if distributed.rank() == 0:
            self._upload = self._thread.submit(
                self._finish,
                facts,
                read,
                sizes,
                student.shape,
                student.sequence_length,
                student.config.params_dtype,
            )

    def prune(self, below: int) -> None:
        """Take the weights of all versions below `below`: no window that is still to be sampled can ask for them."""
        for number in [old for old in list(self._whole) if old < below]:  # the upload's thread adds to it
            folder = paths.weights(self._task.run, self._task.stage.name, number)
            for found in self._task.bucket.list(folder + "/"):
                if found.key != paths.manifest(folder):
                    self._task.bucket.delete(found.key)
            self._whole.discard(number)

    def wait(self) -> None:
        """Return once the version being uploaded, if any, exists. Raises on rank 0 what kept it from existing."""
        if self._upload:
            upload, self._upload = self._upload, None
            upload.result()

    def check(self) -> None:
        """Raise what made an upload fail, if one did; does not wait."""
        if self._upload and self._upload.done():
            self.wait()

    def close(self) -> None:
        """End the thread, after the upload that may be going on."""
        self._thread.shutdown()

    def _finish(
        self,
        facts: Version,
        read: state.ReadTensor,
        sizes: dict[str, int],
        shape: Shape,
        positions: int,
        dtype: torch.dtype,
    ) -> None:
        task = self._task
        local = task.scratch / f"version-{facts.version}"
        shutil.rmtree(local, ignore_errors=True)
        hf_export.export_student(local, shape, positions, sizes, read, dtype)
        key = paths.weights(task.run, task.stage.name, facts.version)
        metadata = task.provenance.metadata()
        subjects = [
            task.bucket.put_file(f"{key}/{file.name}", file, metadata).subject(key)
            for file in sorted(local.iterdir())
        ]
        shutil.rmtree(local)
        made = manifest.statement(policy_version.KIND, subjects, facts.dump(), task.provenance, self._inputs)
        manifest.write(task.bucket, paths.manifest(key), made)
        self._whole.add(facts.version)
        size = sum(subject.size for subject in subjects)
        log.info(
            "Version %d %s: %d steps, %.1f MB", facts.version, task.bucket.url(key), facts.steps, size / 1e6
        )


def probed(parts: DatasetReader) -> list[Ids]:
    """What versions are proved with: the first ids of the split's first documents, of those that have more than one."""
    all_documents = (
        PackedDocument(part, number, int(length))
        for part, lengths in enumerate(parts.lengths)
        for number, length in enumerate(lengths)
    )
    return [
        parts.read(one)[0][:PROBED_TOKENS]
        for one in islice((one for one in all_documents if one.length > 1), PROBED)
    ]


def probe(learner: Learner, sequences: Sequence[Ids]) -> Probe:
    """What the student finds of each id of some sequences but the first, given those before it. Every rank calls it."""
    logp = []
    for ids_T in sequences:
        ids = torch.from_numpy(ids_T.astype(np.int64))[None]
        batch = Batch.from_rows(
            ids, torch.ones_like(ids, dtype=torch.uint8), torch.zeros_like(ids, dtype=torch.int32)
        )
        logp.append(tuple(learner.logp(batch)[:-1].clamp(min=LEAST_LOGP).tolist()))
    return Probe(ids=tuple(tuple(ids_T.tolist()) for ids_T in sequences), logp=tuple(logp))
