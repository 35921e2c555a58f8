"""A student in training: gradients of a global batch, and the optimizer step that uses them.

megatron-core's DistributedDataParallel keeps gradients in flat fp32 buffers and reduces them while the last
backward runs. Its distributed optimizer keeps each rank's share of fp32 parameters and Adam moments. An
objective (objective.py) defines the loss. The training loop sets the learning rate and handles a bad loss.
Saving and restoring are in state.py.

The microbatches run in an explicit loop, not in megatron's pipeline schedule, whose interface (iterators,
closures over losses) exists for pipeline stages that this student does not have.
"""

import contextlib
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, get_updated_expert_bias
from torch import Tensor, nn
from torch import distributed as dist

from vpmoe.api.metrics import BySpan, Measures
from vpmoe.data.spans import SPANS
from vpmoe.model import distributed, state
from vpmoe.model.batch import Batch
from vpmoe.model.expert_exchange import check_same_shapes
from vpmoe.model.experts import StackedExperts
from vpmoe.model.head import target_logp
from vpmoe.model.layer_graphs import LayerGraphs, unsupported
from vpmoe.model.objective import Objective
from vpmoe.model.parameter_gather import ParameterGather
from vpmoe.model.router import ExpertLoad, Router, routers
from vpmoe.model.shapes import Shape
from vpmoe.model.sharded_gradients import ShardedGradients
from vpmoe.model.student import Student, build
from vpmoe.model.weight_update import WeightUpdate

log = logging.getLogger(__name__)

BETAS = (0.9, 0.95)
EPSILON = 1e-8


@dataclass(frozen=True)
class Outcome:
    """Result of a global batch; the same on every rank."""

    loss: float
    """The objective, without the balance loss; NaN after an evaluation."""
    cross_entropy: BySpan
    """Mean −log p by span, in nats per token; None if the batch has no token of the span."""
    tokens: dict[str, int]
    """Targets by span."""
    load: ExpertLoad | None
    """Number of tokens of each expert; None after an evaluation."""
    measures: Measures | None = None
    """What the objective measured; its class depends on the objective."""
    loss_by_rank: tuple[float, ...] = ()
    """What each rank added to the loss; empty after an evaluation."""


class NotFinite(ArithmeticError):
    """The loss or the gradient of a step is not finite. All ranks raise it, and nothing was changed."""

    def __init__(self, message: str, norm: float) -> None:
        """`norm`: of the gradient."""
        super().__init__(message)
        self.norm = norm


class Learner:
    """A student in training, with its DDP and optimizer. Create it with `build`.

    A training step: forward_backward, step. A step whose loss or gradient is not finite changes nothing.
    After the last one: `close`.
    """

    def __init__(
        self,
        student: Student,
        device: torch.device,
        *,
        weight_decay: float,
        gradient_clip: float,
        sharded_gradients: bool = False,
        graphs: bool = True,
    ) -> None:
        self._student = student
        self.device = device
        self.weight_decay = weight_decay
        self.gradient_clip = gradient_clip
        self._routers = routers(student)
        self._positions: Tensor | None = None
        """Of the global batch, without padding."""
        self._loss = 0.0
        """Of the latest forward_backward."""
        bf16 = student.config.bf16
        self.ddp = (ShardedGradients if sharded_gradients else DistributedDataParallel)(
            student.config,
            DistributedDataParallelConfig(
                use_distributed_optimizer=True, overlap_grad_reduce=True, grad_reduce_in_fp32=True
            ),
            student,
        )
        self.gather = ParameterGather(self.ddp, student)
        settings = OptimizerConfig(
            optimizer="adam",
            lr=0.0,
            weight_decay=weight_decay,
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            adam_eps=EPSILON,
            clip_grad=gradient_clip,
            use_distributed_optimizer=True,
            bf16=bf16,
            params_dtype=student.config.params_dtype,
        )
        self.optimizer = get_megatron_optimizer(settings, [self.ddp], use_gloo_process_groups=False)
        state.allocate_moments(self)
        # Once: gradients keep their addresses in the buffers.
        if isinstance(self.ddp, ShardedGradients):
            self.ddp.hand_over(self.optimizer)
        else:
            self.optimizer.prepare_grads()
        self._update = WeightUpdate(self.optimizer, list(state.shards(self)), device)
        MoEAuxLossAutoScaler.set_loss_scale(torch.ones((), device=device))
        self._empty: Tensor | None = None
        """1 before the first microbatch of a step, whose gradients of the experts are stored; 0 later."""
        if device.type == "cuda" and not sharded_gradients:
            self._empty = torch.zeros((), dtype=torch.int32, device=device)
            for experts in student.modules():
                if isinstance(experts, StackedExperts):
                    for weight in (experts.up, experts.down):
                        weight.empty_main_grad = self._empty  # type: ignore[attr-defined]  # main_gradient.py
        self._graphs = self._layer_graphs(sharded_gradients) if graphs else None

    @classmethod
    def build(
        cls,
        shape: Shape,
        device: torch.device,
        *,
        sequence_length: int,
        seed: int,
        weight_decay: float,
        gradient_clip: float,
        expert_parallel: int = 1,
        teacher_width: int | None = None,
        recomputed_layers: int = 0,
        sharded_gradients: bool = False,
        graphs: bool = True,
    ) -> "Learner":
        """A new student (see student.build) with an empty optimizer. `sharded_gradients`: see
        sharded_gradients.py. `graphs`: whether layers run as CUDA graphs in training, with the same bits,
        where layer_graphs.unsupported allows it."""
        student = build(
            shape,
            device,
            sequence_length=sequence_length,
            seed=seed,
            expert_parallel=expert_parallel,
            teacher_width=teacher_width,
            recomputed_layers=recomputed_layers,
        )
        return cls(
            student,
            device,
            weight_decay=weight_decay,
            gradient_clip=gradient_clip,
            sharded_gradients=sharded_gradients,
            graphs=graphs,
        )

    def close(self) -> None:
        """Destroy the layers' CUDA graphs. Without it distributed.stop waits for them for ever if there are
        collectives in them."""
        if self._graphs is not None:
            self._graphs.close()

    def _layer_graphs(self, sharded_gradients: bool) -> LayerGraphs | None:
        student, config = self.student, self.student.config
        reason = unsupported(student.shape, self.device, sharded_gradients=sharded_gradients)
        if reason is not None:
            if self.device.type == "cuda":
                log.info("Layers run without CUDA graphs: %s", reason)
            return None
        return LayerGraphs(
            student.decoder.layers, config.recompute_num_layers or 0, self._gradient_ready, self.gather.wait
        )

    def _gradient_ready(self, parameter: nn.Parameter) -> None:
        """What megatron's hook does once a parameter's gradient was added to its fp32 buffer."""
        group = self.ddp.param_to_bucket_group[parameter]
        group.register_grad_ready(parameter, self.ddp.force_all_reduce)

    @property
    def student(self) -> Student:
        """The student. What the device is given next sees all weights of the latest step.

        A student that was asked for before the step is good for a forward, which waits by itself, but not for
        reading its weights: ask again."""
        self.gather.wait()
        return self._student

    @property
    def steps(self) -> int:
        """Optimizer steps so far, over all stages; Adam's bias correction uses this count."""
        return int(next(state.shards(self)).moments["step"])

    def forward_backward(self, batches: Sequence[Batch], objective: Objective, positions: int) -> Outcome:
        """Compute gradients of objective + balance loss over the global batch. `batches` are this rank's, at
        least one.

        `positions` is the number of the global batch's positions that are not padding. No weight changes
        before `step`. With sharded gradients all ranks need the same number of batches; those that share a
        set of experts need the same number, of the same shapes. Raises ValueError if they have others, or if
        `positions` is wrong.

        The loss is multiplied by `positions`, and `step` divides all gradients by it. So the balance losses,
        which megatron weights by positions, become means over positions, and bf16 gradients keep an ordinary
        size.
        """
        self._check_shapes(batches)
        self._begin_gradients()
        sums = _Sums(self.device)
        for number, batch in enumerate(batches):
            if self._empty is not None:
                self._empty.fill_(number == 0)
            with self.ddp.no_sync() if number < len(batches) - 1 else contextlib.nullcontext():
                here = batch.to(self.device)
                loss, logp_T = objective.loss(here, self.ddp(here, self._graphs), self.student, positions)
                loss.backward()  # type: ignore[no-untyped-call]
            sums.add(here, logp_T, loss.detach() / positions)
        outcome = sums.outcome(positions, self._routers, objective)
        self._positions = torch.tensor(positions)
        self._loss = outcome.loss
        return outcome

    def _begin_gradients(self) -> None:
        """megatron's zero_grad_buffer, without zeros where the first microbatch stores its gradients. Of
        vpmoe-6b these are 21 of 24 GB, which take 5 ms to fill and as long to read again."""
        if self._empty is None:
            self.ddp.zero_grad_buffer()
            return
        added = [x for x in self.ddp.params_with_grad if not hasattr(x, "empty_main_grad")]
        torch._foreach_zero_([x.main_grad for x in added])
        for parameter in self.ddp.params_with_grad:
            parameter.grad_added_to_main_grad = False
        for group in self.ddp.bucket_groups + self.ddp.expert_parallel_bucket_groups:
            group.reset()

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> Outcome:
        """The cross-entropies of all ranks' batches. Changes no state.

        Ranks may have different numbers of batches, except those that share a set of experts: as in
        forward_backward.
        """
        self._check_shapes(batches)
        sums = _Sums(self.device)
        for batch in batches:
            here = batch.to(self.device)
            sums.add(here, self._logp_of(here))
        return sums.outcome()

    @torch.no_grad()
    def logp(self, batch: Batch) -> Tensor:
        """log p of each position's target [T], fp32, on the CPU; NaN without a target.

        All ranks call it with the same batch.
        """
        here = batch.to(self.device)
        return self._logp_of(here).cpu()

    def _check_shapes(self, batches: Sequence[Batch]) -> None:
        """Of ranks that share a set of experts. Once a step, because layers do not ask each other."""
        group = parallel_state.get_expert_model_parallel_group()
        if group.size() > 1:
            check_same_shapes([tuple(batch.tokens.shape) for batch in batches], group, self.device)

    def _logp_of(self, here: Batch) -> Tensor:
        """log p of a batch on the device [T], without gradients; NaN without a target."""
        return target_logp(self.student(here), self.student.output, here.target, here.target_rows)

    @torch.no_grad()
    def step(self, learning_rate: float) -> float:
        """Sum the gradients over the ranks, clip them, update weights and expert biases. Returns the gradient
        norm before clipping.

        Raises NotFinite on every rank if the loss or the norm is not finite. Weights, expert biases and
        moments are then as before, and the next forward_backward may follow.
        """
        if self._positions is None:
            raise RuntimeError(
                "Learner.step uses the gradients of one forward_backward, and there was none since the last "
                "step. Call forward_backward first."
            )
        positions, self._positions = self._positions, None
        self.ddp.finish_grad_sync()
        # Here and not in DDP: only this rank's share, which it uses, is divided.
        norm = self._norm(self._update.divide(positions))
        if not (math.isfinite(norm) and math.isfinite(self._loss)):
            self._reset_counts()
            found = f"the loss is {self._loss}" if math.isfinite(norm) else f"the gradient's norm is {norm}"
            raise NotFinite(f"step {self.steps + 1}: {found}. No weight was moved.", norm)
        factor = self.gradient_clip / (torch.tensor(norm) + 1e-6)  # in fp32, as torch.nn.utils computes it
        self.gather.wait()  # the forward has, if there was one
        self._update.step(learning_rate, self.weight_decay, float(factor))
        self.gather.start()
        self._move_expert_biases()
        self._reset_counts()
        return norm

    def _move_expert_biases(self) -> None:
        """By the step's counts, summed over the ranks, with megatron's rule."""
        routers = list(self._routers.values())
        if not routers:
            return
        biases = [router.expert_bias for router in routers]
        moved = get_updated_expert_bias(
            torch.stack([router.local_tokens_per_expert for router in routers]),
            torch.stack(biases),
            self._student.config.moe_router_bias_update_rate,
        )
        torch._foreach_copy_(biases, list(moved.unbind()))

    def _reset_counts(self) -> None:
        """Of the routers, for the next step."""
        for kind in ("local_tokens_per_expert", "aux_sum"):
            if counts := [getattr(router, kind) for router in self._routers.values()]:
                torch._foreach_zero_(counts)

    def _norm(self, square: Tensor) -> float:
        """The root of a number summed over all ranks. megatron's get_grad_norm reads each parameter's norm
        from the GPU by itself."""
        dist.all_reduce(square, group=self.optimizer.get_grad_stats_parallel_group())
        norm: float = float(square) ** 0.5
        return norm


class _Sums:
    """Running sums of one global batch, kept on the device: nothing waits for the GPU before `outcome`."""

    def __init__(self, device: torch.device) -> None:
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self.nll = torch.zeros(len(SPANS), dtype=torch.float64, device=device)
        self.counts = torch.zeros(1 + len(SPANS), dtype=torch.int64)

    def add(self, batch: Batch, logp_T: Tensor, loss: Tensor | None = None) -> None:
        self.loss += torch.nan if loss is None else loss
        self.nll -= torch.stack(
            [logp_T.where(batch.span == span, 0).double().sum() for span in SPANS.values()]
        )
        self.counts += batch.counts

    def outcome(
        self,
        positions: int | None = None,
        by_layer: dict[str, Router] | None = None,
        objective: Objective | None = None,
    ) -> Outcome:
        """Sum over the ranks. Raises ValueError if the batches do not have `positions` positions."""
        measured = objective.sums().to(self.nll) if objective else self.nll[:0]
        loss_R = self.nll.new_zeros(distributed.world_size())
        loss_R[distributed.rank()] = self.loss
        sums = [self.loss.unsqueeze(0), loss_R, self.nll, self.counts.to(self.nll), measured]
        if by_layer:
            sums += [
                torch.stack([getattr(r, name) for r in by_layer.values()]).double()
                for name in ("local_tokens_per_expert", "aux_sum")
            ]
        sizes = [part.numel() for part in sums]
        loss, loss_R, nll, counts, measured, *load = torch.split(
            distributed.sum_over_ranks(torch.cat([part.flatten() for part in sums])), sizes
        )
        if positions not in (None, int(counts[0])):
            raise ValueError(
                f"positions is {positions}, but the global batch has {int(counts[0])} that are not padding."
            )
        tokens = {name: int(n) for name, n in zip(SPANS, counts[1:], strict=True)}
        return Outcome(
            loss=float(loss),
            cross_entropy={
                name: float(s) / tokens[name] if tokens[name] else None
                for name, s in zip(SPANS, nll, strict=True)
            },
            tokens=tokens,
            load=ExpertLoad(
                tuple(by_layer), load[0].long().view(len(by_layer), -1), load[1] / counts[0].clamp(min=1)
            )
            if by_layer
            else None,
            measures=objective.measures(measured) if objective else None,
            loss_by_rank=tuple(loss_R.tolist()) if objective else (),
        )
