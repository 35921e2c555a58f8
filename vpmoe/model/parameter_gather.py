"""The weights after an optimizer step, gathered from the ranks while the next forward runs.

megatron's distributed optimizer gives each rank new weights for its own share of every bucket. The buckets'
all-gathers start when the step ends, in the order in which a forward needs them, and each part of the
student waits for its own just before it runs. This is the device's stream that waits, not the host; with gloo
it is the host.

Whatever reads weights beside a forward calls `wait` first, which Learner.student does. megatron's own
overlap (overlap_param_gather) is not used: it waits in hooks of modules alone, which do not run when a CUDA
graph is replayed, and starts a bucket's gather only when the one before is waited for.
"""

from collections import deque
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor, nn
from torch import distributed as dist

from vpmoe.model.student import Student


class ParameterGather:
    """Gathers the weights of a student, whose forward then waits for them by itself, layer by layer."""

    def __init__(self, ddp: DistributedDataParallel, student: Student) -> None:
        """`ddp`: the student's. Adds hooks to student, layers and last norm."""
        self._pending: deque[dist.Work] = deque()
        """What was started and not waited for, the oldest first."""
        self._stream: Any = None
        """On which `start` was called; None on the CPU."""
        self._cuda = student.output.is_cuda
        parts = _parts(student)
        first_part = {
            parameter: number for number, (_, held) in enumerate(parts) for parameter in held
        }  # of every parameter
        found = [
            (min(first_part.get(parameter, len(parts)) for parameter in bucket.params_list), bucket, group)
            for buffer in ddp.buffers + ddp.expert_parallel_buffers
            for group in [buffer.data_parallel_group]
            for bucket in buffer.buckets
            if group.size() > 1
        ]
        found.sort(key=lambda one: one[0])
        self._buckets: list[tuple[Tensor, Tensor, dist.ProcessGroup]] = [
            (bucket.param_data, bucket.param_data.chunk(group.size())[group.rank()], group)
            for _, bucket, group in found
        ]
        """(all ranks' weights, this rank's share of them, the ranks), in the order of their first use."""
        self._needed: dict[nn.Module, int] = {}
        """How many buckets, from the first one on, a part needs."""
        for module, held in parts:
            own = set(held)
            self._needed[module] = max(
                (n for n, (_, bucket, _) in enumerate(found, 1) if own & bucket.params), default=0
            )
            module.register_forward_pre_hook(lambda module, _: self.wait(module))

    @torch.no_grad()
    def start(self) -> None:
        """Begin to gather what every rank has in its own share. All ranks call it."""
        self.wait()
        if self._cuda:
            self._stream = torch.cuda.current_stream()
        for whole, own, group in self._buckets:
            work = dist.all_gather_into_tensor(whole, own, group=group, async_op=True)
            assert work is not None  # it is None in a process outside the group
            self._pending.append(work)

    def wait(self, part: nn.Module | None = None) -> None:
        """Let what this stream runs next see the gathered weights of a part of the student (the student
        itself: what is used before the first layer; a layer; the last norm), or all weights."""
        left = 0 if part is None else len(self._buckets) - self._needed[part]
        while len(self._pending) > left:
            work = self._pending.popleft()
            work.wait()
            # A copy on a stream of its own may be the first that waits. Training does not wait again.
            if self._stream is not None and self._stream != torch.cuda.current_stream():
                with torch.cuda.stream(self._stream):
                    work.wait()


def _parts(student: Student) -> list[tuple[nn.Module, list[nn.Parameter]]]:
    """What runs in a forward, in order, with the weights that it reads. The rest is used after it, by the
    loss head."""
    first = [student.embedding.weight]
    if student.log_frequency is not None:
        first.append(student.log_frequency)
    modules = [*student.decoder.layers, student.decoder.final_layernorm]
    return [(student, first), *((module, list(module.parameters())) for module in modules)]
