"""The state of a student in training as named flat slices, which any number of ranks can write and read.

A name is a kind and a parameter: "main/…" (the fp32 parameter that the optimizer updates), "exp_avg/…",
"exp_avg_sq/…", and "buffer/…" for the expert biases. A slice is a range of the flattened tensor. The experts
of all expert-parallel ranks are one tensor. The bf16 weights are not part of the state, because they are the
rounded main parameters. The files of a state are in vpmoe/checkpoint and vpmoe/trainer/checkpoint.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch import Tensor

from vpmoe.model.parameter_gather import ParameterGather
from vpmoe.model.student import Student

MOMENTS = ("exp_avg", "exp_avg_sq")
NOT_EVERY_STAGES = ("projection",)
"""Parameters that a student has only in TeacherForced stages. The state of another stage is complete without
them."""

ReadTensor = Callable[[str, int, int], Tensor]
"""`(name, start, stop) -> fp32 tensor [stop − start]`, on any device."""


class StatefulLearner(Protocol):
    """The parts of a Learner that hold its state."""

    device: torch.device
    gather: ParameterGather
    optimizer: Any

    @property
    def student(self) -> Student:
        """With complete weights."""


@dataclass(frozen=True, eq=False)
class StateSlice:
    """[start, stop) of the flattened tensor `name`.

    `tensor` is the live tensor, on its device: copy it before the next step.
    """

    name: str
    start: int
    stop: int
    tensor: Tensor


@dataclass(frozen=True, eq=False)
class OptimizerShard:
    """The part of one parameter that this rank's optimizer updates."""

    name: str
    """The parameter's name in the student."""
    start: int
    """Offset in the flattened parameter, over all expert-parallel ranks."""
    main: Tensor
    """fp32, flat. On the CPU it is a view of the weight; on the GPU the weight is its copy in bf16."""
    weight: Tensor
    """This range of the weight, flat."""
    moments: dict[str, Any]
    """Adam's state: "step", "exp_avg", "exp_avg_sq"."""


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
    """Create Adam's state before the first step, so that a state has the same tensors at any time."""
    for shard in shards(learner):
        shard.moments.update(
            step=torch.zeros((), device=shard.main.device),
            **{kind: torch.zeros_like(shard.main) for kind in MOMENTS},
        )


def slices(learner: StatefulLearner) -> list[StateSlice]:
    """The slices of this rank. Over all ranks the slices of a name cover it exactly once; rank 0 has the
    buffers."""
    held = [
        StateSlice(f"{kind}/{shard.name}", shard.start, shard.start + shard.main.numel(), tensor)
        for shard in shards(learner)
        for kind, tensor in [("main", shard.main), *((kind, shard.moments[kind]) for kind in MOMENTS)]
    ]
    if torch.distributed.get_rank() == 0:
        held += [StateSlice(f"buffer/{name}", 0, bias.numel(), bias) for name, bias in _biases(learner)]
    return held


def sizes(learner: StatefulLearner) -> dict[str, int]:
    """Number of elements of each tensor of a complete state; the same on every rank."""
    parameters = {
        name: parameter.numel() * _sharers(parameter)
        for name, parameter in learner.student.named_parameters()
    }
    return {f"{kind}/{name}": size for kind in ("main", *MOMENTS) for name, size in parameters.items()} | {
        f"buffer/{name}": bias.numel() for name, bias in _biases(learner)
    }


@torch.no_grad()
def restore(
    learner: StatefulLearner, read: ReadTensor, steps: int, moments: bool = True, fresh: Collection[str] = ()
) -> None:
    """Read weights, expert biases and, with `moments`, Adam's state. Each rank reads its own slices only.

    `steps` is the number of optimizer steps that led to the state. The parameters named in `fresh` are not
    read: they keep their initial values and zero moments, and share the step count of the others. All ranks
    call it. Raises what `read` raises, and ValueError if a slice has the wrong length or dtype. A learner
    whose restore failed is partly restored and must not be used.
    """
    for shard in shards(learner):
        shard.moments["step"].fill_(steps if moments else 0)
        if shard.name in fresh:
            continue
        wanted = {"main": shard.main} | ({kind: shard.moments[kind] for kind in MOMENTS} if moments else {})
        for kind, tensor in wanted.items():
            _fill(tensor, read, f"{kind}/{shard.name}", shard.start)
        shard.weight.copy_(shard.main)
    for name, bias in _biases(learner):
        _fill(bias, read, f"buffer/{name}", 0)
    learner.gather.start()  # each rank has filled only its own shards of the weights


@torch.no_grad()
def copy_weights(
    learner: StatefulLearner, into: dict[str, Tensor] | None = None
) -> Callable[[str, int, int], Tensor]:
    """Copy the weights and expert biases to the CPU. Returns a reader of the copy by the state's names, for
    hf_export.

    The reader returns parts of the copy, without copying them, in the type of the student's tensors: on the
    GPU weights are bf16. All ranks call it, because with expert parallelism no rank has all experts. Only
    rank 0 has the copy; the other ranks' readers raise KeyError. `into` keeps the copy's memory for the next
    call, which overwrites it: a GPU copies forty times as fast into pinned memory, and pinning takes longer
    than everything else.
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
    return lambda name, start, stop: held[name][start:stop]


def _fill(tensor: Tensor, read: ReadTensor, name: str, start: int) -> None:
    values = read(name, start, start + tensor.numel())
    if values.shape != tensor.shape or values.dtype != torch.float32:
        raise ValueError(
            f"{name} [{start}, {start + tensor.numel()}): read {values.dtype} {list(values.shape)}, wanted "
            f"torch.float32 {list(tensor.shape)}."
        )
    tensor.copy_(values)


def _biases(learner: StatefulLearner) -> list[tuple[str, Tensor]]:
    return [
        (name, buffer) for name, buffer in learner.student.named_buffers() if name.endswith(".expert_bias")
    ]


def _sharers(parameter: Tensor) -> int:
    """Number of ranks that share the parameter by expert parallelism: 1 unless it is a stack of experts."""
    return (
        1 if getattr(parameter, "allreduce", True) else parallel_state.get_expert_model_parallel_world_size()
    )


def _first(parameter: Tensor) -> int:
    """Offset of this rank's part in the whole flattened parameter: 0 unless it is a stack of experts."""
    return (
        0 if _sharers(parameter) == 1 else parallel_state.get_expert_model_parallel_rank() * parameter.numel()
    )


def random_state() -> dict[str, Tensor]:
    """The states of all random generators of this process, as bytes.

    Training draws no random numbers, as there is no dropout. The states are part of a checkpoint so that
    resuming stays exact if training ever draws some.
    """
    states = {
        "cpu": torch.get_rng_state(),
        **{f"megatron/{name}": state for name, state in get_cuda_rng_tracker().get_states().items()},
    }
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def set_random_state(states: dict[str, Tensor]) -> None:
    """Restore what `random_state` returned, on the same kind of device."""
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
