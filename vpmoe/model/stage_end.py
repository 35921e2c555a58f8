"""The student at the end of a stage: the last checkpoint of a finished stage, for evaluation and export."""

from vpmoe.api import DistillRun
from vpmoe.checkpoint.format import PARTS_FACT, CheckpointRejected, Weights, open_weights
from vpmoe.checkpoint.train_state import list_iterations
from vpmoe.failure import Permanent
from vpmoe.model.shapes import SHAPES, other_parts
from vpmoe.storage import Bucket, paths


def open_stage_end(run: DistillRun, stage: str, bucket: Bucket, wanted: str) -> Weights:
    """The last checkpoint of a finished stage. `wanted`: what the student is to be, for errors, such as
    "evaluated".

    Raises Permanent if the stage has not finished, or the checkpoint is damaged or of a student with other
    parts than the run's shape; StorageError if the store does not answer.
    """
    folder = paths.checkpoints(run, stage)
    train = f"python -m jobs.train --step {stage}"
    newest = list_iterations(bucket, folder)[:1]
    if not newest:
        raise Permanent(f"{bucket.url(folder)}: stage {stage} has no checkpoint. Train it first: {train}.")
    try:
        found = open_weights(bucket, f"{folder}/{newest[0]}")
    except CheckpointRejected as refusal:
        raise Permanent(
            f"stage {stage} cannot be {wanted}: {refusal} Restore its objects, or delete its folder and "
            f"train the last steps again: {train}."
        ) from refusal
    if not found.train_state.finished:
        raise Permanent(
            f"stage {stage} has trained {found.train_state.tokens} tokens. Train it to its end: {train}."
        )
    if difference := other_parts(found.manifest.facts.get(PARTS_FACT, {}), SHAPES[run.spec.student.shape]):
        raise Permanent(
            f"stage {stage} cannot be {wanted}: checkpoint {bucket.url(found.manifest.key)}: {difference}. "
            "Use the version of vpMoE that trained it."
        )
    return found
