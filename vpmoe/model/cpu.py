"""What megatron-core 0.19 needs to run without CUDA. The only module that patches anything, used only where the CPU was asked for.

megatron-core takes its device from `torch.cuda.current_device()`, orders work with CUDA streams, writes device="cuda" in its optimizer and
tells dtypes apart by the names of CUDA tensor types. Here each of these gets an answer that is true for a machine whose only device is the
CPU: streams are the one order there is, an event has always happened. Patches reach no further than they must: what can be replaced in
megatron's own modules is replaced there, and torch keeps its own factories and type names for everybody else.

Not covered, because the student has no use for it: tensor and sequence parallelism, dropout's generators, CUDA graphs, FSDP.
"""

import contextlib
import sys
from types import ModuleType
from typing import Any

import torch


class _Stream:
    """The CPU's single order of execution."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, _: object) -> None: ...

    def wait_event(self, _: object) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self) -> "_Event":
        return _Event()


class _Event:
    """A point in it that has already passed."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...


class _TorchOnCpu(ModuleType):
    """`torch` as the megatron modules below see it: device="cuda" means the CPU."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def tensor(data: Any, *, device: Any = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.tensor(data, device=_cpu_for_cuda(device), dtype=dtype)

    @staticmethod
    def zeros(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(*args, device=_cpu_for_cuda(device), **kwargs)


def _cpu_for_cuda(device: Any) -> Any:
    return "cpu" if device == "cuda" else device


def install() -> None:
    """Prepare torch and megatron-core for the CPU. Idempotent. Raises RuntimeError where CUDA is there: it would be lied to."""
    if torch.cuda.is_available():
        raise RuntimeError("vpmoe.model.cpu is for machines without CUDA. Set CUDA_VISIBLE_DEVICES to the empty string to hide the GPUs.")
    cuda: Any = torch.cuda
    if cuda.Stream is _Stream:
        return
    stream = _Stream()
    cuda.Stream, cuda.Event = _Stream, _Event
    cuda.current_stream = lambda *_: stream
    cuda.stream = lambda _: contextlib.nullcontext()
    cuda.current_device = lambda: torch.device("cpu")

    import megatron.core.optimizer.clip_grads
    import megatron.core.optimizer.optimizer
    import megatron.core.tensor_parallel.random
    import megatron.core.transformer.moe.token_dispatcher
    import megatron.core.utils

    for module in (megatron.core.optimizer.optimizer, megatron.core.optimizer.clip_grads, megatron.core.utils):
        module.torch = _TorchOnCpu("torch")
    generator: Any = megatron.core.tensor_parallel.random
    generator._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    generator._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    # gloo's all-to-all takes split sizes as numbers; megatron makes them numbers only on their way off a GPU.
    dispatcher: Any = megatron.core.transformer.moe.token_dispatcher
    dispatcher.maybe_move_tensor_to_cpu = lambda value, as_numpy=False, record_stream=False: (
        value.numpy() if as_numpy and torch.is_tensor(value) else value
    )
    _name_types_for_megatron()


def _name_types_for_megatron() -> None:
    """Let `tensor.type()` say torch.cuda.FloatTensor to megatron's optimizer, which knows fp32 by that name only, and to nobody else."""
    type_of = torch.Tensor.type

    def named(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        name = type_of(self, dtype, *args, **kwargs) if dtype is not None else type_of(self)
        asks = sys._getframe(1).f_globals.get("__name__", "")
        return name.replace("torch.", "torch.cuda.", 1) if dtype is None and asks.startswith("megatron.core.optimizer") else name

    torch.Tensor.type = named  # type: ignore[method-assign, assignment]
