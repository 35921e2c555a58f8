"""Which stage a training job is about, what it needs to be there, and whether it is done already. No torch: the launcher asks too."""

from vpmoe.api import DistillRun
from vpmoe.api.progress import Amount, DatasetStatus, Progress
from vpmoe.api.stages import Rescored, Stage
from vpmoe.checkpoint.train_state import TrainState, end_of, facts_of, held_out
from vpmoe.clock import now
from vpmoe.data.dataset import load
from vpmoe.failure import Permanent
from vpmoe.provenance import Provenance
from vpmoe.storage import Bucket, paths
from vpmoe.storage.manifest import Input, Manifest
from vpmoe.teacher import scores as teacher_scores
from vpmoe.teacher.model import resolve_teacher


def trainable(run: DistillRun, name: str) -> Stage:
    """The stage of that name. Raises Permanent where there is none."""
    if name not in [stage.name for stage in run.spec.stages]:
        raise Permanent(
            f"--step {name} is no training stage. Choose one of {', '.join(stage.name for stage in run.spec.stages)}."
        )
    return run.stage(name)


def dataset(run: DistillRun, bucket: Bucket) -> Manifest:
    """The run's data set. Raises Permanent where it has not been made, or holds nothing to train on or to evaluate with."""
    made = load(run, bucket)
    splits = made.facts["splits"]
    if not splits["train"]["documents"]:
        raise Permanent(
            f"{bucket.url(made.key)}: the data set's train split is empty, there is nothing to train on. Lower dataset.validFraction, or "
            "give dataset.source more rows."
        )
    if run.spec.evaluation.documents and not splits["valid"]["documents"]:
        raise Permanent(
            f"{bucket.url(made.key)}: the data set's valid split is empty, so there is no held-out loss. Raise dataset.validFraction, or "
            "set evaluation.documents to 0 to train without one."
        )
    return made


def scores(run: DistillRun, stage: Stage, bucket: Bucket, made: Manifest) -> Manifest | None:
    """The teacher's scores of the data set that a Rescored stage trains on; None for other stages, and where mix is 0.

    Raises Permanent where they have not been made, or are of another content than the data set's.
    """
    if not isinstance(stage, Rescored) or stage.mix == 0:
        return None
    found = teacher_scores.resolve(run, stage, bucket, made)
    if not bucket.exists(found.manifest):
        raise Permanent(
            f"{bucket.url(found.manifest)}: the teacher's scores that stage {stage.name} trains on are not there. Make them first: "
            "python -m jobs.rescore."
        )
    return teacher_scores.load(found, bucket)


def dataset_facts(bucket: Bucket, made: Manifest) -> DatasetStatus:
    """The data set as progress.json names it."""
    return DatasetStatus(id=made.facts["id"], manifest=bucket.url(made.key), sha256=made.sha256)


def dataset_input(bucket: Bucket, made: Manifest) -> Input:
    """The data set as a manifest names it among what something was made from."""
    return Input("dataset", bucket.url(made.key), {"sha256": made.sha256}, {"id": made.facts["id"]})


def scores_input(bucket: Bucket, made: Manifest) -> Input:
    """The scores as a manifest names them among what something was made from."""
    return Input("scores", bucket.url(made.key), {"sha256": made.sha256}, {"id": made.facts["id"]})


def teacher_input(run: DistillRun, bucket: Bucket) -> Input:
    """The teacher as a manifest names it among what something was made from."""
    found = resolve_teacher(run, bucket)
    return Input("teacher", found.model, {"sha256": found.sha256}, {"files": len(found.files)})


def finished(run: DistillRun, stage: Stage, bucket: Bucket, provenance: Provenance) -> TrainState | None:
    """The stage's end where an earlier attempt reached it, None otherwise.

    A killed attempt may have left its last checkpoint and no last word: then progress.json says Succeeded from here on.
    """
    reached = end_of(bucket, paths.checkpoints(run, stage.name))
    if reached is None:
        return None
    checkpoint, position = reached
    key = paths.progress(run, stage.name)
    if not bucket.exists(key) or bucket.get_json(key)["state"] != "Succeeded":
        words = f"Finished by attempt {checkpoint.provenance.attempt}"
        said = Progress(
            step=stage.name,
            attempt=provenance.attempt,
            state="Succeeded",
            message=words,
            updated=now(),
            tokens=Amount(done=position.tokens, total=position.tokens),
            held_out=held_out(position),
            checkpoint=facts_of(bucket, checkpoint, position),
            dataset=dataset_facts(bucket, dataset(run, bucket)),
        )
        bucket.write_json(key, said.dump(), provenance.metadata())
    return position
