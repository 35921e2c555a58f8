"""What a stage needs before it trains, and whether it has already finished.

No torch: the launcher asks too.
"""

from vpmoe.api import DistillRun
from vpmoe.api.progress import Amount, Progress
from vpmoe.api.stages import Stage
from vpmoe.checkpoint.train_state import TrainState, checkpoint_facts, held_out_losses, load_stage_end
from vpmoe.clock import now
from vpmoe.data.dataset import dataset_facts, load_training_dataset
from vpmoe.failure import Permanent
from vpmoe.process.board import ProgressBoard
from vpmoe.process.step_worker import step_succeeded
from vpmoe.provenance import Provenance
from vpmoe.storage import Bucket, paths
from vpmoe.storage.manifest import Input, Manifest
from vpmoe.teacher import scores as teacher_scores
from vpmoe.teacher.model import resolve_teacher


def training_stage(run: DistillRun, name: str) -> Stage:
    """The stage of that name. Raises Permanent if there is none."""
    names = [stage.name for stage in run.spec.stages]
    if name not in names:
        raise Permanent(f"--step {name} is no training stage. Choose one of {', '.join(names)}.")
    return run.stage(name)


def load_scores(run: DistillRun, stage: Stage, bucket: Bucket, made: Manifest) -> Manifest | None:
    """The teacher's scores of the dataset `made`; None for a stage that trains on none.

    Raises Permanent if they were not made, or are of another content than the dataset's.
    """
    if stage.scored_subset is None:
        return None
    found = teacher_scores.resolve_scores(run, stage.scored_subset, bucket, made)
    if not bucket.exists(found.manifest):
        raise Permanent(
            f"{bucket.url(found.manifest)}: the teacher's scores that stage {stage.name} trains on do not "
            "exist. Make them first: python -m jobs.rescore."
        )
    return teacher_scores.load_scores(found, bucket)


def scores_input(bucket: Bucket, made: Manifest) -> Input:
    """The scores as an input in a manifest."""
    return Input("scores", bucket.url(made.key), {"sha256": made.sha256}, {"id": made.facts["id"]})


def teacher_input(run: DistillRun, bucket: Bucket) -> Input:
    """The teacher as an input in a manifest."""
    found = resolve_teacher(run, bucket)
    return Input("teacher", found.model, {"sha256": found.sha256}, {"files": len(found.files)})


def report_if_finished(
    run: DistillRun, stage: Stage, bucket: Bucket, provenance: Provenance, board: ProgressBoard
) -> TrainState | None:
    """The state at the stage's end if an earlier attempt reached it, otherwise None.

    Publishes the progress at that end. An attempt that was killed after its last checkpoint has not written
    Succeeded to progress.json; this writes it.
    """
    reached = load_stage_end(bucket, paths.checkpoints(run, stage.name))
    if reached is None:
        return None
    checkpoint, state = reached
    board.progress = Progress(
        run=provenance.run,
        step=stage.name,
        attempt=provenance.attempt,
        state="Succeeded",
        message=f"Finished by attempt {checkpoint.provenance.attempt}",
        updated=now(),
        tokens=Amount(done=state.tokens, total=state.tokens),
        held_out=held_out_losses(state),
        checkpoint=checkpoint_facts(bucket, checkpoint, state),
        dataset=dataset_facts(bucket, load_training_dataset(run, bucket)),
    )
    if not step_succeeded(run, bucket, stage.name):
        key = paths.progress(run, stage.name)
        bucket.write_json(key, board.progress.dump(), provenance.metadata())
    return state
