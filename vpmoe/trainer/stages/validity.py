"""The validity that a stage's `stop` requires and that the step validity measures beside it.

The trainer waits for no measurement: at an evaluation it takes the newest. What it took is written once for
each evaluation, so a resumed stage decides as before, whatever was measured meanwhile.
"""

from datetime import timedelta

from vpmoe.api.base import Record
from vpmoe.api.metrics import Measures
from vpmoe.checkpoint.train_state import CheckpointValidity, TrainState
from vpmoe.model import distributed
from vpmoe.rollout import evaluation_record
from vpmoe.storage import paths
from vpmoe.storage.bucket import json_bytes
from vpmoe.storage.records import load_record
from vpmoe.trainer.context import ObjectGroup, StageContext

PATIENCE = timedelta(hours=1)
"""How long the ranks wait for rank 0 to hear from the store."""


class KnownValidity(Record):
    """What an evaluation of the stage knew."""

    validity: CheckpointValidity | None = None
    """None before the first measurement."""


class ValidityEvaluation(Measures):
    """What it adds to the evaluation's line."""

    validity: float | None
    """Share of valid completions of the latest measured checkpoint; None before the first measurement."""
    validity_iteration: int | None
    """That checkpoint."""


class ValidityReader:
    """Reads what the step validity has measured. Every rank has one; rank 0 reads."""

    def __init__(self, context: StageContext) -> None:
        self._context = context
        self._group = ObjectGroup(PATIENCE)

    def known(self, state: TrainState) -> CheckpointValidity | None:
        """What the evaluation at `state` knows of the stage's validity, the same on every rank and in every
        attempt. Every rank calls it. Raises Permanent if a record is malformed, StorageError."""
        found, *_ = self._group.gather(self._read(state) if distributed.rank() == 0 else None)
        return found

    def _read(self, state: TrainState) -> CheckpointValidity | None:
        run, stage, bucket = self._context.run, self._context.stage.name, self._context.bucket
        reached = state.tokens // run.spec.evaluation.every_tokens
        if not reached:
            return None
        measured = [
            number
            for number in evaluation_record.measured_validities(run, stage, bucket)
            if number <= reached
        ]
        newest = KnownValidity()
        if measured:
            record = evaluation_record.load_validity(run, stage, bucket, measured[-1])
            share = evaluation_record.valid_share(record.validity)
            newest = KnownValidity(validity=CheckpointValidity(iteration=record.iteration, share=share))
        key = paths.known_validity(run, stage, state.iteration)
        bucket.create(key, json_bytes(newest.dump()), self._context.provenance.metadata())
        return load_record(bucket, key, KnownValidity).validity
