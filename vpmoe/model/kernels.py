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
BLOCK = 1024
"""Tiles whose sums a program adds at a time."""


def gradient(hidden_tH: Tensor, weight_VH: Tensor, targets_t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(G [t, V] in bf16, Z [t], log p of the targets [t]) of bf16 inputs, Z and log p in fp32. c/Z·G is the
    gradient of −c·log p with respect to the logits. G is rounded once."""
    g_tV = logits_like(len(hidden_tH), weight_VH, torch.bfloat16)
    return g_tV, *_softmax(hidden_tH, weight_VH, targets_t, g_tV)


def logp(hidden_tH: Tensor, weight_VH: Tensor, targets_t: Tensor) -> Tensor:
    """log p of the targets [t] in fp32, of bf16 inputs."""
    return _softmax(hidden_tH, weight_VH, targets_t, None)[1]


def logits(
    hidden_tH: Tensor, weight_VH: Tensor, out_tV: Tensor, temperature: float, *, plain: bool
) -> tuple[Tensor, Tensor]:
    """Writes the logits of bf16 inputs to `out_tV` (of logits_like), rounded to its type, fp16 or bf16.

    Returns, of the rounded logits in each of the n tiles of a row, (the highest [t, n], Σ exp((logit −
    highest) / temperature) [1, t, n]), in fp32. If `plain`, the sums at temperature 1 follow: [2, t, n].
    """
    rows, tiles = len(hidden_tH), triton.cdiv(len(weight_VH), N)
    high_tn = torch.empty(rows, tiles, dtype=torch.float32, device=hidden_tH.device)
    sums_ktn = torch.empty(1 + plain, rows, tiles, dtype=torch.float32, device=hidden_tH.device)
    _logits[_programs(hidden_tH, weight_VH)](
        TensorDescriptor.from_tensor(hidden_tH, [M, K]),
        TensorDescriptor.from_tensor(weight_VH, [N, K]),
        TensorDescriptor.from_tensor(out_tV, [M, N]),
        high_tn,
        sums_ktn[0],
        sums_ktn[1] if plain else None,
        rows,
        len(weight_VH),
        LOG2_E.value / temperature,
        hidden_tH.shape[1],
        temperature == 2,
        M,
        N,
        K,
        num_warps=8,
        num_stages=STAGES,
    )
    return high_tn, sums_ktn


def logits_like(rows: int, weight_VH: Tensor, dtype: torch.dtype) -> Tensor:
    """Uninitialised [rows, V], where a row begins at a multiple of 16 bytes, as TMA wants it."""
    width = len(weight_VH)
    return torch.empty(rows, -(-width // 8) * 8, dtype=dtype, device=weight_VH.device)[:, :width]


def _softmax(
    hidden_tH: Tensor, weight_VH: Tensor, targets_t: Tensor, g_tV: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(Z [t], log p of the targets [t]). Writes G if it is given."""
    rows, inner, width = *hidden_tH.shape, len(weight_VH)
    tiles = triton.cdiv(width, N)
    high_tn, sum_tn = torch.empty(2, rows, tiles, dtype=torch.float32, device=hidden_tH.device)
    reference_t, z_t, logp_t = torch.empty(3, rows, dtype=torch.float32, device=hidden_tH.device)
    target_logits(hidden_tH, weight_VH, targets_t, reference_t)
    left = TensorDescriptor.from_tensor(hidden_tH, [M, K])
    _product[_programs(hidden_tH, weight_VH)](
        left,
        TensorDescriptor.from_tensor(weight_VH, [N, K]),
        left if g_tV is None else TensorDescriptor.from_tensor(g_tV, [M, N]),
        reference_t,
        high_tn,
        sum_tn,
        rows,
        width,
        inner,
        g_tV is not None,
        M,
        N,
        K,
        num_warps=8,
        num_stages=STAGES,
    )
    pitch = 0 if g_tV is None else g_tV.stride(0)
    _combine[(rows,)](
        g_tV, targets_t, reference_t, high_tn, sum_tn, z_t, logp_t, width, pitch, tiles, N, BLOCK
    )
    return z_t, logp_t


def target_logits(hidden_tH: Tensor, weight_VH: Tensor, targets_t: Tensor, found_t: Tensor) -> None:
    """Writes log₂ e · the targets' logits, not rounded, to `found_t` in fp32."""
    inner = hidden_tH.shape[1]
    _target_logit[(len(hidden_tH),)](
        hidden_tH, weight_VH, targets_t, found_t, inner, triton.next_power_of_2(inner)
    )


def _programs(hidden_tH: Tensor, weight_VH: Tensor) -> tuple[int]:
    """Of a product: one a multiprocessor, each of which takes many tiles."""
    tiles = triton.cdiv(len(hidden_tH), M) * triton.cdiv(len(weight_VH), N)
    return (min(tiles, torch.cuda.get_device_properties(hidden_tH.device).multi_processor_count),)


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
def _tile(  # type: ignore[no-untyped-def]
    hidden, weight, first, n, H: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr
):
    """Logits of the rows from `first` on, of vocabulary tile `n`."""
    logits = tl.zeros((M, N), tl.float32)
    for k in range(0, H, K):
        logits = tl.dot(hidden.load([first, k]), weight.load([n * N, k]).T, logits)
    return logits


@triton.jit  # type: ignore[untyped-decorator]
def _rounded(x, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """(fp32 rounded to fp16 or bf16, that in fp32). Beyond fp16's largest number it is that number.

    One instruction rounds two numbers. What Triton makes of a bf16 that is also read as fp32 rounds one, at
    a sixteenth of the rate.
    """
    if dtype == tl.float16:
        rounded = tl.inline_asm_elementwise(
            "cvt.rn.satfinite.f16x2.f32 $0, $2, $1;", "=r,r,r", [x], tl.float16, is_pure=True, pack=2
        )
        found = rounded, rounded.to(tl.float32)
    else:
        found = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $4, $3; shl.b32 $1, $0, 16; and.b32 $2, $0, 0xffff0000;",
            "=&r,=r,=r,r,r",
            [x],
            (tl.bfloat16, tl.float32),
            is_pure=True,
            pack=2,
        )
    return found


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
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    """`high` and `total` become each row's highest logit and sum of exponentials in each tile; if STORED,
    `out` becomes the exponentials.

    Programs take tiles one after the other, all of a vocabulary tile in succession, so that it is read from
    memory once.
    """
    down = tl.cdiv(rows, M)
    across = tl.cdiv(width, N)
    for tile in tl.range(tl.program_id(0), down * across, tl.num_programs(0), flatten=True):
        first = tile % down * M
        n = tile // down
        logits = _tile(hidden, weight, first, n, H, M, N, K)
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
        if STORED:
            out.store([first, n * N], found.to(out.dtype))


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _logits(  # type: ignore[no-untyped-def]
    hidden,
    weight,
    out,
    high,
    total,
    plain,
    rows,
    width,
    scale,
    H: tl.constexpr,
    SQUARE: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    """Tiles as in _product. `scale` is log₂ e / temperature. SQUARE: the temperature is 2, and an exponential
    at temperature 1 is the square of the other, for which there are eight times as many units."""
    down = tl.cdiv(rows, M)
    across = tl.cdiv(width, N)
    for tile in tl.range(tl.program_id(0), down * across, tl.num_programs(0), flatten=True):
        first = tile % down * M
        n = tile // down
        logits = _tile(hidden, weight, first, n, H, M, N, K)
        rounded, x = _rounded(logits, out.dtype)
        out.store([first, n * N], rounded)
        row = first + tl.arange(0, M)
        inside = row < rows
        if (n + 1) * N > width:  # the last tile alone; in _product such a branch costs more than it saves
            x = tl.where((n * N + tl.arange(0, N) < width)[None, :], x, float("-inf"))
        top = tl.max(x, 1)
        exps = tl.exp2(x * scale - (top * scale)[:, None])
        at = row * across + n
        tl.store(high + at, top, mask=inside)
        tl.store(total + at, tl.sum(exps, 1), mask=inside)
        if plain is not None:
            if SQUARE:
                exps *= exps
            else:
                exps = tl.exp2(x * LOG2_E - (top * LOG2_E)[:, None])
            tl.store(plain + at, tl.sum(exps, 1), mask=inside)


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
