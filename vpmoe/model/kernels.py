"""Triton kernels of the loss heads: the logits' product, and what is done to each logit, in one.

A pass over a chunk's logits takes a third of the product's time, and starts after it. So the product computes
exponentials and sums of a tile while the tile is in registers. A program computes many tiles, loads and
stores through TMA, and loads the next tile while it finishes one. Triton compiles the kernels on first use
and needs a C compiler. The formulas, and their computation in torch, are in head.py.
"""

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor  # type: ignore[import-untyped]

M, N, K = 128, 256, 64
"""Tokens, vocabulary and hidden size of a tile: the largest whose fp32 sums fit in registers."""
STAGES = 3
"""Tiles of hidden states and of the matrix that are in shared memory at the same time."""
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
ROOM = tl.constexpr(64.0)
"""Where logits of a tile are higher than a row's reference by more than this power of two, it is raised by a
multiple. So exponentials are at most 2⁶⁴, and are brought to another reference without rounding."""
LARGEST = tl.constexpr(65504.0)
"""The largest fp16 number. Larger logits are clamped to it, so that none becomes infinite."""
BLOCK = 1024
"""Tiles whose sums a program adds at a time."""


def gradient(hidden_tH: Tensor, weight_VH: Tensor, targets_t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(G [t, V] in bf16, Z [t], log p of the targets [t]) of bf16 inputs, Z and log p in fp32. c/Z·G is the
    gradient of −c·log p with respect to the logits. G is rounded once."""
    g_tV = _logits_like(hidden_tH, weight_VH, torch.bfloat16)
    return g_tV, *_softmax(hidden_tH, weight_VH, targets_t, g_tV)


def logp(hidden_tH: Tensor, weight_VH: Tensor, targets_t: Tensor) -> Tensor:
    """log p of the targets [t] in fp32, of bf16 inputs."""
    return _softmax(hidden_tH, weight_VH, targets_t, None)[1]


def logits(hidden_tH: Tensor, weight_VH: Tensor) -> Tensor:
    """[t, V] in fp16, of bf16 inputs."""
    logits_tV = _logits_like(hidden_tH, weight_VH, torch.float16)
    _launch(hidden_tH, weight_VH, logits_tV, None, None, None)
    return logits_tV


def _logits_like(hidden_tH: Tensor, weight_VH: Tensor, dtype: torch.dtype) -> Tensor:
    """Uninitialised [t, V], where a row begins at a multiple of 16 bytes, as TMA wants it."""
    width = len(weight_VH)
    return torch.empty(len(hidden_tH), -(-width // 8) * 8, dtype=dtype, device=hidden_tH.device)[:, :width]


def _softmax(
    hidden_tH: Tensor, weight_VH: Tensor, targets_t: Tensor, g_tV: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(Z [t], log p of the targets [t]). Writes G if it is given."""
    rows, inner, width = *hidden_tH.shape, len(weight_VH)
    tiles = triton.cdiv(width, N)
    high_tn, sum_tn = torch.empty(2, rows, tiles, dtype=torch.float32, device=hidden_tH.device)
    reference_t, z_t, logp_t = torch.empty(3, rows, dtype=torch.float32, device=hidden_tH.device)
    _target_logit[(rows,)](hidden_tH, weight_VH, targets_t, reference_t, inner, triton.next_power_of_2(inner))
    _launch(hidden_tH, weight_VH, g_tV, reference_t, high_tn, sum_tn)
    pitch = 0 if g_tV is None else g_tV.stride(0)
    _combine[(rows,)](
        g_tV, targets_t, reference_t, high_tn, sum_tn, z_t, logp_t, width, pitch, tiles, N, BLOCK
    )
    return z_t, logp_t


def _launch(
    hidden_tH: Tensor,
    weight_VH: Tensor,
    out_tV: Tensor | None,
    reference_t: Tensor | None,
    high_tn: Tensor | None,
    sum_tn: Tensor | None,
) -> None:
    rows, width, inner = len(hidden_tH), len(weight_VH), hidden_tH.shape[1]
    tiles = triton.cdiv(rows, M) * triton.cdiv(width, N)
    multiprocessors = torch.cuda.get_device_properties(hidden_tH.device).multi_processor_count
    left = TensorDescriptor.from_tensor(hidden_tH, [M, K])
    _product[(min(tiles, multiprocessors),)](
        left,
        TensorDescriptor.from_tensor(weight_VH, [N, K]),
        left if out_tV is None else TensorDescriptor.from_tensor(out_tV, [M, N]),
        reference_t,
        high_tn,
        sum_tn,
        rows,
        width,
        inner,
        out_tV is not None,
        reference_t is not None,
        M,
        N,
        K,
        num_warps=8,
        num_stages=STAGES,
    )


@triton.jit  # type: ignore[untyped-decorator]
def _target_logit(hidden, weight, targets, reference, H: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The target's logit is a row's reference, in powers of two as all exponents here."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row).to(tl.int64)
    h = tl.arange(0, BLOCK)
    x = tl.load(hidden + row * H + h, mask=h < H, other=0.0).to(tl.float32)
    y = tl.load(weight + target * H + h, mask=h < H, other=0.0).to(tl.float32)
    tl.store(reference + row, tl.sum(x * y, 0) * LOG2_E)


@triton.jit
def _raised(high, reference):  # type: ignore[no-untyped-def]
    """What `reference` has to be raised by."""
    return tl.maximum(tl.ceil((high * LOG2_E - reference) / ROOM - 1.0), 0.0) * ROOM


@triton.jit  # type: ignore[untyped-decorator]
def _product(  # type: ignore[no-untyped-def]
    hidden,
    weight,
    out,
    reference,
    high,
    total,
    rows,
    width,
    H: tl.constexpr,
    STORED: tl.constexpr,
    SUMMED: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    """If STORED, `out` becomes the logits, or if SUMMED their exponentials. If SUMMED, `high` and `total`
    become each row's highest logit and sum of exponentials in each tile.

    Programs take tiles one after the other, all of a vocabulary tile in succession, so that it is read from
    memory once.
    """
    down = tl.cdiv(rows, M)
    across = tl.cdiv(width, N)
    for tile in tl.range(tl.program_id(0), down * across, tl.num_programs(0), flatten=True):
        first = tile % down * M
        n = tile // down
        logits = tl.zeros((M, N), tl.float32)
        for k in range(0, H, K):
            logits = tl.dot(hidden.load([first, k]), weight.load([n * N, k]).T, logits)
        if SUMMED:
            row = first + tl.arange(0, M)
            inside = row < rows
            x = tl.where((n * N + tl.arange(0, N) < width)[None, :], logits, float("-inf"))
            top = tl.max(x, 1)
            low = tl.load(reference + row, mask=inside, other=0.0)
            low += _raised(top, low)
            found = tl.exp2(x * LOG2_E - low[:, None])
            at = row * across + n
            tl.store(high + at, top, mask=inside)
            tl.store(total + at, tl.sum(found, 1), mask=inside)
        else:
            found = tl.minimum(tl.maximum(logits, -LARGEST), LARGEST)
        if STORED:
            out.store([first, n * N], found.to(out.dtype))


@triton.jit  # type: ignore[untyped-decorator]
def _combine(  # type: ignore[no-untyped-def]
    g,
    targets,
    reference,
    high,
    total,
    z,
    logp,
    width,
    pitch,
    tiles,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Z and log p of a row from its tiles. Makes the exponentials G: at the target, and where a tile had a
    lower reference than the highest one."""
    row = tl.program_id(0).to(tl.int64)
    low = tl.load(reference + row)
    n = tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, tiles, BLOCK):
        at = row * tiles + start + n
        top = tl.maximum(top, tl.load(high + at, mask=start + n < tiles, other=float("-inf")))
    most = _raised(tl.max(top, 0), low)
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, tiles, BLOCK):
        at = row * tiles + start + n
        tops = tl.load(high + at, mask=start + n < tiles, other=float("-inf"))
        part = tl.load(total + at, mask=start + n < tiles, other=0.0)
        sums += part * tl.exp2(_raised(tops, low) - most)
    found = tl.sum(sums, 0)
    tl.store(z + row, found)
    tl.store(logp + row, (tl.log2(found) + most) * -LN_2)
    if g is not None:
        if most > 0:
            for tile in range(tiles):
                lower = tl.exp2(_raised(tl.load(high + row * tiles + tile), low) - most)
                column = tile * N + tl.arange(0, N)
                here = g + row * pitch + column
                exps = tl.load(here, mask=column < width, other=0.0).to(tl.float32)
                tl.store(here, (exps * lower).to(g.dtype.element_ty), mask=column < width)
            tl.debug_barrier()  # the target's is one of them
        tl.store(g + row * pitch + tl.load(targets + row), (tl.exp2(-most) - found).to(g.dtype.element_ty))
