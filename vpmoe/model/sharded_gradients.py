"""Gradients of which each rank keeps only its own share of the sums: ZeRO's second stage, on megatron-core's
DDP.

megatron's DDP keeps the gradients of all parameters in fp32 on every rank, though its distributed optimizer
then uses a rank's share of each bucket only. Here a bucket has memory from the first of its gradients in a
backward until their sum over the ranks is done, and what stays is a rank's share, to which every microbatch
adds. Of vpmoe-6b on two ranks that is 11 GiB less, for one reduction a microbatch instead of one a step. It
runs beside the backward, one bucket at a time.

Parameters, optimizer and the layout of a state are megatron's. Sums are in fp32; over several microbatches
they are added in another order than megatron's, which adds a rank's microbatches first.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from torch import Tensor, nn
from torch import distributed as dist


class ShardedGradients(DistributedDataParallel):  # type: ignore[misc]
    """A DDP as Learner uses it. All ranks need the same number of backwards before an optimizer step, and
    every backward gives every parameter a gradient.

    `hand_over`, called once, gives the optimizer its gradients, which are complete after finish_grad_sync.
    """

    def __init__(self, config: Any, ddp_config: DistributedDataParallelConfig, module: nn.Module) -> None:
        super().__init__(config, ddp_config, module)
        self._shards = []
        self._shard_of: dict[nn.Parameter, _Shard] = {}
        self._pending: deque[_Shard] = deque()
        """Whose gradients are being summed, the oldest first."""
        for buffer in self.buffers + self.expert_parallel_buffers:
            buffer.grad_data = None
            for bucket in buffer.buckets:
                shard = _Shard(bucket, buffer.data_parallel_group, self._pending)
                self._shards.append(shard)
                for parameter in bucket.params_list:
                    # megatron's hook, which adds parameter.grad to parameter.main_grad and then calls
                    # register_grad_ready, runs after this one.
                    parameter.register_post_accumulate_grad_hook(shard.allocate)
                    parameter.allocate_main_grad = shard.allocate
                    self._shard_of[parameter] = self.param_to_bucket_group[parameter] = shard

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """megatron's, after the sums of the microbatch before, whose memory the forward needs."""
        self._finish()
        return super().forward(*inputs, **kwargs)

    def no_sync(self) -> AbstractContextManager[None]:
        """Nothing: every microbatch is summed."""
        return nullcontext()

    def zero_grad_buffer(self) -> None:
        """Begin a step."""
        self._finish()
        for parameter in self.params_with_grad:
            parameter.grad_added_to_main_grad = False  # see main_gradient.py
        for shard in self._shards:
            shard.sum.zero_()

    def finish_grad_sync(self, force_all_reduce: bool | None = False) -> None:
        """Wait for the sums."""
        self._finish()

    def hand_over(self, optimizer: Any) -> None:
        """Give the optimizer's fp32 parameters their gradients: megatron's `prepare_grads` without a loss
        scale, once for all steps."""
        for part in optimizer.chained_optimizers:
            for parameter, main in _optimized(part):
                held = part._get_model_param_range_map(parameter)["gbuf_local"]
                main.grad = self._shard_of[parameter].sum[held.start : held.end]

    def _finish(self) -> None:
        while self._pending:
            self._pending[0].finish()


def _optimized(part: Any) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """The parameters of one of megatron's distributed optimizers with this rank's fp32 part of each."""
    groups = zip(
        [*part.model_fp32_groups, *part.model_float16_groups],
        [*part.shard_fp32_groups, *part.shard_fp32_from_float16_groups],
        strict=True,
    )
    for parameters, mains in groups:
        yield from zip(parameters, mains, strict=True)


class _Shard:
    """This rank's part of one of megatron's buckets. Has the method that megatron's hook calls of a group of
    buckets."""

    def __init__(self, bucket: Any, group: dist.ProcessGroup, pending: "deque[_Shard]") -> None:
        self._parameters = set(bucket.params_list)
        self._missing = set(self._parameters)
        """Those without a gradient in this backward."""
        self._group = group
        self._pending = pending
        self._work: dist.Work | None = None
        self._whole = torch.empty_like(bucket.grad_data)
        self._bytes = self._whole.untyped_storage().nbytes()
        self._own = self._whole.chunk(group.size())[group.rank()]
        self.sum = torch.zeros_like(self._own)
        """The gradients of this rank's part, summed over ranks and microbatches."""
        bucket.grad_data = self._whole
        for parameter in bucket.params_list:
            start, _ = bucket.param_to_index[parameter]
            view = self._whole[start : start + parameter.numel()].view(parameter.shape)
            parameter.main_grad = view
        self._free()

    def allocate(self, parameter: Tensor) -> None:
        """Make room for the gradients of a backward, if that is not done."""
        storage = self._whole.untyped_storage()
        if not storage.nbytes():
            storage.resize_(self._bytes)
            self._whole.zero_()

    def register_grad_ready(self, parameter: nn.Parameter, force_all_reduce: bool | None = False) -> None:
        """The gradient of a parameter of this bucket is there. After the last one, begin to sum over the
        ranks, and finish the bucket before this one."""
        self._missing.remove(parameter)
        if self._missing:
            return
        self._work = dist.reduce_scatter_tensor(self._own, self._whole, group=self._group, async_op=True)
        self._pending.append(self)
        while len(self._pending) > 1:
            self._pending[0].finish()

    def finish(self) -> None:
        """Add the sum over the ranks, once it is there, and free the memory of the whole bucket. Must be the
        oldest."""
        assert self._work is not None and self._pending.popleft() is self
        self._work.wait()
        self._work = None
        self.sum += self._own
        self._free()
        self._missing = set(self._parameters)

    def _free(self) -> None:
        self._whole.untyped_storage().resize_(0)
