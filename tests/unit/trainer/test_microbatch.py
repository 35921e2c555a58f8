"""A stage keeps the microbatch with which it began, also on another card; a card that cannot hold it is an
error with the remedy."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.fakes import datasets
from tests.fakes.checkpoints import filled, save_checkpoints, state_at
from tests.fakes.students import new_seed
from tests.fakes.trainers import stage_kind
from vpmoe.api.card import GIB
from vpmoe.api.microbatch import Microbatch, choose_for_stage, memory_of_stage, on_cpu
from vpmoe.checkpoint.train_state import initial_state
from vpmoe.failure import Permanent
from vpmoe.storage import Bucket, paths
from vpmoe.trainer.checkpoint.resume import load_start
from vpmoe.trainer.context import StageContext
from vpmoe.trainer.microbatch import fitting_microbatch, microbatch_of_attempt, stored_microbatch

CHOSEN = Microbatch(rows=4, recomputed_layers=61, sharded_gradients=True, few_shapes=True)

pytestmark = pytest.mark.usefixtures("device")


@pytest.fixture
def context(bucket: Bucket, run_spec: dict[str, Any], tmp_path: Path) -> StageContext:
    run_spec["spec"]["student"] |= {"shape": "vpmoe-6b", "gpus": 7}
    run_spec["spec"]["training"] |= {"sequenceLength": 8192, "globalBatchTokens": "1M"}
    run_spec["spec"]["stages"] = [{"name": "vanilla", "kind": "Vanilla", "tokens": "1M"}]
    return datasets.context(bucket, run_spec, tmp_path, datasets.write_dataset(bucket, [[]], [[]]))


def test_a_new_stage_has_what_the_plan_says_for_its_card(context: StageContext) -> None:
    found = fitting_microbatch(context, None, 79 * GIB, None)
    assert found == choose_for_stage(context.run.spec, context.stage, 79 * GIB, None)
    assert found != fitting_microbatch(context, None, 139 * GIB, None)


def test_a_resumed_stage_keeps_its_own_on_another_card(context: StageContext, device: torch.device) -> None:
    assert stored_microbatch(context) is None and microbatch_of_attempt(context, device, None) == on_cpu(8192)
    save_checkpoints(
        context, filled(device, 1.0), state_at(1, microbatch=None), state_at(2, microbatch=CHOSEN)
    )
    assert stored_microbatch(context) == CHOSEN
    assert microbatch_of_attempt(context, device, None) == CHOSEN
    for card in (79, 139):
        assert fitting_microbatch(context, CHOSEN, card * GIB, None) == CHOSEN
    stage, learner = stage_kind(context), filled(device, 2.0)
    stage.microbatch = CHOSEN
    assert load_start(context, stage, learner).state == state_at(2, microbatch=CHOSEN)


def test_data_and_position_do_not_depend_on_the_microbatch(
    bucket: Bucket, run_spec: dict[str, Any], tmp_path: Path
) -> None:
    """Three rows a step, in microbatches as they are and filled up to few shapes."""
    random = np.random.default_rng(new_seed())
    run_spec["spec"]["training"] |= {"globalBatchTokens": 3 * 512}
    documents = [datasets.random_documents(random, 200)]
    made = datasets.write_dataset(bucket, documents, documents)
    context = datasets.context(bucket, run_spec, tmp_path, made)
    found = []
    for one in (on_cpu(512), Microbatch(rows=2), Microbatch(rows=16, few_shapes=True)):
        stage = stage_kind(context)
        stage.microbatch = one
        state = initial_state("vanilla")
        stage.prepare(state, [])
        steps: list[object] = [stage.plan.steps, stage.plan.total]
        for step in range(3):
            batches = stage.plan.batches(step)
            rows = [row.tolist() for batch in batches for row in batch.tokens[~batch.padding.all(1)]]
            counts = torch.stack([batch.counts for batch in batches]).sum(0).tolist()
            state = stage.plan.advance(state)
            steps.append((rows, counts, state.next_sequence, stage.plan.exercises(step)))
            state = state.model_copy(update={"steps": step + 1})
        found.append(steps)
    assert found[0] == found[1] == found[2]


def test_a_damaged_manifest_is_passed_over(context: StageContext, device: torch.device) -> None:
    save_checkpoints(context, filled(device, 1.0), state_at(1, microbatch=CHOSEN))
    context.bucket.create(paths.manifest(paths.checkpoint(context.run, "vanilla", 2)), b"{}", {})
    empty = CHOSEN.model_copy(update={"rows": 0})
    save_checkpoints(context, filled(device, 1.0), state_at(3, microbatch=empty))
    assert stored_microbatch(context) == CHOSEN


def test_a_card_that_cannot_hold_what_the_stage_keeps_is_an_error(context: StageContext) -> None:
    need = memory_of_stage(CHOSEN, context.run.spec, context.stage, None).total
    assert fitting_microbatch(context, CHOSEN, need, None) == CHOSEN
    with pytest.raises(Permanent) as raised:
        fitting_microbatch(context, CHOSEN, need - 1, None)
    assert str(raised.value) == (
        "stage vanilla: its checkpoints were made with microbatches of 32,768 positions, 61 recomputed "
        f"layers and sharded gradients, which takes {need / GIB:.1f} GiB of each GPU, and a GPU has "
        f"{need / GIB:.1f}. A stage keeps this, so that its sums stay the same. Continue on GPUs with as "
        "much memory (runtime.nodeSelector, runtime.gpuMemory), or start a new run that has resumeFrom "
        "this one's folder: it chooses again."
    )


def test_a_card_that_holds_no_microbatch_is_an_error(context: StageContext) -> None:
    with pytest.raises(
        Permanent, match=r"takes at least 37\.1 GiB of each \(microbatches of 8,192 positions"
    ):
        fitting_microbatch(context, None, 36 * GIB, None)
