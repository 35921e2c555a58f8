"""Sums of the residual stream and their norms, on the CPU: the definition of what a GPU's kernels compute."""

import torch

from tests.fakes.students import new_seed
from vpmoe.model.residual import RMSNorm, StreamNorm, total_of


def test_a_stream_norm_returns_the_sum_and_its_norm_for_each_reader() -> None:
    torch.manual_seed(new_seed())
    norm = StreamNorm(24, eps=1e-6)
    torch.nn.init.normal_(norm.weight)
    parts = [torch.randn(5, 2, 24, requires_grad=True) for _ in range(2)]
    stream, *normed = norm(*parts, readers=3)
    total = parts[0] + parts[1]
    wanted = RMSNorm.forward(norm, total)
    assert torch.equal(stream, total) and len(normed) == 3
    assert all(torch.equal(one, wanted) for one in normed)
    directions = [torch.randn_like(stream) for _ in range(4)]
    leaves = [*parts, norm.weight]
    found = torch.autograd.grad([stream, *normed], leaves, directions)
    exact = torch.autograd.grad([total, wanted], leaves, [directions[0], sum(directions[1:])])
    for x, y in zip(found, exact, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)  # fp32 sums in another order


def test_a_total_is_the_sum_from_left_to_right() -> None:
    one, tiny = torch.ones(1), torch.full((1,), 2.0**-24)
    assert total_of((one, tiny, tiny)) == 1  # each addition is rounded
    assert total_of((tiny, tiny, one)) > 1
    assert total_of((one,)) is one
