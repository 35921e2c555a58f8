"""A stage's student as a model folder on local disk, and the statement of what it was made from.

The export step uploads the folder; `vpmoe export` keeps it. Both have the same files: the writer and its
inputs decide every byte, no clock and no attempt does.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vpmoe.api import DistillRun, Stage
from vpmoe.api.effort import most_frequent
from vpmoe.checkpoint.format import Weights
from vpmoe.checkpoint.train_state import TrainState, load_stage_end
from vpmoe.data.dataset import load_dataset, resolve_dataset
from vpmoe.data.harmony import SystemMessage
from vpmoe.export.model_card import ModelFacts, StageFacts, model_card
from vpmoe.export.model_folder import write_model_folder
from vpmoe.failure import Permanent
from vpmoe.model.hf_export import ReadTensor
from vpmoe.model.shapes import SHAPES
from vpmoe.model.stage_end import open_stage_end
from vpmoe.provenance import Provenance
from vpmoe.rollout.evaluation_record import load_evaluation
from vpmoe.storage import Bucket, Subject, manifest, paths
from vpmoe.storage.manifest import Input, Manifest

KIND = "model"
"""Kind of the manifest."""
CARD = "README.md"
DTYPE = torch.bfloat16
"""Type of the exported weights. The experts' selection biases stay float32."""


@dataclass(frozen=True)
class StageModel:
    """A stage whose student is exported."""

    run: DistillRun
    stage: Stage
    bucket: Bucket
    checkpoint: Weights
    """The student at the end of the stage."""
    dataset: Manifest
    facts: ModelFacts

    def write(self, folder: Path, read: ReadTensor) -> None:
        """Write the model into the new folder `folder`, its card included. `read` returns the checkpoint's
        tensors, and may raise to stop.

        Raises as `write_model_folder` does.
        """
        said = self.dataset.facts["settings"]["conversation"]
        write_model_folder(
            folder,
            SHAPES[self.run.spec.student.shape],
            sizes=self.checkpoint.sizes,
            read=read,
            dtype=DTYPE,
            positions=self.run.spec.training.sequence_length,
            system=SystemMessage(
                said["identity"], said["knowledgeCutoff"], said["date"], most_frequent(said["effort"])
            ),
        )
        (folder / CARD).write_text(model_card(self.facts), encoding="utf-8")

    def statement(self, subjects: Iterable[Subject], provenance: Provenance) -> dict[str, Any]:
        """The manifest of the model's files."""
        stored = self.checkpoint.manifest
        own = Input("checkpoint", self.bucket.url(stored.key), {"sha256": stored.sha256}, {})
        state = self.checkpoint.train_state
        facts = {
            "stage": self.stage.name,
            "kind": self.stage.kind,
            "iteration": state.iteration,
            "tokens": state.tokens,
            "shape": self.run.spec.student.shape,
            "dtype": str(DTYPE).removeprefix("torch."),
            "positions": self.run.spec.training.sequence_length,
        }
        initial = {} if self.facts.init is None else {self.facts.init.name: self.facts.init}
        inputs = {**initial, **stored.inputs, own.name: own}
        return manifest.statement(KIND, subjects, facts, provenance, list(inputs.values()))


def open_stage_model(run: DistillRun, stage: Stage, bucket: Bucket) -> StageModel:
    """The student of a finished stage, and what its card says; weights are not read yet.

    Raises as `open_stage_end` does, and Permanent if a record of the run is damaged.
    """
    checkpoint = open_stage_end(run, stage.name, bucket, "exported")
    dataset = load_dataset(run, bucket)
    stages = run.spec.stages[: run.spec.stages.index(stage) + 1]
    facts = ModelFacts(
        run=run,
        stage=stage,
        config=checkpoint.manifest.provenance.config,
        url=bucket.url(paths.run(run)),
        checkpoint=bucket.url(checkpoint.manifest.key),
        checkpoint_sha256=checkpoint.manifest.sha256,
        stages=tuple(
            _stage_facts(run, one, bucket, checkpoint if one.name == stage.name else None) for one in stages
        ),
        inputs=resolve_dataset(run, bucket).inputs,
        dataset=dataset,
    )
    return StageModel(run, stage, bucket, checkpoint, dataset, facts)


def _stage_facts(run: DistillRun, stage: Stage, bucket: Bucket, checkpoint: Weights | None) -> StageFacts:
    """What is known of a stage. `checkpoint`: its last, if it was read already."""
    end: tuple[Manifest, TrainState] | None
    if checkpoint is not None:
        end = checkpoint.manifest, checkpoint.train_state
    else:
        end = load_stage_end(bucket, paths.checkpoints(run, stage.name))
    evaluation = load_evaluation(run, stage.name, bucket)
    return StageFacts(stage, end[1] if end else None, end[0] if end else None, evaluation)


def load_exported(run: DistillRun, stage: str, bucket: Bucket) -> Manifest | None:
    """The manifest of a stage's model in the bucket; None if the stage was not exported.

    Raises Permanent if it is of another checkpoint than the stage's last, StorageError (Altered) if it is
    none of ours.
    """
    key = paths.manifest(paths.model(run, stage))
    if not bucket.exists(key):
        return None
    found = manifest.load(bucket, key)
    end = load_stage_end(bucket, paths.checkpoints(run, stage))
    if found.kind != KIND or (end and found.inputs["checkpoint"].digest.get("sha256") != end[0].sha256):
        raise Permanent(
            f"{bucket.url(key)} is not of the last checkpoint of stage {stage}, which was trained again "
            f"since. Delete {bucket.url(paths.model(run, stage))} to have it exported again."
        )
    return found
