"""Rows of padding, with which the trainer fills up microbatches to few shapes, change nothing but the order
of sums."""

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor

from tests.fakes.students import COMPLETE, documents, new_seed, perturbed
from vpmoe.api.stages import Confidence
from vpmoe.model import grouped
from vpmoe.model.batch import Batch
from vpmoe.model.router import routers
from vpmoe.model.student import Student
from vpmoe.objectives.rescored import rescored
from vpmoe.objectives.vanilla import vanilla

WEIGHTS = {"reasoning": 0.7, "final": 1.6}
LENGTHS = [[17, 9, 4], [30], [5, 22]]
ROW, UNUSED = 32, COMPLETE.vocabulary - 1


def batch_of(rows: list[tuple[Tensor, ...]], padding: int) -> Batch:
    """A microbatch of these rows and of `padding` rows of padding."""
    empty = (
        torch.full((1, ROW), UNUSED),
        torch.zeros((1, ROW), dtype=torch.uint8),
        torch.full((1, ROW), -1, dtype=torch.int32),
        torch.full((1, ROW), torch.nan),
    )
    return Batch.from_rows(*(torch.cat(parts) for parts in zip(*rows, *[empty] * padding, strict=True)))


def step(model: Student, batches: list[Batch], kind: str) -> dict[str, Tensor]:
    """Loss, balance loss, counts and load of the experts, and the gradients, of one global batch."""
    counts = torch.stack([batch.counts for batch in batches]).sum(0)
    objective = (
        vanilla(counts, WEIGHTS)
        if kind == "vanilla"
        else rescored(counts, WEIGHTS, Confidence(), {"reasoning": -1.0, "final": -2.0})
    )
    model.zero_grad()
    for router in routers(model).values():
        router.local_tokens_per_expert.zero_()
        router.aux_sum.zero_()
    losses = []
    for batch in batches:
        loss, _ = objective.loss(batch, model(batch), model, int(counts[0]))
        loss.backward()
        losses.append(loss.detach())
    found = {"loss": torch.stack(losses).sum(), "counts": counts}
    if kind == "rescored":  # vanilla measures nothing
        found["measured"] = objective.sums()
    for name, router in routers(model).items():
        found[f"tokens {name}"] = router.local_tokens_per_expert.clone()
        found[f"balance {name}"] = router.aux_sum.clone()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        found[name] = parameter.grad.clone()
    return found


def grouped_products(left: Tensor, right: Tensor, *, offs: Tensor) -> Tensor:
    """torch's grouped_mm, which has no float64: rows by groups times a matrix each, or columns by groups
    times rows by groups."""
    sizes = offs.diff(prepend=offs.new_zeros(1)).tolist()
    if right.dim() == 3:
        return torch.cat([rows @ one for rows, one in zip(left.split(sizes), right, strict=True)])
    pairs = zip(left.split(sizes, 1), right.split(sizes), strict=True)
    return torch.stack([columns @ rows for columns, rows in pairs])


def test_rows_of_padding_add_nothing(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss, measures, balance loss, counts, load and every gradient, with every part of the architecture, in
    float64: as without them within 1e-6 of the largest number, because the router's scores are in fp32. The
    padding's embedding gets exactly 0."""
    monkeypatch.setattr(grouped, "grouped_mm", grouped_products)
    model = perturbed(COMPLETE, device, recomputed_layers=2).double()
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(()))
    generator = torch.Generator().manual_seed(new_seed())
    rows = []
    for lengths in LENGTHS:
        tokens, spans, numbers = documents(generator, lengths, ROW, UNUSED)
        tokens[numbers < 0] = UNUSED
        rows.append((tokens, spans, numbers, -4 * torch.rand((1, ROW), generator=generator)))
    plain, padded = ([batch_of(rows[:2], 0), batch_of(rows[2:], 0)], [batch_of(rows, 1), batch_of([], 2)])
    for kind in ("vanilla", "rescored"):
        wanted, found = step(model, plain, kind), step(model, padded, kind)
        assert wanted.keys() == found.keys()
        for name, value in wanted.items():
            error, largest = (found[name] - value).abs().max(), value.abs().max()
            assert error <= 1e-6 * largest and largest > 0, (kind, name, error, largest)
        assert (found["embedding.weight"][UNUSED] == 0).all() and wanted["embedding.weight"].norm() > 1
