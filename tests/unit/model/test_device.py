"""The environment selects a process's device. The patches that let megatron-core run on a CPU affect only
megatron-core."""

import os
import subprocess
import sys

import pytest
import torch

from vpmoe.failure import Permanent
from vpmoe.model import cpu
from vpmoe.model.device import choose


def test_an_empty_list_of_gpus_selects_the_cpu(device: torch.device) -> None:
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and device == torch.device("cpu") == choose()


@pytest.mark.parametrize(
    "rank, variables",
    [(0, {}), (0, {"CUDA_VISIBLE_DEVICES": "0"}), (3, {"LOCAL_RANK": "3"})],
    ids=["unset", "one", "rank"],
)
def test_a_missing_gpu_is_an_error_and_never_selects_the_cpu(
    rank: int, variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        Permanent,
        match=rf"process {rank} of this pod finds 0 CUDA devices\. "
        r".*set CUDA_VISIBLE_DEVICES to the empty string",
    ):
        choose()


def test_the_patches_are_rejected_on_a_machine_with_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match="for machines without CUDA"):
        cpu.install()


def test_the_patches_do_not_affect_torch_itself(device: torch.device) -> None:
    assert (
        torch.zeros(1).type() == "torch.FloatTensor" and torch.zeros(1).type(torch.int32).dtype == torch.int32
    )
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(1, device="cuda")


def test_shapes_are_imported_without_torch() -> None:
    """Checking a layout and counting parameters must not wait seconds for the import of torch."""
    code = (
        "import sys, vpmoe.model.shapes; assert 'torch' not in sys.modules and 'megatron' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
