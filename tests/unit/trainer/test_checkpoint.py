"""Checkpoints of a small student on a real store: exact resumption, rejection of damage, and the start of
later stages."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.fakes import datasets, students
from tests.fakes.checkpoints import alter, empty, equal_states, filled, save_checkpoints, state_at, truncate
from tests.fakes.store import S3
from tests.fakes.students import copy_slices
from tests.fakes.trainers import start_of
from vpmoe.api import DistillRun
from vpmoe.checkpoint.train_state import TrainState, initial_state, list_iterations, load_stage_end
from vpmoe.failure import Permanent
from vpmoe.model import state
from vpmoe.model.learner import Learner
from vpmoe.model.shapes import PARTS, SHAPES, other_parts
from vpmoe.storage import Bucket, manifest, paths
from vpmoe.storage.manifest import Input, Manifest
from vpmoe.trainer.checkpoint import writer
from vpmoe.trainer.checkpoint.resume import Start
from vpmoe.trainer.checkpoint.state_copy import BUFFERS, rank_file
from vpmoe.trainer.context import StageContext

pytestmark = pytest.mark.usefixtures("device")


@pytest.fixture
def context(bucket: Bucket, run_spec: dict[str, Any], tmp_path: Path) -> StageContext:
    run_spec["spec"]["stages"] = [
        {"name": name, "kind": "Vanilla", "tokens": 1000} for name in ("vanilla", "second")
    ]
    run_spec["spec"]["training"]["checkpoint"]["keep"] = 4
    return datasets.context(bucket, run_spec, tmp_path, datasets.write_dataset(bucket, [[]], [[]]))


def test_a_stage_resumes_from_its_newest_checkpoint_with_the_same_bits(
    context: StageContext, device: torch.device
) -> None:
    written = filled(device, 1.0)
    report = save_checkpoints(context, filled(device, 0.5), state_at(3))
    torch.manual_seed(17)
    report = save_checkpoints(context, written, state_at(4, next_sequence=8))
    expected = torch.rand(3)
    learner = filled(device, 2.0)
    started = start_of(context, learner)
    assert equal_states(learner, written) and learner.steps == 4
    assert started.state == state_at(4, next_sequence=8) and not started.rejected
    assert torch.equal(torch.rand(3), expected), "the random state is restored too"
    assert report.progress["checkpoint"].iteration == 4 and report.progress["checkpoint"].manifest.endswith(
        "/checkpoints/vanilla/4/manifest.json"
    )
    assert not list(context.scratch.glob("*.safetensors"))


@pytest.mark.parametrize(
    "file, damage, message",
    [
        pytest.param(rank_file(0), alter, "sha256 of block 0 is", id="bit-of-a-shard"),
        pytest.param(rank_file(0), truncate, "bytes, its manifest says", id="truncated-shard"),
        pytest.param(rank_file(0), empty, "bytes, its manifest says", id="empty-shard"),
        pytest.param(rank_file(0), Path.unlink, "there is no such object", id="missing-shard"),
        pytest.param(BUFFERS, alter, "sha256 of block 0 is", id="bit-of-the-buffers"),
        pytest.param("manifest.json", truncate, "sha256 is", id="truncated-manifest"),
    ],
)
def test_a_damaged_checkpoint_is_logged_and_the_previous_one_is_used(
    context: StageContext,
    device: torch.device,
    s3: S3,
    caplog: pytest.LogCaptureFixture,
    file: str,
    damage: Callable[[Path], None],
    message: str,
) -> None:
    good = filled(device, 1.0)
    save_checkpoints(context, good, state_at(1))
    save_checkpoints(context, filled(device, 1.5), state_at(2))
    damage(s3.folder / context.bucket.name / paths.checkpoint(context.run, "vanilla", 2) / file)
    learner = filled(device, 2.0)
    started = start_of(context, learner)
    assert equal_states(learner, good) and started.state == state_at(1)
    ((iteration, rejected),) = started.rejected.items()
    assert iteration == 2 and "/checkpoints/vanilla/2" in rejected and message in rejected
    assert [record.levelname for record in caplog.records if record.message == f"REJECTED: {rejected}"] == [
        "ERROR"
    ]


def test_a_stage_without_a_usable_checkpoint_fails_instead_of_starting_over(
    context: StageContext, device: torch.device, s3: S3
) -> None:
    save_checkpoints(context, filled(device, 1.0), state_at(1), state_at(2))
    for iteration in (1, 2):
        alter(
            s3.folder
            / context.bucket.name
            / paths.checkpoint(context.run, "vanilla", iteration)
            / rank_file(0)
        )
    learner = filled(device, 2.0)
    with pytest.raises(
        Permanent, match=r"none of its 2 checkpoints can be used.*delete s3://.*/checkpoints/vanilla to train"
    ):
        start_of(context, learner)
    assert equal_states(learner, filled(device, 2.0)), "the learner is unchanged"


@pytest.mark.parametrize(
    "kind, change, message",
    [
        ("main/", lambda tensor: tensor.double(), "is F64, expected F32"),
        ("main/", lambda tensor: tensor.bfloat16(), "is BF16, expected F32"),
        ("exp_avg/", lambda tensor: tensor.half(), "is F16, expected F32"),
        ("exp_avg_sq/", lambda tensor: tensor.int(), "is I32, expected F32"),
        ("random/", lambda tensor: tensor.float(), "is F32, expected U8"),
        ("main/", lambda tensor: tensor.view(1, -1), r"is \[1, \d+\]. Another program wrote it"),
        ("random/", lambda tensor: tensor[1:].clone(), r"is \[\d+\]. Another program wrote it"),
    ],
)
def test_a_checkpoint_with_a_tensor_of_another_type_is_rejected(
    context: StageContext,
    device: torch.device,
    tmp_path: Path,
    kind: str,
    change: Callable[[torch.Tensor], torch.Tensor],
    message: str,
) -> None:
    """As an edited one, with a new manifest. Nothing is loaded."""
    save_checkpoints(context, filled(device, 1.0), state_at(1))
    folder = paths.checkpoint(context.run, "vanilla", 1)
    before = manifest.load(context.bucket, paths.manifest(folder))
    context.bucket.download(before.subjects[rank_file(0)], tmp_path / "file")
    tensors = load_file(tmp_path / "file")
    name = next(name for name in tensors if name.startswith(kind))
    save_file(tensors | {name: change(tensors[name])}, tmp_path / "file")
    stored = [
        context.bucket.put_file(f"{folder}/{rank_file(0)}", tmp_path / "file", {}),
        context.bucket.put_bytes(f"{folder}/{BUFFERS}", context.bucket.get(f"{folder}/{BUFFERS}"), {}),
    ]
    context.bucket.delete(paths.manifest(folder))
    subjects = [one.subject(folder) for one in stored]
    inputs = list(before.inputs.values())
    statement = manifest.statement("checkpoint", subjects, before.facts, before.provenance, inputs)
    manifest.write(context.bucket, paths.manifest(folder), statement)
    learner = filled(device, 2.0)
    with pytest.raises(Permanent, match=message):
        start_of(context, learner)
    assert equal_states(learner, filled(device, 2.0)), "the learner is unchanged"


def test_a_checkpoint_of_another_student_is_rejected(context: StageContext, device: torch.device) -> None:
    save_checkpoints(context, filled(device, 1.0), state_at(1))
    other = students.learner(device, replace(students.SMALL, dense_width=32))
    with pytest.raises(Permanent, match="it belongs to another student or to another version"):
        start_of(context, other)


def test_a_checkpoint_of_other_parts_is_rejected_with_their_names(
    context: StageContext, device: torch.device
) -> None:
    """Also if the parts have no parameters, so that no tensor tells the students apart."""
    save_checkpoints(context, filled(device, 1.0), state_at(1))
    windowed = replace(students.SMALL, local_window=8, global_every=2, alibi=True)
    with pytest.raises(
        Permanent,
        match=r"its student has other parts than small: global_every \(off, here 2\), local_window \(off, "
        r"here 8\), alibi \(off, here True\)\. Begin with a checkpoint of the same parts, or without one",
    ):
        start_of(context, filled(device, 2.0, windowed))
    save_checkpoints(context, filled(device, 1.0, windowed), state_at(1))
    with pytest.raises(Permanent, match=r"than small: global_every \(2, here off\), local_window"):
        start_of(context, filled(device, 2.0))


@pytest.mark.parametrize("name", SHAPES)
def test_a_checkpoint_from_before_the_locked_parts_is_rejected_with_their_names(
    context: StageContext, device: torch.device, name: str
) -> None:
    """Of the small student: which parts a checkpoint lacks does not depend on its size."""
    save_checkpoints(context, filled(device, 1.0), state_at(1))
    parts = SHAPES[name].parts
    assert set(parts) == set(PARTS) - {"router_bias"}
    listed = ", ".join(f"{part} (off, here {value})" for part, value in parts.items())
    assert other_parts({}, SHAPES[name]) == f"its student has other parts than {name}: {listed}"
    with pytest.raises(Permanent, match=re.escape(f"its student has other parts than locked: {listed}. ")):
        start_of(context, students.learner(device, students.LOCKED))


def test_a_complete_student_resumes_with_the_same_bits(context: StageContext, device: torch.device) -> None:
    written, learner = (filled(device, number, students.COMPLETE) for number in (1.0, 2.0))
    save_checkpoints(context, written, state_at(4))
    assert start_of(context, learner).state == state_at(4) and equal_states(learner, written)


def test_the_newest_checkpoints_are_kept_and_leftovers_of_a_killed_attempt_are_deleted(
    context: StageContext, device: torch.device
) -> None:
    leftover = f"{paths.checkpoint(context.run, 'vanilla', 6)}/rank-00007.safetensors"
    for key in (leftover, leftover.replace("/6/", "/0/")):
        context.bucket.put_bytes(key, b"half", {})
    learner = filled(device, 1.0)
    save_checkpoints(context, learner, *(state_at(iteration) for iteration in range(1, 7)))
    folder = paths.checkpoints(context.run, "vanilla")
    assert list_iterations(context.bucket, folder) == [6, 5, 4, 3]
    assert {found.key.split("/")[-2] for found in context.bucket.list(folder + "/")} == {"3", "4", "5", "6"}
    assert not context.bucket.exists(leftover)


def test_a_rejected_checkpoint_does_not_count_as_kept(
    context: StageContext, device: torch.device, s3: S3
) -> None:
    """Four are kept, and the newest four are damaged. What the attempt that passed them over writes stays:
    the next one resumes there. They stay too until training has passed them."""
    good, learner = filled(device, 1.0), filled(device, 2.0)
    damaged = (10, 9, 8, 7)
    save_checkpoints(context, good, *map(state_at, reversed(damaged)))
    for iteration in damaged:
        folder = s3.folder / context.bucket.name / paths.checkpoint(context.run, "vanilla", iteration)
        truncate(folder / rank_file(0))
    save_checkpoints(context, good, state_at(5), state_at(6), rejected=damaged)
    started = start_of(context, learner)
    assert started.state == state_at(6) and equal_states(learner, good)
    assert tuple(started.rejected) == damaged


@pytest.fixture
def damaged_newest(context: StageContext, device: torch.device, s3: S3) -> Start:
    """The start of an attempt that has rejected checkpoint 5, the newest of the four that are kept."""
    save_checkpoints(context, filled(device, 1.0), *map(state_at, range(2, 6)))
    alter(s3.folder / context.bucket.name / paths.checkpoint(context.run, "vanilla", 5) / rank_file(0))
    started = start_of(context, filled(device, 2.0))
    assert started.state == state_at(4) and set(started.rejected) == {5}
    return started


def iterations(context: StageContext) -> list[int]:
    return list_iterations(context.bucket, paths.checkpoints(context.run, "vanilla"))


def test_a_rejected_checkpoint_that_training_has_passed_is_deleted_not_kept_for_a_usable_one(
    context: StageContext, device: torch.device, damaged_newest: Start, caplog: pytest.LogCaptureFixture
) -> None:
    save_checkpoints(context, filled(device, 1.0), state_at(6), rejected=damaged_newest.rejected)
    assert iterations(context) == [6, 4, 3, 2]
    url = context.bucket.url(paths.checkpoint(context.run, "vanilla", 5))
    deleted = f"Deleted checkpoint {url}, which this attempt has rejected: checkpoint 6 replaces it"
    assert [record.levelname for record in caplog.records if record.message == deleted] == ["WARNING"]


def test_a_checkpoint_that_is_written_in_a_rejected_one_s_place_is_kept(
    context: StageContext, device: torch.device, damaged_newest: Start
) -> None:
    good, learner = filled(device, 1.0), filled(device, 2.0)
    save_checkpoints(context, good, state_at(5), state_at(6), rejected=damaged_newest.rejected)
    assert iterations(context) == [6, 5, 4, 3]
    context.bucket.delete_prefix(paths.checkpoint(context.run, "vanilla", 6))
    assert start_of(context, learner).state == state_at(5) and equal_states(learner, good)


class Killed(Exception):
    """Stands for a SIGKILL: nothing of the writer runs after it."""


def kill_before(owner: object, name: str, key: str) -> Callable[[pytest.MonkeyPatch], None]:
    """Kill the writer in the first call of a function with an argument that contains `key`."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        function = getattr(owner, name)

        def killed(*arguments: Any) -> Any:
            if any(key in str(argument) for argument in arguments):
                raise Killed
            return function(*arguments)

        monkeypatch.setattr(owner, name, killed)

    return patch


@pytest.mark.parametrize(
    "kill, left, kept",
    [
        pytest.param(
            kill_before(Bucket, "put_parts", "/6/"), [5, 4, 3, 2], [7, 4, 3, 2], id="before-its-files"
        ),
        pytest.param(
            kill_before(Bucket, "delete", "/5/manifest"), [5, 4, 3, 2], [7, 4, 3, 2], id="before-the-deletion"
        ),
        pytest.param(
            kill_before(Bucket, "delete", "/5/rank"), [4, 3, 2], [7, 4, 3, 2], id="within-the-deletion"
        ),
        pytest.param(
            kill_before(manifest, "write", "/6/"), [4, 3, 2], [7, 4, 3, 2], id="before-the-manifest"
        ),
        pytest.param(kill_before(writer, "prune", ""), [6, 4, 3, 2], [7, 6, 4, 3], id="before-pruning"),
    ],
)
def test_an_attempt_that_is_killed_while_it_passes_a_rejected_checkpoint_leaves_none_to_keep(
    context: StageContext,
    device: torch.device,
    damaged_newest: Start,
    monkeypatch: pytest.MonkeyPatch,
    kill: Callable[[pytest.MonkeyPatch], None],
    left: list[int],
    kept: list[int],
) -> None:
    """The next attempt does not know which checkpoints an earlier one has rejected."""
    good = filled(device, 1.0)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill(patch)
        save_checkpoints(context, good, state_at(6), rejected=damaged_newest.rejected)
    assert iterations(context) == left
    started = start_of(context, filled(device, 2.0))
    assert started.state == state_at(max(set(left) - {5})) and set(started.rejected) == set(left) & {5}
    save_checkpoints(context, good, state_at(7), rejected=started.rejected)
    assert iterations(context) == kept
    folder = paths.checkpoints(context.run, "vanilla") + "/"
    present = {found.key.removeprefix(folder).partition("/")[0] for found in context.bucket.list(folder)}
    assert present == set(map(str, kept)), "no files of a deleted one are left"


def test_a_stage_that_ends_before_a_rejected_checkpoint_has_its_end_as_the_newest(
    context: StageContext, device: torch.device, s3: S3, damaged_newest: Start
) -> None:
    """As by `stop`, on GPUs, where steps that are repeated need not have the same bits."""
    alter(s3.folder / context.bucket.name / paths.checkpoint(context.run, "vanilla", 4) / rank_file(0))
    learner = filled(device, 1.0)
    started = start_of(context, learner)
    save_checkpoints(context, learner, state_at(4, finished=True), rejected=started.rejected)
    assert iterations(context) == [4, 3, 2]
    assert load_stage_end(context.bucket, paths.checkpoints(context.run, "vanilla")) is not None


def test_a_checkpoint_of_another_number_of_ranks_is_read_by_its_slices(
    context: StageContext, device: torch.device, tmp_path: Path
) -> None:
    """The checkpoint of one rank, rewritten as one of three ranks with every tensor cut at uneven places."""
    written = filled(device, 1.0)
    save_checkpoints(context, written, state_at(1))
    folder = paths.checkpoint(context.run, "vanilla", 1)
    whole = manifest.load(context.bucket, paths.manifest(folder))
    context.bucket.download(whole.subjects[rank_file(0)], tmp_path / "whole")
    slices_of_rank: list[dict[str, torch.Tensor]] = [{}, {}, {}]
    for key, tensor in load_file(tmp_path / "whole").items():
        ends = [0, len(tensor) // 5, len(tensor) // 3, len(tensor)]
        for rank in range(3):
            start, stop = ends[rank], ends[rank + 1]
            slices_of_rank[rank][f"{key.partition('[')[0]}[{start}:{stop}]"] = tensor[start:stop].clone()
    stored = [context.bucket.put_bytes(f"{folder}/{BUFFERS}", context.bucket.get(f"{folder}/{BUFFERS}"), {})]
    for rank in range(3):
        save_file(slices_of_rank[rank], tmp_path / "part")
        stored.append(context.bucket.put_file(f"{folder}/{rank_file(rank)}", tmp_path / "part", {}))
    context.bucket.delete(paths.manifest(folder))
    facts = {**whole.facts, "ranks": 3}
    statement = manifest.statement(
        "checkpoint",
        [stored_object.subject(folder) for stored_object in stored],
        facts,
        whole.provenance,
        list(whole.inputs.values()),
    )
    manifest.write(context.bucket, paths.manifest(folder), statement)
    learner = filled(device, 2.0)
    start_of(context, learner)
    assert equal_states(learner, written)


def context_of_next_stage(context: StageContext) -> StageContext:
    return StageContext(
        context.run,
        context.run.spec.stages[1],
        context.bucket,
        context.dataset,
        context.provenance,
        context.stopping,
        context.scratch,
    )  # type: ignore[arg-type]


def test_a_stage_starts_from_the_end_of_the_previous_one(context: StageContext, device: torch.device) -> None:
    written = filled(device, 1.0)
    save_checkpoints(context, written, state_at(5, next_sequence=20, epoch=2, finished=True))
    learner = filled(device, 2.0)
    started = start_of(context_of_next_stage(context), learner)
    assert equal_states(learner, written) and learner.steps == 5
    position = started.state
    assert (position.stage, position.steps, position.tokens, position.iteration) == ("second", 0, 0, 5)
    assert (position.first_sequence, position.next_sequence, position.epoch, position.before) == (
        20,
        20,
        2,
        None,
    )
    assert started.sources[0].uri.endswith("/checkpoints/vanilla/5/manifest.json")


@pytest.mark.parametrize(
    "positions, message",
    [
        pytest.param([], "follows vanilla, which has no checkpoint. Train that first", id="no-checkpoint"),
        pytest.param(
            [state_at(5)], "follows vanilla, which has not finished: it is at 500 tokens", id="not-finished"
        ),
    ],
)
def test_a_stage_does_not_start_before_the_previous_one_has_finished(
    context: StageContext, device: torch.device, positions: list[TrainState], message: str
) -> None:
    learner = filled(device, 1.0)
    save_checkpoints(context, learner, *positions)
    with pytest.raises(Permanent, match=message):
        start_of(context_of_next_stage(context), learner)


def test_a_damaged_final_checkpoint_is_not_replaced_by_an_earlier_one(
    context: StageContext, device: torch.device, s3: S3
) -> None:
    save_checkpoints(context, filled(device, 1.0), state_at(4), state_at(5, finished=True))
    alter(s3.folder / context.bucket.name / paths.checkpoint(context.run, "vanilla", 5) / rank_file(0))
    with pytest.raises(
        Permanent, match=r"stage second cannot begin: checkpoint .*/checkpoints/vanilla/5 cannot be used"
    ):
        start_of(context_of_next_stage(context), filled(device, 2.0))


def filled_with_projection(device: torch.device, number: float, width: int = 24) -> Learner:
    """`filled`, with a projection to a teacher's width."""
    learner = students.learner(device, teacher_width=width)
    for piece in state.slices(learner):
        piece.tensor.copy_(torch.arange(piece.start, piece.stop) / 1000 + number)
    return learner


def without_projection(learner: Learner) -> dict[str, list[tuple[int, torch.Tensor]]]:
    return {name: slices for name, slices in copy_slices(learner).items() if not name.endswith("/projection")}


def equal(
    one: dict[str, list[tuple[int, torch.Tensor]]], other: dict[str, list[tuple[int, torch.Tensor]]]
) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name][0][1], other[name][0][1]) for name in one)


@pytest.mark.parametrize(
    "width", [pytest.param(None, id="without-projection"), pytest.param(20, id="of-another-width")]
)
def test_a_projection_is_initialised_if_the_previous_stage_has_none_of_its_width(
    context: StageContext, device: torch.device, width: int | None
) -> None:
    written = filled(device, 1.0) if width is None else filled_with_projection(device, 1.0, width)
    save_checkpoints(context, written, state_at(5, finished=True))
    new, learner = students.learner(device, teacher_width=24), students.learner(device, teacher_width=24)
    start_of(context_of_next_stage(context), learner)
    assert equal(without_projection(learner), without_projection(written)) and learner.steps == 5
    state_at_start = copy_slices(learner)
    assert (
        torch.equal(state_at_start["main/projection"][0][1], copy_slices(new)["main/projection"][0][1])
        and (state_at_start["main/projection"][0][1] != 0).any()
    )
    assert all((state_at_start[f"{kind}/projection"][0][1] == 0).all() for kind in state.MOMENTS)


def test_a_projection_is_inherited_and_dropped_by_a_stage_without_one(
    context: StageContext, device: torch.device
) -> None:
    written = filled_with_projection(device, 1.0)
    save_checkpoints(context, written, state_at(5, finished=True))
    learner, without = filled_with_projection(device, 2.0), filled(device, 2.0)
    start_of(context_of_next_stage(context), learner)
    start_of(context_of_next_stage(context), without)
    assert equal_states(learner, written) and equal(copy_slices(without), without_projection(written))


def test_a_stage_does_not_resume_without_its_own_projection(
    context: StageContext, device: torch.device
) -> None:
    save_checkpoints(context, filled(device, 1.0), state_at(5))
    with pytest.raises(Permanent, match="cover 0 of the 768 elements of main/projection"):
        start_of(context, filled_with_projection(device, 2.0))


@pytest.mark.parametrize("field", ["init", "resumeFrom"])
def test_a_first_stage_can_start_from_another_run(
    context: StageContext, run_spec: dict[str, Any], device: torch.device, tmp_path: Path, field: str
) -> None:
    """student.init.checkpoint takes only the weights; resumeFrom also the optimizer and, for the same
    dataset, the data position."""
    written = filled(device, 1.0)
    save_checkpoints(context, written, state_at(3), state_at(4, next_sequence=8))
    folder = paths.checkpoint(context.run, "vanilla", 4) if field == "init" else paths.run(context.run)
    url = context.bucket.url(folder)
    run_spec["spec"]["student"] |= {"init": {"checkpoint": url}} if field == "init" else {}
    run_spec["spec"] |= {"resumeFrom": url} if field == "resumeFrom" else {}
    run_spec["metadata"]["name"] = "another"
    learner = filled(device, 2.0)
    started = start_of(datasets.context(context.bucket, run_spec, tmp_path, context.dataset), learner)
    weights, saved_weights = (
        {
            name: slices
            for name, slices in copy_slices(source).items()
            if name.startswith(("main/", "buffer/"))
        }
        for source in (learner, written)
    )
    assert all(torch.equal(weights[name][0][1], saved_weights[name][0][1]) for name in saved_weights)
    assert started.state.steps == 0 and started.state.iteration == learner.steps == (
        0 if field == "init" else 4
    )
    assert equal_states(learner, written) is (field == "resumeFrom")


UPCYCLE = {"upcycle": {"model": "hf://owner/dense@main", "seed": 7}}


def write_initial_weights(context: StageContext, run: DistillRun, learner: Learner) -> Manifest:
    """What the step init writes, with the weights of `learner`."""
    bucket, folder, path = context.bucket, paths.init(run), context.scratch / "weights-00000.safetensors"
    tensors = {
        f"{name}[0:{whole.numel()}]": whole
        for name, slices in copy_slices(learner).items()
        if name.startswith(("main/", "buffer/"))
        for whole in [slices[0][1]]
    }
    save_file(tensors, path)
    subject = bucket.put_file(f"{folder}/{path.name}", path, {}).subject(folder)
    source = Input("model", "hf://owner/dense@main", {"sha256": datasets.HEX, "gitCommit": "0" * 40}, {})
    made = manifest.statement(
        "init",
        [subject],
        {"position": initial_state("init").dump()},
        datasets.PROVENANCE,
        [datasets.TOKENIZER, source],
    )
    return manifest.write(bucket, paths.manifest(folder), made)


@pytest.mark.parametrize("field", ["upcycle", "checkpoint"])
def test_a_first_stage_can_start_from_weights_that_were_made_from_a_dense_model(
    context: StageContext, run_spec: dict[str, Any], device: torch.device, tmp_path: Path, field: str
) -> None:
    """Those of its own step init, which its checkpoints then name; or of the step init of another run."""
    run_spec["spec"]["student"]["init"] = UPCYCLE
    run, written = DistillRun.parse(run_spec), filled(device, 1.0)
    made = write_initial_weights(context, run, written)
    if field == "checkpoint":
        run_spec["spec"]["student"]["init"] = {"checkpoint": context.bucket.url(paths.init(run)) + "/"}
        run_spec["metadata"]["name"] = "another"
    learner = students.learner(device)
    started = start_of(datasets.context(context.bucket, run_spec, tmp_path, context.dataset), learner)
    expected, found = copy_slices(written), copy_slices(learner)
    for name in found:
        if name.startswith(("main/", "buffer/")):
            assert torch.equal(found[name][0][1], expected[name][0][1]), name
        else:
            assert not found[name][0][1].any(), "Adam's moments begin at 0"
    state = started.state
    assert (state.steps, state.tokens, state.iteration, state.next_sequence, learner.steps) == (0, 0, 0, 0, 0)
    (source,) = started.sources
    assert (source.uri, source.digest) == (context.bucket.url(made.key), {"sha256": made.sha256})
    if field == "upcycle":
        assert (source.name, source.facts["model"]) == ("init", "hf://owner/dense@main")
        assert started.origin == "from the dense model hf://owner/dense@main"
        assert source.facts["gitCommit"] == "0" * 40
    else:
        assert source.name == "checkpoint"


def test_a_first_stage_does_not_start_before_its_initial_weights_are_made(
    context: StageContext, run_spec: dict[str, Any], device: torch.device, tmp_path: Path
) -> None:
    run_spec["spec"]["student"]["init"] = UPCYCLE
    with pytest.raises(Permanent, match=r"/init: the run's initial weights are not made yet. Run python -m"):
        start_of(datasets.context(context.bucket, run_spec, tmp_path, context.dataset), filled(device, 2.0))


def write_manifest_of(kind: str) -> Callable[[Bucket], object]:
    def write(bucket: Bucket) -> None:
        subject = bucket.put_bytes("other/config.json", b"{}", {}).subject("other")
        inputs = [datasets.TOKENIZER, Input("dataset", "s3://x", {"sha256": datasets.HEX}, {})]
        statement = manifest.statement(kind, [subject], {"ranks": 1}, datasets.PROVENANCE, inputs)
        manifest.write(bucket, paths.manifest("other"), statement)

    return write


@pytest.mark.parametrize(
    "write, message",
    [
        pytest.param(lambda bucket: None, r"other/manifest.json: .*there is no such object", id="nothing"),
        pytest.param(
            lambda bucket: bucket.put_bytes("other/model.safetensors", b"x", {}),
            r"other/manifest.json: .*there is no such object",
            id="hugging-face-model",
        ),
        pytest.param(
            lambda bucket: bucket.put_bytes("other/manifest.json", b"{}", {}),
            r"other/manifest.json",
            id="another-program-s-manifest",
        ),
        pytest.param(
            write_manifest_of("weights"),
            "is the manifest of weights, not of a checkpoint. Name a",
            id="export",
        ),
        pytest.param(write_manifest_of("dataset"), "is the manifest of dataset, not of a ch", id="dataset"),
        pytest.param(write_manifest_of("scores"), "is the manifest of scores, not of a ch", id="scores"),
        pytest.param(write_manifest_of("checkpoint"), "TrainState", id="checkpoint-without-state"),
    ],
)
def test_initial_weights_that_are_no_checkpoint_are_rejected(
    context: StageContext,
    run_spec: dict[str, Any],
    device: torch.device,
    tmp_path: Path,
    write: Callable[[Bucket], object],
    message: str,
) -> None:
    write(context.bucket)
    run_spec["spec"]["student"]["init"] = {"checkpoint": context.bucket.url("other")}
    learner = filled(device, 2.0)
    with pytest.raises(Permanent, match=rf"stage vanilla cannot begin: (.|\n)*{message}"):
        start_of(datasets.context(context.bucket, run_spec, tmp_path, context.dataset), learner)
    assert equal_states(learner, filled(device, 2.0)), "the learner is unchanged"


def test_only_iterations_are_checkpoints(context: StageContext, device: torch.device) -> None:
    save_checkpoints(context, filled(device, 1.0), state_at(3))
    folder = paths.checkpoints(context.run, "vanilla")
    names = ("latest", "-1", "02", "1.5", "٤", "5/copy", "best of 7", "9" * 30, "9" * 200)
    for name in names:
        context.bucket.put_bytes(f"{folder}/{name}/manifest.json", b"{}", {})
    assert list_iterations(context.bucket, folder) == [3]
    writer.prune(context.bucket, folder, 1, latest=3)
    assert all(context.bucket.exists(f"{folder}/{name}/manifest.json") for name in (*names, "3"))


def test_the_end_of_a_stage_is_read_without_its_weights(
    context: StageContext, device: torch.device, s3: S3
) -> None:
    folder = paths.checkpoints(context.run, "vanilla")
    assert load_stage_end(context.bucket, folder) is None
    save_checkpoints(context, filled(device, 1.0), state_at(1))
    assert load_stage_end(context.bucket, folder) is None
    save_checkpoints(context, filled(device, 1.0), state_at(2, finished=True))
    reached = load_stage_end(context.bucket, folder)
    assert reached is not None and reached[1].tokens == 200
    path = s3.folder / context.bucket.name / paths.manifest(paths.checkpoint(context.run, "vanilla", 2))
    content = json.loads(path.read_bytes())
    del content["predicate"]["buildDefinition"]["internalParameters"]["position"]
    context.bucket.put_bytes(paths.manifest(f"{folder}/2"), json.dumps(content).encode(), {})
    assert load_stage_end(context.bucket, folder) is None
