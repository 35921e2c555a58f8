"""Makes the StageKind of a stage. The only place in the trainer that looks at the class of a stage."""

from typing import assert_never

import torch

from vpmoe.api.stages import OnPolicy, Rescored, TeacherForced, Vanilla
from vpmoe.data.reader import BlockCache, DatasetReader
from vpmoe.trainer.context import StageContext
from vpmoe.trainer.stages.on_policy import OnPolicyStage
from vpmoe.trainer.stages.rescored import RescoredStage
from vpmoe.trainer.stages.stage_kind import StageKind
from vpmoe.trainer.stages.teacher_forced import TeacherForcedStage
from vpmoe.trainer.stages.vanilla import VanillaStage


def for_stage(
    context: StageContext, documents: DatasetReader, cache: BlockCache, device: torch.device
) -> StageKind:
    """What the trainer needs for the context's stage. `documents` is the training split, `cache` holds the
    blocks read so far."""
    match context.stage:
        case Vanilla():
            return VanillaStage(context, documents)
        case Rescored() as stage:
            return RescoredStage(context, stage, documents, cache)
        case TeacherForced() as stage:
            return TeacherForcedStage(context, stage, documents, device)
        case OnPolicy() as stage:
            return OnPolicyStage(context, stage, documents)
        case stage:
            assert_never(stage)
