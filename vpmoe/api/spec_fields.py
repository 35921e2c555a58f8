"""The fields of spec, without what relates them: rules.py has the rules, and spec.py adds rules and derived
defaults.

The split avoids an import cycle: rules.py needs the fields, and Spec needs the rules.
"""

from typing import Annotated, Literal

from pydantic import Field, Strict

from vpmoe.api.base import ApiModel
from vpmoe.api.dataset import DatasetSpec
from vpmoe.api.evaluation import EvaluationSpec
from vpmoe.api.export import ExportSpec
from vpmoe.api.quantities import Duration
from vpmoe.api.runtime import RuntimeSpec
from vpmoe.api.stages import Stage
from vpmoe.api.storage import StorageSpec
from vpmoe.api.student import S3_FOLDER, RescoreSpec, StudentSpec, TeacherSpec
from vpmoe.api.training import TrainingSpec


class SpecFields(ApiModel):
    """The fields of spec."""

    suspend: bool = False
    """true stops the run at a checkpoint and frees its GPUs; false continues from that checkpoint. Can be
    changed at any time."""
    dataset: DatasetSpec
    """The source of the training text and how it becomes tokens."""
    teacher: TeacherSpec
    """The model to distill from."""
    rescore: RescoreSpec = RescoreSpec()
    """How documents are scored for Rescored stages."""
    student: StudentSpec = StudentSpec()
    """The model to train and its GPUs."""
    training: TrainingSpec = TrainingSpec()
    """Settings of all training stages."""
    stages: Annotated[tuple[Stage, ...], Strict(False), Field(min_length=1, max_length=8)]
    """Training stages, run in this order. Each continues with the weights, optimizer state and data position
    of the one before."""
    evaluation: EvaluationSpec = EvaluationSpec()
    """What is measured while a stage trains and after it."""
    export: Annotated[ExportSpec, Field(json_schema_extra={"inherits": "stages"})]
    """The stages whose student is written to the bucket as a model for transformers and vLLM. Absent exports
    the last stage."""
    storage: StorageSpec
    """The S3 bucket that holds everything the run reads and writes."""
    runtime: RuntimeSpec = RuntimeSpec()
    """Settings of the run's pods and of retries. Can be changed while nothing of the run is alive: before its
    first step, Queued, Suspended or Failed; attempts, interruptions, onStall and scheduling at any time. The
    next attempt of a step uses them."""
    resume_from: Annotated[str, S3_FOLDER] | None = None
    """Folder of another run, s3://bucket/…/runs/namespace/name-uid, whose last checkpoint, optimizer state
    and data position this run continues; null starts from the beginning."""
    deletion_policy: Literal["Retain", "Delete"] = "Retain"
    """What happens to the run's folder in the bucket when the DistillRun is deleted: Retain keeps it, Delete
    removes it. Datasets and scores are always kept, because other runs use them. Can be changed at any
    time."""
    ttl_after_finished: Duration | None = None
    """Time after which a finished run is deleted, such as "7d"; null keeps it. Can be changed at any time."""

    @property
    def rescoring_gpus(self) -> int:
        """GPUs of the step rescore, one pod each."""
        return self.teacher.gpus if self.rescore.gpus is None else self.rescore.gpus

    @property
    def rescores_first(self) -> bool:
        """Whether the step rescore needs GPUs of the student, so that stages start when it has succeeded."""
        return self.rescoring_gpus > self.teacher.gpus
