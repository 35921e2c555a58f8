"""The weights of a checkpoint are read by name from the bucket, with the learner's bits for any division into
files. Damaged checkpoints are rejected."""

import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.fakes import datasets
from tests.fakes.checkpoints import alter, filled, save_checkpoints, state_at, truncate
from tests.fakes.store import S3
from tests.fakes.students import SMALL, learner, new_seed
from vpmoe.checkpoint.format import WEIGHTS, CheckpointRejected, open_weights
from vpmoe.model import hf_export, state
from vpmoe.storage import Bucket, manifest, paths
from vpmoe.storage.manifest import Input
from vpmoe.trainer.checkpoint.state_copy import BUFFERS, rank_file
from vpmoe.trainer.context import StageContext

pytestmark = pytest.mark.usefixtures("device")


@pytest.fixture
def context(bucket: Bucket, run_spec: dict[str, Any], tmp_path: Path) -> StageContext:
    return datasets.context(bucket, run_spec, tmp_path, datasets.write_dataset(bucket, [[]], [[]]))


def test_weights_read_from_a_checkpoint_equal_the_learners(
    context: StageContext, device: torch.device
) -> None:
    it = filled(device, 1.0)
    save_checkpoints(context, it, state_at(3, finished=True))
    weights = open_weights(context.bucket, paths.checkpoint(context.run, "vanilla", 3))
    assert weights.train_state == state_at(3, finished=True)
    assert weights.sizes == {name: size for name, size in state.sizes(it).items() if name.startswith(WEIGHTS)}
    live_weights = state.copy_weights(it)
    for name, size in weights.sizes.items():
        assert torch.equal(weights.read(name, 0, size), live_weights(name, 0, size))
    assert torch.equal(weights.read("main/output", 5, 700), live_weights("main/output", 5, 700))


def write_checkpoint(
    bucket: Bucket, folder: str, files: list[dict[str, torch.Tensor]], scratch: Path
) -> None:
    """Write a checkpoint of these files to `folder`."""
    subjects = []
    for number, tensors in enumerate(files):
        save_file(tensors, scratch / "file")
        subjects.append(
            bucket.put_file(f"{folder}/{rank_file(number)}", scratch / "file", {}).subject(folder)
        )
    inputs = [datasets.TOKENIZER, Input("dataset", "s3://x", {"sha256": datasets.HEX}, {})]
    statement = manifest.statement(
        "checkpoint",
        subjects,
        {"ranks": len(files), "position": state_at(1).dump()},
        datasets.PROVENANCE,
        inputs,
    )
    manifest.write(bucket, paths.manifest(folder), statement)


def test_slices_of_many_files_are_joined(bucket: Bucket, tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(new_seed())
    whole = torch.randn(3_000_000, generator=random)  # more than one block
    cuts = [0, 7, 1_000_000, 1_000_001, 2_999_999, 3_000_000]
    files: list[dict[str, torch.Tensor]] = [
        {"exp_avg/a[0:2]": torch.zeros(2), "random/0/cpu[0:3]": torch.zeros(3, dtype=torch.uint8)}
    ]
    files += [{f"main/a[{start}:{stop}]": whole[start:stop].clone()} for start, stop in pairwise(cuts)]
    write_checkpoint(bucket, "c/1", files[::-1], tmp_path)
    weights = open_weights(bucket, "c/1")
    assert weights.sizes == {"main/a": 3_000_000}
    for start, stop in [(0, 3_000_000), (3, 9), (7, 1_000_000), (999_998, 1_000_003), (2_999_999, 3_000_000)]:
        assert torch.equal(weights.read("main/a", start, stop), whole[start:stop])


@pytest.mark.parametrize(
    "files, message",
    [
        pytest.param(
            [{"main/a[0:2]": torch.zeros(2)}, {"main/a[3:5]": torch.zeros(2)}],
            "cover 2 of the 5 elements of main/a",
            id="gap",
        ),
        pytest.param(
            [{"main/a[0:2]": torch.zeros(2)}, {"main/a[1:5]": torch.zeros(4)}],
            "cover 2 of the 5 elements of main/a",
            id="overlap",
        ),
        pytest.param(
            [{"main/a[0:2]": torch.zeros(2)}, {"main/a[0:2]": torch.zeros(2)}],
            "cover 2 of the 2 elements",
            id="twice",
        ),
        pytest.param(
            [{"main/a[0:2]": torch.zeros(2).half()}], "main/a is F16, expected F32", id="another-type"
        ),
        pytest.param(
            [{"main/a[0:2]": torch.zeros(2)}, {"main/a[2:4]": torch.zeros(2).bfloat16()}],
            "main/a is BF16, expected F32",
            id="one-slice-of-another-type",
        ),
        pytest.param(
            [{"main/a[0:2]": torch.zeros(3)}], r"main/a\[0:2\] is \[3\]. Another program", id="longer"
        ),
        pytest.param([{"main/a[0:4]": torch.zeros(2)}], r"main/a\[0:4\] is \[2\]", id="shorter"),
        pytest.param([{"buffer/a[0:4]": torch.zeros(2, 2)}], r"buffer/a\[0:4\] is \[2, 2\]", id="matrix"),
        pytest.param([{"main/a[4:2]": torch.zeros(2)}], r"main/a\[4:2\] is \[2\]", id="backwards"),
    ],
)
def test_incomplete_tensors_are_rejected(
    bucket: Bucket, tmp_path: Path, files: list[dict[str, torch.Tensor]], message: str
) -> None:
    write_checkpoint(bucket, "c/1", files, tmp_path)
    with pytest.raises(CheckpointRejected, match=f"checkpoint s3://.*/c/1 cannot be used.*{message}"):
        open_weights(bucket, "c/1")


@pytest.mark.parametrize(
    "content, message",
    [
        pytest.param(b"", "is not a safetensors file, or is cut: it has 0 bytes", id="empty"),
        pytest.param(b"\x05\x00", "it has 2 bytes", id="two-bytes"),
        pytest.param(b"<!DOCTYPE html><html></html>", "is not a safetensors file", id="web-page"),
        pytest.param((1 << 40).to_bytes(8, "little") + b"{}", "promise a header of", id="length"),
        pytest.param((2).to_bytes(8, "little") + b"[]", "is not a JSON object", id="list"),
        pytest.param((2).to_bytes(8, "little") + b"{}x", "its tensors have 0 bytes", id="more-bytes"),
        pytest.param((9).to_bytes(8, "little") + b'{"a": {}}', "entry of a has no dtype", id="entry"),
    ],
)
def test_a_file_of_another_program_is_rejected_by_name(bucket: Bucket, content: bytes, message: str) -> None:
    """Its manifest is right: the file was never a part of a checkpoint."""
    subject = bucket.put_bytes("c/1/rank-00000.safetensors", content, {}).subject("c/1")
    inputs = [datasets.TOKENIZER, Input("dataset", "s3://x", {"sha256": datasets.HEX}, {})]
    facts = {"ranks": 1, "position": state_at(1).dump()}
    statement = manifest.statement("checkpoint", [subject], facts, datasets.PROVENANCE, inputs)
    manifest.write(bucket, paths.manifest("c/1"), statement)
    with pytest.raises(CheckpointRejected, match=f"c/1 cannot be used.*rank-00000.safetensors.*{message}"):
        open_weights(bucket, "c/1")


@pytest.mark.parametrize(
    "file, damage, message",
    [
        pytest.param(rank_file(0), alter, "sha256 of block 0 is", id="altered-shard"),
        pytest.param(BUFFERS, truncate, "bytes, its manifest says", id="truncated-buffers"),
        pytest.param(rank_file(0), Path.unlink, "there is no such object", id="missing-shard"),
        pytest.param("manifest.json", truncate, "sha256 is", id="truncated-manifest"),
    ],
)
def test_a_damaged_checkpoint_is_rejected_by_name(
    context: StageContext,
    device: torch.device,
    s3: S3,
    file: str,
    damage: Callable[[Path], None],
    message: str,
) -> None:
    save_checkpoints(context, filled(device, 1.0), state_at(3))
    folder = paths.checkpoint(context.run, "vanilla", 3)
    damage(s3.folder / context.bucket.name / folder / file)
    with pytest.raises(
        CheckpointRejected, match=f"checkpoints/vanilla/3 cannot be used. .*{file}.*{message}"
    ):
        open_weights(context.bucket, folder)


def test_a_checkpoint_is_exported_without_a_learner(
    context: StageContext, device: torch.device, tmp_path: Path
) -> None:
    """The export equals that of the learner bit for bit, without the tensors of TeacherForced and of the
    optimizer."""
    it = learner(device, teacher_width=48)
    save_checkpoints(context, it, state_at(3))
    weights = open_weights(context.bucket, paths.checkpoint(context.run, "vanilla", 3))
    hf_export.export_student(tmp_path / "read", SMALL, 256, weights.sizes, weights.read, torch.bfloat16)
    hf_export.export_student(
        tmp_path / "live", SMALL, 256, state.sizes(it), state.copy_weights(it), torch.bfloat16
    )
    files = [sorted(folder.iterdir()) for folder in (tmp_path / "read", tmp_path / "live")]
    assert [file.read_bytes() for file in files[0]] == [file.read_bytes() for file in files[1]]
    hf_export.check_export(tmp_path / "read", SMALL)


def test_a_checkpoint_is_read_without_megatron() -> None:
    code = (
        "import sys, vpmoe.checkpoint.format; "
        "print([name for name in sys.modules if name.split('.')[0] in ('megatron', 'vllm')])"
    )
    assert (
        subprocess.check_output(
            [sys.executable, "-c", code], cwd=Path(__file__).parents[3], text=True
        ).strip()
        == "[]"
    )
