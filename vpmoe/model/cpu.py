"""Patches that let megatron-core 0.19 run without CUDA. The only module that patches anything.

It is used only if the environment selects the CPU (device.py). megatron-core takes its device from
`torch.cuda.current_device()`, uses CUDA's stream when it starts a reduction, writes device="cuda" in its
optimizer, and distinguishes dtypes by the names of CUDA tensor types. Each patch returns the value that is
correct on a CPU. Where possible a patch replaces a name in megatron's own modules, so torch's factories and
type names stay as they are for all other code.

The patches cover what the student uses: no tensor, sequence or pipeline parallelism, dropout, CUDA graphs,
offloading or FSDP.
"""

import sys
from types import ModuleType
from typing import Any

import torch


class _Stream:
    """The stream of the CPU: operations run in order, so there is nothing to wait for."""


class _TorchOnCpu(ModuleType):
    """`torch` as some of megatron's modules see it: device="cuda" means the CPU."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def tensor(data: Any, *, device: Any = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.tensor(data, device=_cpu_for_cuda(device), dtype=dtype)

    @staticmethod
    def zeros(*size: Any, device: Any = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.zeros(*size, device=_cpu_for_cuda(device), dtype=dtype)


def _cpu_for_cuda(device: Any) -> Any:
    return "cpu" if device == "cuda" else device


def install() -> None:
    """Prepare torch and megatron-core for the CPU. Idempotent. Raises RuntimeError if CUDA is available."""
    if torch.cuda.is_available():
        raise RuntimeError(
            "vpmoe.model.cpu is for machines without CUDA. Set CUDA_VISIBLE_DEVICES to the empty string (in "
            "a pod: runtime.env) to hide the GPUs."
        )
    cuda: Any = torch.cuda
    if cuda.Stream is _Stream:
        return
    cuda.Stream, cuda.current_stream = _Stream, _Stream
    cuda.current_device = lambda: torch.device("cpu")

    import megatron.core.optimizer.clip_grads
    import megatron.core.optimizer.optimizer
    import megatron.core.tensor_parallel.random
    import megatron.core.utils

    for module in (
        megatron.core.optimizer.optimizer,
        megatron.core.optimizer.clip_grads,
        megatron.core.utils,
    ):
        module.torch = _TorchOnCpu("torch")
    # Recomputation saves and restores the random generator around every layer.
    generator: Any = megatron.core.tensor_parallel.random
    generator._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    generator._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    _name_types_for_megatron()


def _name_types_for_megatron() -> None:
    """Let `tensor.type()` return torch.cuda.FloatTensor inside megatron's optimizer, which recognises fp32 by
    that name only."""
    type_of = torch.Tensor.type

    def named(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is not None:
            return type_of(self, dtype, *args, **kwargs)
        asks = sys._getframe(1).f_globals.get("__name__", "")
        name = type_of(self)
        return (
            name.replace("torch.", "torch.cuda.", 1) if asks.startswith("megatron.core.optimizer") else name
        )

    torch.Tensor.type = named  # type: ignore[method-assign, assignment]
