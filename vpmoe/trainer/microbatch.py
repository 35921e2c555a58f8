"""The microbatch of an attempt at a stage: the one that the stage's checkpoints say, else chosen for the
card.

The arithmetic and its rule are in vpmoe/api/microbatch.py. Every rank computes the same from the ranks' least
card and from the bucket.
"""

import logging

import torch
from pydantic import ValidationError

from vpmoe.api.card import GIB, parse_card_memory
from vpmoe.api.microbatch import (
    Microbatch,
    choose_for_stage,
    least_for_stage,
    memory_of_stage,
    on_cpu,
)
from vpmoe.checkpoint.format import CheckpointRejected, read_train_state
from vpmoe.checkpoint.train_state import list_iterations
from vpmoe.failure import Permanent
from vpmoe.model import distributed
from vpmoe.storage import StorageError, manifest, paths
from vpmoe.trainer.context import StageContext

log = logging.getLogger(__name__)


def microbatch_of_attempt(
    context: StageContext, device: torch.device, teacher_width: int | None
) -> Microbatch:
    """The attempt's microbatch. All ranks call it, and get the same.

    The memory of a GPU is that of the smallest, in whole GiB, or runtime.gpuMemory if that is less, as
    `vpmoe plan` has it. Raises Permanent, on every rank, if it does not hold the stage, or not as its
    checkpoints say.
    """
    stored = stored_microbatch(context)
    length = context.run.spec.training.sequence_length
    if device.type == "cpu":
        return stored or on_cpu(length)
    return fitting_microbatch(context, stored, _card(context, device), teacher_width)


def fitting_microbatch(
    context: StageContext, stored: Microbatch | None, card: int, teacher_width: int | None
) -> Microbatch:
    """`stored`, or else the one to choose for a card of `card` bytes. Raises Permanent if the card is too
    small."""
    spec, stage = context.run.spec, context.stage
    found = stored or choose_for_stage(spec, stage, card, teacher_width)
    tried = found or least_for_stage(spec, stage)
    memory = memory_of_stage(tried, spec, stage, teacher_width)
    described = describe(tried, spec.training.sequence_length)
    if found is None:
        raise Permanent(
            f"stage {stage.name}: training {spec.student.shape} on {distributed.world_size()} GPUs takes at "
            f"least {memory.total / GIB:.1f} GiB of each ({described}), and a GPU has {card / GIB:.1f}. Give "
            "the stage more GPUs (raise student.gpus or lower sampler.gpus), raise student.expertParallel, "
            "lower training.sequenceLength, or use GPUs with more memory. `vpmoe plan` shows the items."
        )
    if memory.total > card:
        raise Permanent(
            f"stage {stage.name}: its checkpoints were made with {described}, which takes "
            f"{memory.total / GIB:.1f} GiB of each GPU, and a GPU has {card / GIB:.1f}. A stage keeps this, "
            "so that its sums stay the same. Continue on GPUs with as much memory (runtime.nodeSelector, "
            "runtime.gpuMemory), or start a new run that has resumeFrom this one's folder: it chooses again."
        )
    log.info("Training with %s: %.1f GiB of %.1f", described, memory.total / GIB, card / GIB)
    return found


def describe(microbatch: Microbatch, sequence_length: int) -> str:
    """A microbatch in words."""
    text = f"microbatches of {microbatch.rows * sequence_length:,} positions"
    text += f", {microbatch.recomputed_layers} recomputed layers"
    return text + (" and sharded gradients" if microbatch.sharded_gradients else "")


def stored_microbatch(context: StageContext) -> Microbatch | None:
    """That of the stage's newest checkpoint whose manifest can be read; None if there is none, or if it is
    from before microbatches were stored. reader.py says what is wrong with the others."""
    bucket, folder = context.bucket, paths.checkpoints(context.run, context.stage.name)
    for iteration in list_iterations(bucket, folder):
        try:
            return read_train_state(manifest.load(bucket, paths.manifest(f"{folder}/{iteration}"))).microbatch
        except (CheckpointRejected, ValidationError):
            continue
        except StorageError as error:
            if error.reason not in ("Altered", "Missing"):
                raise
    return None


def _card(context: StageContext, device: torch.device) -> int:
    """Bytes of the least card, as the plan counts them."""
    ranks = distributed.world_size()
    cards = torch.zeros(ranks, dtype=torch.int64)
    cards[distributed.rank()] = torch.cuda.get_device_properties(device).total_memory // GIB
    card = int(distributed.sum_over_ranks(cards).min()) * GIB
    written = context.run.spec.runtime.gpu_memory
    return min(card, parse_card_memory(written)) if written else card
