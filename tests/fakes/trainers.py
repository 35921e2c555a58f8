"""Trainers of small students on a real store, built as in vpmoe.trainer.trainer.train."""

import torch

from tests.fakes import datasets
from vpmoe.api.microbatch import on_cpu
from vpmoe.data.reader import BlockCache, DatasetReader
from vpmoe.model.learner import Learner
from vpmoe.storage.manifest import Input
from vpmoe.trainer.checkpoint.resume import Start, load_start
from vpmoe.trainer.checkpoint.writer import CheckpointWriter
from vpmoe.trainer.context import StageContext
from vpmoe.trainer.data.held_out import HeldOutDocuments
from vpmoe.trainer.reporting.uploader import ProgressUploader
from vpmoe.trainer.stages.select import for_stage
from vpmoe.trainer.stages.stage_kind import StageKind
from vpmoe.trainer.trainer import Trainer

INPUTS = [datasets.TOKENIZER, Input("dataset", "s3://x", {"sha256": datasets.HEX}, {})]


def stage_kind(context: StageContext) -> StageKind:
    """The kind of the context's stage, on the CPU."""
    cache = BlockCache(context.bucket, context.scratch / "blocks")
    documents = DatasetReader(context.dataset, "train", cache)
    stage = for_stage(context, documents, cache, torch.device("cpu"))
    stage.microbatch = on_cpu(context.run.spec.training.sequence_length)
    return stage


def start_of(context: StageContext, learner: Learner) -> Start:
    """Load into the learner the state from which the stage starts, according to the bucket."""
    return load_start(context, stage_kind(context), learner)


def trainer(
    context: StageContext,
    device: torch.device,
    learner: Learner,
    uploader: ProgressUploader | None,
    held_out: int = 0,
) -> Trainer:
    """A trainer at the stage's state according to the bucket, with `held_out` held-out documents."""
    stage = stage_kind(context)
    start = load_start(context, stage, learner)
    checkpoints = CheckpointWriter(context, learner, INPUTS, start.rejected, uploader)
    documents = None
    if held_out:
        training, cache = context.run.spec.training, BlockCache(context.bucket, context.scratch / "blocks")
        valid = DatasetReader(context.dataset, "valid", cache)
        documents = HeldOutDocuments(
            valid, held_out, training.seed, training.sequence_length, stage.microbatch
        )
    stage.prepare(start.state, INPUTS)
    return Trainer(context, device, learner, stage, documents, checkpoints, start, uploader)
