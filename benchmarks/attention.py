"""GPU time of packed attention by layer kind, beside other kernels and a floor, and compilations by packing.

    python -m benchmarks.attention [--tokens 32768] [--packings 20]

vpmoe-6b's shapes in bf16: 8 query heads and 2 key-value heads of width 128. Local: window of 128 and offset.
Global: ALiBi and offset. Packings: documents of 300 to 4,000 tokens, and one document. Floor: the larger of
the products of the pairs that are visible (two forward, five backward) at 790 TFLOP/s and each input and
output once at 4.8 TB/s. Peers: FlashAttention through torch, with its output gated to add the offset;
FlexAttention, its block mask not counted; "causal" is FlashAttention without window, ALiBi and offset. Times
are medians of replayed CUDA graphs, without the time to launch. Needs a GPU.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from vpmoe.model.attention_gpu import packed_attention
from vpmoe.model.batch import runs_of

HEADS, GROUPS, WIDTH, WINDOW = 8, 2, 128, 128
FLOPS, BYTES = 790e12, 4.8e12
"""Of an H200 in a second: bf16 products as measured, memory by its data sheet."""


class GatedFlash(torch.autograd.Function):
    """FlashAttention with a softmax offset: g·o with g = sigmoid(lse − offset). Its backward pass, given g·o,
    g·grad and the ordinary lse, returns the gradients of the attention with the offset."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        offset: Tensor,
        boundaries: Tensor,
        longest: int,
        left: int,
    ) -> Tensor:
        runs = (boundaries, boundaries, longest, longest, 0.0, left < 0)
        window = {"window_size_left": left, "window_size_right": 0}
        out, lse_hn, *state, _ = torch.ops.aten._flash_attention_forward(
            query, key, value, *runs, False, **window
        )
        gate = torch.sigmoid(lse_hn.T - offset)
        out = out * gate.unsqueeze(2).to(out.dtype)
        ctx.save_for_backward(query, key, value, out, lse_hn, gate, *state)
        ctx.options = runs, window
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse_hn, gate, *state = ctx.saved_tensors
        runs, window = ctx.options
        gradients = torch.ops.aten._flash_attention_backward(
            grad * gate.unsqueeze(2).to(grad.dtype), query, key, value, out, lse_hn, *runs, *state, **window
        )
        grad_offset = -((grad.float() * out.float()).sum(2) * (1 - gate)).sum(0)
        return *gradients, grad_offset, None, None, None


def packing(tokens: int, seed: int) -> list[int]:
    """Lengths of documents of 300 to 4,000 tokens, the last cut so that they fill `tokens`."""
    generator = torch.Generator().manual_seed(seed)
    lengths: list[int] = []
    while sum(lengths) < tokens:
        lengths.append(int(torch.randint(300, 4001, (), generator=generator)))
    lengths[-1] -= sum(lengths) - tokens
    return lengths


def bounds(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to("cuda", torch.int32)


def floors(lengths: list[int], window: int | None) -> tuple[float, float]:
    """Milliseconds of a forward pass, and of a backward pass."""
    pairs = sum(
        n * (n + 1) // 2
        if window is None or n <= window
        else window * (window + 1) // 2 + (n - window) * window
        for n in lengths
    )
    product = 2 * WIDTH * HEADS * pairs / FLOPS
    tensor = 2 * WIDTH * sum(lengths) / BYTES  # of one head
    forward, backward = 2 * (HEADS + GROUPS), 4 * (HEADS + GROUPS)
    return 1e3 * max(2 * product, forward * tensor), 1e3 * max(5 * product, backward * tensor)


def milliseconds(action: Callable[[], object], calls: int = 4, repeats: int = 9) -> float:
    """Median of `repeats` replays of a CUDA graph of `calls` calls, of one call."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            action()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            action()
    times = []
    for _ in range(repeats + 1):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / calls)
    return statistics.median(times[1:])


class Attention:
    """Every kernel on the same random inputs."""

    def __init__(self, tokens: int) -> None:
        self.query, self.key, self.value = (
            torch.randn(tokens, heads, WIDTH, device="cuda", dtype=torch.bfloat16).requires_grad_()
            for heads in (HEADS, GROUPS, GROUPS)
        )
        self.offset = torch.randn(HEADS, device="cuda").requires_grad_()
        self.inputs = (self.query, self.key, self.value, self.offset)
        self.slopes = 2.0 ** -torch.arange(1, HEADS + 1, device="cuda", dtype=torch.float32)
        self.grad = torch.randn_like(self.query)
        self.flex = torch.compile(flex_attention, dynamic=False)
        self.block_mask = torch.compile(create_block_mask, dynamic=False)

    def ours(self, runs: Tensor, window: int | None) -> Tensor:
        slopes = self.slopes if window is None else None
        return packed_attention(*self.inputs[:3], runs, window=window, slopes_h=slopes, offset_h=self.offset)

    def flash(self, boundaries: Tensor, longest: int, window: int | None) -> Tensor:
        return GatedFlash.apply(*self.inputs, boundaries, longest, -1 if window is None else window - 1)

    def causal(self, boundaries: Tensor, longest: int) -> Tensor:
        return torch.ops.aten._flash_attention_forward(
            *self.inputs[:3], boundaries, boundaries, longest, longest, 0.0, True, False
        )[0]

    def mask(self, lengths: list[int], window: int | None) -> BlockMask:
        tokens = sum(lengths)
        document = torch.arange(len(lengths), device="cuda").repeat_interleave(
            torch.tensor(lengths, device="cuda"), output_size=tokens
        )

        def visible(_b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            near = (i >= j) & (document[i] == document[j])
            return near if window is None else near & (i - j < window)

        return self.block_mask(visible, None, None, tokens, tokens, device="cuda")

    def flexible(self, mask: BlockMask, window: int | None) -> Tensor:
        slopes = self.slopes

        def alibi(logit: Tensor, _b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return logit - slopes[h] * (i - j)

        out, aux = self.flex(
            *(x.transpose(0, 1).unsqueeze(0) for x in self.inputs[:3]),
            score_mod=alibi if window is None else None,
            block_mask=mask,
            enable_gqa=True,
            return_aux=AuxRequest(lse=True),
        )
        gate = torch.sigmoid(aux.lse - self.offset[None, :, None])
        return (out * gate.unsqueeze(3).to(out.dtype)).squeeze(0).transpose(0, 1)

    def gradients(self, out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, self.inputs, self.grad, allow_unused=True)

    def report(self, name: str, floor: tuple[float, float], action: Callable[[], Tensor]) -> None:
        with torch.no_grad():
            forward = milliseconds(action)
        both = milliseconds(lambda: self.gradients(action()))
        print(
            f"  {name:20} forward {forward:8.3f} ms {forward / floor[0]:5.2f} × the floor   "
            f"with backward {both:8.3f} ms {both / sum(floor):5.2f} ×"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--packings", type=int, default=20)
    args = parser.parse_args()
    torch.manual_seed(0)
    attention = Attention(args.tokens)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    for name, lengths in {"documents": packing(args.tokens, 0), "one document": [args.tokens]}.items():
        boundaries, longest = bounds(lengths), max(lengths)
        runs = runs_of(boundaries)
        for kind, window in {"local": WINDOW, "global": None}.items():
            floor = floors(lengths, window)
            print(f"{name}, {kind}: floor forward {floor[0]:.3f} ms, with backward {sum(floor):.3f} ms")
            mask = attention.mask(lengths, window)
            attention.report("ours", floor, lambda w=window, r=runs: attention.ours(r, w))
            attention.report("FlexAttention", floor, lambda w=window, m=mask: attention.flexible(m, w))
            if window is not None:
                attention.report(
                    "FlashAttention",
                    floor,
                    lambda w=window, b=boundaries, n=longest: attention.flash(b, n, w),
                )
            attention.report("causal", floor, lambda b=boundaries, n=longest: attention.causal(b, n))
    compiled: list[object] = []
    triton.knobs.runtime.jit_post_compile_hook = lambda **details: compiled.append(details)
    graphs = counters["stats"]["unique_graphs"]
    for seed in range(1, args.packings + 1):
        lengths = packing(args.tokens, seed)
        for window in (WINDOW, None):
            attention.gradients(attention.ours(runs_of(bounds(lengths)), window))
    ours = len(compiled)
    for seed in range(1, args.packings + 1):
        for window in (WINDOW, None):
            mask = attention.mask(packing(args.tokens, seed), window)
            attention.gradients(attention.flexible(mask, window))
    graphs = counters["stats"]["unique_graphs"] - graphs
    print(f"compilations over {args.packings} more packings: ours {ours}, FlexAttention {graphs}")


if __name__ == "__main__":
    main()
