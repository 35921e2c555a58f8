"""The state of a student in training as named flat slices, which any number of ranks can write and read.

A name is a kind and a parameter: "main/…" (the fp32 parameter that the optimizer updates), "exp_avg/…",
"exp_avg_sq/…", and "buffer/…" for the expert biases. A slice is a range of the flattened tensor; the experts
of all expert-parallel ranks are one tensor. The bf16 weights are not part of it, because they are the rounded
main parameters. vpmoe/checkpoint and vpmoe/trainer/checkpoint make files of it.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch import Tensor

from vpmoe.model.student import Student

MOMENTS = ("exp_avg", "exp_avg_sq")
NOT_EVERY_STAGES = ("projection",)
"""Parameters that a student has only in TeacherForced stages: the state of another stage is complete
without."""

ReadTensor = Callable[[str, int, int], Tensor]
"""`(name, start, stop) -> fp32 tensor [stop − start]`, on any device."""


class StatefulLearner(Protocol):
    """The parts of a Learner that hold its state."""

    student: Student
    device: torch.device
    ddp: DistributedDataParallel
    optimizer: Any


@dataclass(frozen=True, eq=False)
class StateSlice:
    """[start, stop) of the flattened tensor `name`. The tensor is the live one, on its device: copy it before
    the next step."""

    name: str
    start: int
    stop: int
    tensor: Tensor


@dataclass(frozen=True, eq=False)
class OptimizerShard:
    """The part of one parameter that this rank's optimizer moves."""

    name: str
    start: int
    main: Tensor
    """fp32, flat. On the CPU it IS the weight, a view of it; on the GPU the weight is its copy in bf16."""
    weight: Tensor
    moments: dict[str, Any]
    """Adam's: "step", "exp_avg", "exp_avg_sq"."""


def shards(learner: StatefulLearner) -> Iterator[OptimizerShard]:
    """This rank's shards, in the optimizer's order."""
    names = {id(parameter): name for name, parameter in learner.student.named_parameters()}
    for part in learner.optimizer.chained_optimizers:
        groups = zip(
            [*part.model_fp32_groups, *part.model_float16_groups],
            [*part.shard_fp32_groups, *part.shard_fp32_from_float16_groups],
            strict=True,
        )
        for parameters, mains in groups:
            for parameter, main in zip(parameters, mains, strict=True):
                held = part._get_model_param_range_map(parameter)["param"]
                yield OptimizerShard(
                    name=names[id(parameter)],
                    start=held.start + _first(parameter),
                    main=main.detach(),
                    weight=parameter.detach().view(-1)[held.start : held.end],
                    moments=part.optimizer.state[main],
                )


def allocate_moments(learner: StatefulLearner) -> None:
    """Give Adam its state before the first step, so that a state taken at any time has the same tensors."""
    for shard in shards(learner):
        shard.moments.update(
            step=torch.zeros((), device=shard.main.device),
            **{kind: torch.zeros_like(shard.main) for kind in MOMENTS},
        )


def slices(learner: StatefulLearner) -> list[StateSlice]:
    """All that this rank holds. Over all ranks the slices of a name cover it exactly once; the buffers are
    rank 0's."""
    held = [
        StateSlice(f"{kind}/{shard.name}", shard.start, shard.start + shard.main.numel(), tensor)
        for shard in shards(learner)
        for kind, tensor in [("main", shard.main), *((kind, shard.moments[kind]) for kind in MOMENTS)]
    ]
    if torch.distributed.get_rank() == 0:
        held += [StateSlice(f"buffer/{name}", 0, bias.numel(), bias) for name, bias in _biases(learner)]
    return held


def sizes(learner: StatefulLearner) -> dict[str, int]:
    """Numbers in each name of a complete state; the same on every rank."""
    parameters = {
        name: parameter.numel() * _sharers(parameter)
        for name, parameter in learner.student.named_parameters()
    }
    return {f"{kind}/{name}": size for kind in ("main", *MOMENTS) for name, size in parameters.items()} | {
        f"buffer/{name}": bias.numel() for name, bias in _biases(learner)
    }


@torch.no_grad()
def restore(
    learner: StatefulLearner, read: ReadTensor, steps: int, moments: bool = True, anew: Collection[str] = ()
) -> None:
    """Take weights, expert biases and, with `moments`, Adam's state from `read`, of which every rank asks for
    its own slices only.

    `steps` is the count of optimizer steps behind that state. The parameters named in `anew` stay as they
    were built, with empty moments; they share the others' count of steps. All ranks call it. Raises what
    `read` raises, and ValueError for a slice of the wrong length; a learner whose restore failed is half old
    and half new and must not be used.
    """
    for shard in shards(learner):
        shard.moments["step"].fill_(steps if moments else 0)
        if shard.name in anew:
            continue
        wanted = {"main": shard.main} | ({kind: shard.moments[kind] for kind in MOMENTS} if moments else {})
        for kind, tensor in wanted.items():
            _fill(tensor, read, f"{kind}/{shard.name}", shard.start)
        shard.weight.copy_(shard.main)
    for name, bias in _biases(learner):
        _fill(bias, read, f"buffer/{name}", 0)
    learner.ddp.start_param_sync(force_sync=True)  # each rank has filled its own shards of the weights only


@torch.no_grad()
def copy_weights(learner: StatefulLearner, into: dict[str, Tensor] | None = None) -> ReadTensor:
    """A copy of the weights and expert biases as they are, on the CPU and under the names of a state. On the
    GPU the weights are bf16.

    All ranks call it, because with expert parallelism no rank has all experts; rank 0's is the one to read,
    the others' is empty. `into` keeps the copy's memory from one call to the next, which then overwrites it:
    a GPU copies forty times as fast into memory that is pinned, and pinning it takes longer than all else.
    """
    held = {} if into is None else into
    parameters = [(f"main/{name}", parameter) for name, parameter in learner.student.named_parameters()]
    for name, tensor in [*parameters, *((f"buffer/{name}", bias) for name, bias in _biases(learner))]:
        pieces = [tensor.flatten()]
        if (sharers := _sharers(tensor)) > 1:
            pieces = [torch.empty_like(pieces[0]) for _ in range(sharers)]
            torch.distributed.all_gather(
                pieces, tensor.flatten(), group=parallel_state.get_expert_model_parallel_group()
            )
        if torch.distributed.get_rank() == 0:
            whole = torch.cat(pieces)
            if name not in held:
                held[name] = torch.empty(whole.shape, dtype=whole.dtype, pin_memory=whole.is_cuda)
            held[name].copy_(whole, non_blocking=True)
    if learner.device.type == "cuda":
        torch.cuda.synchronize()
    return lambda name, start, stop: held[name][start:stop].float()


def _fill(tensor: Tensor, read: ReadTensor, name: str, start: int) -> None:
    values = read(name, start, start + tensor.numel())
    if values.shape != tensor.shape or values.dtype != torch.float32:
        raise ValueError(
            f"{name} [{start}, {start + tensor.numel()}): read {values.dtype} {list(values.shape)}, wanted "
            "that many of float32."
        )
    tensor.copy_(values)


def _biases(learner: StatefulLearner) -> list[tuple[str, Tensor]]:
    return [
        (name, buffer) for name, buffer in learner.student.named_buffers() if name.endswith(".expert_bias")
    ]


def _sharers(parameter: Tensor) -> int:
    """Ranks over which the parameter is spread by expert parallelism: 1 unless it is a stack of experts."""
    return (
        1 if getattr(parameter, "allreduce", True) else parallel_state.get_expert_model_parallel_world_size()
    )


def _first(parameter: Tensor) -> int:
    """Where this rank's stack of experts begins in the whole one, flattened."""
    return (
        0 if _sharers(parameter) == 1 else parallel_state.get_expert_model_parallel_rank() * parameter.numel()
    )


def random_state() -> dict[str, Tensor]:
    """Every generator that this process may draw from, as bytes. Nothing draws in training (no dropout); kept
    so that this stays true."""
    states = {
        "cpu": torch.get_rng_state(),
        **{f"megatron/{name}": state for name, state in get_cuda_rng_tracker().get_states().items()},
    }
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def set_random_state(states: dict[str, Tensor]) -> None:
    """What random_state gave, on the same kind of device."""
    torch.set_rng_state(states["cpu"])
    get_cuda_rng_tracker().set_states(
        {
            name.removeprefix("megatron/"): state
            for name, state in states.items()
            if name.startswith("megatron/")
        }
    )
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
