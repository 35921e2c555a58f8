"""The fields of spec. spec.py adds what crosses them: derived defaults and rules."""

from typing import Annotated, Literal

from pydantic import Field, Strict

from vpmoe.api.base import ApiModel
from vpmoe.api.dataset import DatasetSpec
from vpmoe.api.evaluation import EvaluationSpec
from vpmoe.api.quantities import Duration
from vpmoe.api.runtime import RuntimeSpec
from vpmoe.api.stages import Stage
from vpmoe.api.storage import StorageSpec
from vpmoe.api.student import S3_FOLDER, StudentSpec, TeacherSpec
from vpmoe.api.training import TrainingSpec


class SpecFields(ApiModel):
    """What to distil from what, on what, and how."""

    suspend: bool = False
    """true stops the run at a checkpoint and frees its GPUs; false goes on from there. May be changed at any time."""
    dataset: DatasetSpec
    """The training text, and how it becomes tokens."""
    teacher: TeacherSpec
    """The model that is distilled from."""
    student: StudentSpec = StudentSpec()
    """The model that is trained, and how it is spread over GPUs."""
    training: TrainingSpec = TrainingSpec()
    """What all training stages share."""
    stages: Annotated[tuple[Stage, ...], Strict(False), Field(min_length=1, max_length=8)]
    """Training stages, run in this order. Each goes on from the weights, optimizer state and data position of the one before."""
    evaluation: EvaluationSpec = EvaluationSpec()
    """How progress is measured."""
    storage: StorageSpec
    """The bucket that everything is kept in."""
    runtime: RuntimeSpec = RuntimeSpec()
    """How the run's pods are made, and when the operator gives up."""
    resume_from: Annotated[str, S3_FOLDER] | None = None
    """Another run to go on from, s3://bucket/…/runs/namespace/name-uid: its last checkpoint, optimizer state and data position. null starts
    anew."""
    deletion_policy: Literal["Retain", "Delete"] = "Retain"
    """What becomes of the run's folder in the bucket when the DistillRun is deleted: Retain keeps it, Delete removes it. Data sets and
    scores are kept either way, for other runs use them. May be changed at any time."""
    ttl_after_finished: Duration | None = None
    """Time after which a finished run is deleted, as "7d"; null keeps it. May be changed at any time."""
