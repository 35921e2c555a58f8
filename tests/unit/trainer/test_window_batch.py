"""Batches of a window: each rollout once with its numbers, rejection of other windows, and measured waits."""

import dataclasses
import hashlib
import math
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.fakes import datasets
from tests.fakes.students import learner, new_seed
from vpmoe.api.microbatch import Microbatch
from vpmoe.failure import Permanent
from vpmoe.model.batch import Batch
from vpmoe.objectives.onpolicy import on_policy
from vpmoe.rollout.window_files import (
    Rollout,
    RolloutHeader,
    ScoresHeader,
    WindowRollouts,
    read_rollouts,
    rollouts_bytes,
    scores_bytes,
)
from vpmoe.storage import Bucket, paths
from vpmoe.trainer.context import StageContext
from vpmoe.trainer.onpolicy import window_wait
from vpmoe.trainer.onpolicy.window_batch import (
    DueWindow,
    ScoredWindow,
    check_due,
    read_window,
    rows_of_rank,
    window_batches,
)
from vpmoe.trainer.onpolicy.window_metrics import window_metrics
from vpmoe.trainer.onpolicy.window_wait import Waits, WindowBuffer, WindowWait

LENGTH = 64
DUE = DueWindow(
    run="default/r-01234567",
    config="c" * 64,
    stage="vanilla",
    window=3,
    version=2,
    weights="w" * 64,
    seen=500,
    last_from=1 << 40,
)


def random_rollouts(random: np.random.Generator, count: int) -> list[Rollout]:
    rollouts = []
    for number in range(count):
        prompt_length, completion_length = random.integers(1, 20), random.integers(1, LENGTH - 20)
        ids, span = (
            random.integers(500, size=prompt_length + completion_length, dtype=np.int32),
            random.integers(1, 3, size=completion_length, dtype=np.uint8),
        )
        logp = -random.exponential(3, size=completion_length).astype(np.float32)
        effort, validity = ("low", "high")[number % 2], ("valid", "truncated", "valid")[number % 3]
        rollouts.append(Rollout(number // 2, number % 2, number, effort, validity, ids, span, logp))
    return rollouts


def rollout_header(rollouts: list[Rollout], **changes: Any) -> RolloutHeader:
    due_fields = {name: value for name, value in dataclasses.asdict(DUE).items() if name != "last_from"}
    tokens = sum(len(one.ids_T) for one in rollouts)
    return RolloutHeader.model_validate(
        due_fields | {"phase": 1, "tokens": tokens, "last": False, "turns": 0} | changes
    )


def window_of(rollouts: list[Rollout], **changes: Any) -> WindowRollouts:
    return read_rollouts(rollouts_bytes(rollout_header(rollouts, **changes), rollouts), "here")


def documents_of(batch: Batch) -> list[tuple[list[int], list[list[float]]]]:
    """The documents of a batch, found by positions alone: ids, and [span, teacher's log p, sampler's log p]
    of each token but the first."""
    assert batch.teacher_logp is not None and batch.sampler_logp is not None
    tokens, position, padding = batch.tokens.flatten(), batch.position.flatten(), batch.padding.flatten()
    found: list[tuple[list[int], list[list[float]]]] = []
    for place in range(len(tokens)):
        if padding[place]:
            assert batch.span[place] == 0 and batch.target[place] == -1
            continue
        if position[place] == 0:
            found.append(([], []))
        if found[-1][0]:
            found[-1][1].append(
                [
                    float(numbers[place - 1])
                    for numbers in (batch.span, batch.teacher_logp, batch.sampler_logp)
                ]
            )
        found[-1][0].append(int(tokens[place]))
    return found


@pytest.mark.parametrize("few_shapes", [False, True], ids=["as they are", "padded"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_each_rollout_is_in_one_row_of_one_rank_with_its_numbers(ranks: int, few_shapes: bool) -> None:
    random = np.random.default_rng(new_seed())
    rollouts = random_rollouts(random, int(random.integers(1, 40)))
    teacher = [-random.exponential(3, size=len(one.logp_C)).astype(np.float32) for one in rollouts]
    window = ScoredWindow(window_of(rollouts), teacher, ("", ""))
    divided = Microbatch(rows=4, few_shapes=few_shapes)
    batches_of_rank = [window_batches(window, LENGTH, rank, ranks, divided) for rank in range(ranks)]
    assert len({tuple(batch.tokens.shape for batch in batches) for batches in batches_of_rank}) == 1, (
        "expert-parallel ranks have batches of equal shapes"
    )
    found = [document for batches in batches_of_rank for batch in batches for document in documents_of(batch)]
    expected = []
    for one, teacher_C in zip(rollouts, teacher, strict=True):
        numbers = np.full((len(one.ids_T) - 1, 3), [0, np.nan, np.nan])
        numbers[one.prompt_length - 1 :] = np.stack([one.span_C, teacher_C, one.logp_C], axis=1)
        expected.append((one.ids_T.tolist(), numbers.tolist()))
    assert sorted(map(str, found)) == sorted(map(str, expected))
    counts = torch.stack([batch.counts for batches in batches_of_rank for batch in batches]).sum(0)
    assert counts.tolist() == [
        sum(len(one.ids_T) for one in rollouts),
        *(sum(int((one.span_C == span).sum()) for one in rollouts) for span in (1, 2)),
    ]


def test_loss_and_gradient_over_ranks_equal_float64_of_single_rollouts(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference computes each rollout alone, token by token (design §6); the trainer's microbatches have
    rows of padding.

    Tolerance: terms of both signs nearly cancel in sums over some hundred tokens, which fp32 adds up to 1e-6
    of their size.
    """
    monkeypatch.setattr("vpmoe.trainer.data.collate.PADDING", 0)  # the small vocabulary has no other
    random = np.random.default_rng(new_seed())
    rollouts, weights, student_learner = (
        random_rollouts(random, 17),
        {"reasoning": 0.7, "final": 1.6},
        learner(device),
    )
    teacher = [-random.exponential(12, size=len(one.logp_C)).astype(np.float32) for one in rollouts]
    batches = [
        batch
        for rank in range(3)
        for batch in window_batches(
            ScoredWindow(window_of(rollouts), teacher, ("", "")),
            LENGTH,
            rank,
            3,
            Microbatch(rows=4, few_shapes=True),
        )
    ]
    counts = torch.stack([batch.counts for batch in batches]).sum(0)
    outcome = student_learner.forward_backward(batches, on_policy(counts, weights), int(counts[0]))
    gradient = student_learner.student.output.main_grad.clone() / int(counts[0])  # type: ignore[attr-defined]
    output = student_learner.student.output.detach().double().requires_grad_()
    loss, tokens = (
        torch.zeros((), dtype=torch.float64),
        {span: sum(int((one.span_C == span).sum()) for one in rollouts) for span in (1, 2)},
    )
    for one, teacher_C in zip(rollouts, teacher, strict=True):
        ids = torch.from_numpy(one.ids_T.astype(np.int64))[None]
        with torch.no_grad():
            hidden = student_learner.student(
                Batch.from_rows(ids, torch.ones_like(ids).byte(), torch.zeros_like(ids).int())
            ).double()
        logp_CV = (hidden @ output.T).log_softmax(1)[one.prompt_length - 1 : -1]
        for place, logp_V in enumerate(logp_CV):
            logp = logp_V[one.ids_T[one.prompt_length + place]]
            advantage = min(max(float(teacher_C[place]) - logp.item(), -20), 20)
            ratio = min(math.exp(logp.item() - float(one.logp_C[place])), 2)
            span = int(one.span_C[place])
            loss = loss - (0.0, 0.7, 1.6)[span] / tokens[span] * ratio * advantage * logp
    loss.backward()
    assert outcome.loss == pytest.approx(loss.item(), rel=1e-4, abs=1e-3)
    torch.testing.assert_close(gradient.double(), output.grad, rtol=2e-4, atol=2e-6)


def test_rollouts_are_packed_into_few_rows() -> None:
    random = np.random.default_rng(new_seed())
    lengths = random.integers(1, LENGTH + 1, 500).tolist()
    packed = [row for rank in range(4) for row in rows_of_rank(lengths, LENGTH, rank, 4)]
    assert sorted(number for row in packed for number in row) == list(range(500))
    assert all(sum(lengths[number] for number in row) <= LENGTH for row in packed)
    assert len(packed) <= 1.25 * sum(lengths) / LENGTH, (
        "a quarter may stay empty: documents are half a sequence long on average"
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        pytest.param({"weights": "x" * 64}, f"weights is {'x' * 64}, not {'w' * 64}", id="other-weights"),
        pytest.param({"seen": 501}, "seen is 501, not 500", id="other-tokens-seen"),
        pytest.param(
            {"run": "default/other-01234567"},
            "run is default/other-01234567, not default/r-01234567",
            id="another-run",
        ),
        pytest.param({"config": "d" * 64}, f"config is {'d' * 64}", id="another-configuration"),
        pytest.param({"stage": "other"}, "stage is other, not vanilla", id="another-stage"),
        pytest.param({"window": 4}, "window is 4, not 3", id="another-window"),
        pytest.param({"version": 0}, "version is 0, not 2", id="another-version"),
        pytest.param({"last": True}, "last is True, not False", id="not-the-last"),
        pytest.param({"tokens": 7}, "its header says 7 tokens and it holds", id="other-tokens"),
    ],
)
def test_a_window_that_is_not_due_is_rejected_with_its_name(changes: dict[str, Any], message: str) -> None:
    rollouts = random_rollouts(np.random.default_rng(3), 5)
    check_due(window_of(rollouts), DUE, LENGTH, "s3://here")
    with pytest.raises(
        Permanent, match=rf"s3://here: .*{message}.*Delete it, its scores and all later windows"
    ):
        check_due(window_of(rollouts, **changes), DUE, LENGTH, "s3://here")


def test_a_window_that_cannot_be_trained_on_is_rejected() -> None:
    rollouts = random_rollouts(np.random.default_rng(3), 3)
    with pytest.raises(Permanent, match="tokens for a sequence of 5"):
        check_due(window_of(rollouts), DUE, 5, "s3://here")
    rollouts[1].span_C[0] = 0
    with pytest.raises(Permanent, match=r"rollout 1 of prompt 0 has .* or a sampled token of no span"):
        check_due(window_of(rollouts), DUE, LENGTH, "s3://here")
    with pytest.raises(Permanent, match="its header says 0 tokens and it holds 0"):
        check_due(window_of([]), DUE, LENGTH, "s3://here")


@pytest.fixture
def context(bucket: Bucket, run_spec: dict[str, Any], tmp_path: Path, device: torch.device) -> StageContext:
    return datasets.context(bucket, run_spec, tmp_path, datasets.write_dataset(bucket, [[]], [[]]))


def write_window(context: StageContext, number: int, **changes: Any) -> list[Rollout]:
    """Write the two files of a window; returns its rollouts."""
    rollouts = random_rollouts(np.random.default_rng(number), 4)
    data = rollouts_bytes(rollout_header(rollouts, window=number, **changes), rollouts)
    context.bucket.create(paths.window(context.run, "vanilla", number, "rollouts"), data, {})
    scores_header = ScoresHeader(
        run=DUE.run,
        stage="vanilla",
        window=number,
        rollouts=hashlib.sha256(data).hexdigest(),
        teacher="t" * 64,
    )
    context.bucket.create(
        paths.window(context.run, "vanilla", number, "scores"),
        scores_bytes(scores_header, [one.logp_C for one in rollouts]),
        {},
    )
    return rollouts


def test_a_window_is_read_with_its_scores(context: StageContext) -> None:
    rollouts = write_window(context, 3)
    found = read_window(context.bucket, context.run, DUE, LENGTH)
    for one, teacher_C in zip(rollouts, found.teacher, strict=True):
        assert (one.logp_C == teacher_C).all()
    files = [
        context.bucket.get(paths.window(context.run, "vanilla", 3, kind)) for kind in ("rollouts", "scores")
    ]  # type: ignore[arg-type]
    assert found.sha256 == tuple(hashlib.sha256(data).hexdigest() for data in files)
    metrics = window_metrics(found, Waits(1.0, 2.0), 3.0, WindowBuffer(sampled=2, scored=1)).dump()
    assert (metrics["version"], metrics["staleness"], metrics["rollouts"]) == (2, 1, {"high": 2, "low": 2})
    assert metrics["validity"] == {"high": {"truncated": 0.5, "valid": 0.5}, "low": {"valid": 1.0}}
    assert metrics["lengths"]["low"]["max"] == max(len(rollouts[0].logp_C), len(rollouts[2].logp_C))
    assert (metrics["waitRollouts"], metrics["waitScores"], metrics["waitUpload"]) == (1.0, 2.0, 3.0)


@pytest.mark.parametrize("kind", ["rollouts", "scores"])
def test_a_truncated_file_is_rejected_with_its_name(context: StageContext, kind: Any) -> None:
    write_window(context, 3)
    key = paths.window(context.run, "vanilla", 3, kind)
    context.bucket.put_bytes(key, context.bucket.get(key)[:-100], {})
    with pytest.raises(Permanent, match=rf"window-000003.{kind}.arrow: it is not a window file"):
        read_window(context.bucket, context.run, DUE, LENGTH)


def test_waits_are_measured_by_missing_file(context: StageContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window_wait, "POLL", 0.01)
    waiter, missing_files = WindowWait(context), []

    def record_missing(missing: window_wait.WindowFile) -> None:
        missing_files.append(missing)
        if len(missing_files) in (3, 5):
            context.bucket.create(paths.window(context.run, "vanilla", 0, missing), b"x", {})

    waits = waiter.wait(0, record_missing)
    assert waits is not None and missing_files == ["rollouts"] * 3 + ["scores"] * 2 and min(waits) > 0
    second_waits = waiter.wait(0, record_missing)
    assert second_waits == (0, 0) and len(missing_files) == 5, "existing files are not waited for"


def test_waiting_can_be_stopped(context: StageContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window_wait, "POLL", 60.0)
    threading.Timer(0.2, context.stopping.set).start()
    assert WindowWait(context).wait(0, lambda missing: None) is None


def test_the_buffer_counts_consecutive_windows(context: StageContext) -> None:
    for number in (1, 2, 3, 5):
        write_window(context, number)
    context.bucket.delete(paths.window(context.run, "vanilla", 2, "scores"))
    waiter = WindowWait(context)
    assert waiter.buffer(1, 4) == WindowBuffer(sampled=3, scored=1)
    assert waiter.buffer(0, 4) == WindowBuffer(sampled=0, scored=0)
