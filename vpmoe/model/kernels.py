"""Kernels of the loss heads for Hopper GPUs: the logits' product, and what is done to each logit, in one.

A pass over a chunk's logits takes a third of the product's time, and starts after it. So the product computes
exponentials and sums of a tile while the tile is in registers. Of its three groups of warps one loads tiles,
and two multiply, each half a tile's rows. The second starts later, so that one multiplies while the other
computes exponentials and stores. This needs Gluon, in which a kernel says what each warp does; the other
kernels are Triton's. Both are compiled on first use, which needs a C compiler. The formulas, and their
computation in torch, are in head.py.
"""

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor
from triton.experimental import gluon  # type: ignore[import-untyped]
from triton.experimental.gluon import language as gl  # type: ignore[import-untyped]
from triton.experimental.gluon.language.nvidia.hopper import (  # type: ignore[import-untyped]
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor  # type: ignore[import-untyped]

M, N, K = 128, 256, 64
"""Tokens, vocabulary and hidden size of a tile: the largest whose fp32 sums fit in registers."""
STAGES = 4
"""Tiles of hidden states and of the matrix that are loaded or multiplied at the same time."""
BUFFERS = 2
"""Quarters of a half tile that are being stored at the same time."""
BEHIND = 3
"""Tiles by which the second group of warps starts later; less than STAGES, as both read the same ones."""
REGISTERS = 168
"""Registers of a thread on average: there are twelve warps, and 65,536 registers."""
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
    left = _descriptor(hidden_tH, M // 2, K)
    _product[(min(tiles, multiprocessors),)](
        left,
        _descriptor(weight_VH, N, K),
        left if out_tV is None else _descriptor(out_tV, M // 2, N // 4),
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
        STAGES,
        BUFFERS,
        min(BEHIND, triton.cdiv(inner, K) - 1),
        num_warps=4,
        maxnreg=REGISTERS,
    )


def _descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    block = [rows, columns]
    return TensorDescriptor.from_tensor(x, block, gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16))


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


@gluon.jit  # type: ignore[untyped-decorator]
def _product(  # type: ignore[no-untyped-def]
    hidden,
    weight,
    out,
    reference,
    high,
    total,
    rows,
    width,
    inner,
    STORED: gl.constexpr,
    SUMMED: gl.constexpr,
    M: gl.constexpr,
    N: gl.constexpr,
    K: gl.constexpr,
    STAGES: gl.constexpr,
    BUFFERS: gl.constexpr,
    BEHIND: gl.constexpr,
):
    """If STORED, `out` becomes the logits, or if SUMMED their exponentials. If SUMMED, `high` and `total`
    become each row's highest logit and sum of exponentials in each tile.

    Programs take tiles one after the other, all of a vocabulary tile in succession, so that it is read from
    memory once. A multiplication is half a tile's rows: [M/2, K] · [K, N].
    """
    left = gl.allocate_shared_memory(hidden.dtype, [2 * STAGES, M // 2, K], hidden.layout)
    right = gl.allocate_shared_memory(weight.dtype, [STAGES, N, K], weight.layout)
    loaded = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    begin = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(loaded.index(i), count=1)
        mbarrier.init(free.index(i), count=2)
    mbarrier.init(begin.index(0), count=1)
    staging = left
    if STORED:
        staging = gl.allocate_shared_memory(out.dtype, [2 * BUFFERS, M // 2, N // 4], out.layout)
    shared = (left, right, loaded, free, begin, staging)
    sums = (reference, high, total)
    gl.warp_specialize(
        [
            (
                _multiply,
                (out, shared, sums, rows, width, inner, 0, STORED, SUMMED, M, N, K, STAGES, BUFFERS, BEHIND),
            ),
            (
                _multiply,
                (out, shared, sums, rows, width, inner, 1, STORED, SUMMED, M, N, K, STAGES, BUFFERS, BEHIND),
            ),
            (_load, (hidden, weight, shared, rows, width, inner, M, N, K, STAGES)),
        ],
        [4, 1],  # warps of the second and the third; the first has the kernel's
        [240, 24],  # their registers; the first has those that are left
    )


@gluon.jit  # type: ignore[untyped-decorator]
def _load(  # type: ignore[no-untyped-def]
    hidden,
    weight,
    shared,
    rows,
    width,
    inner,
    M: gl.constexpr,
    N: gl.constexpr,
    K: gl.constexpr,
    STAGES: gl.constexpr,
):
    left, right, loaded, free, _, _ = shared
    down = gl.cdiv(rows, M)
    step = 0
    for tile in range(gl.program_id(0), down * gl.cdiv(width, N), gl.num_programs(0)):
        row = tile % down * M
        column = tile // down * N
        for k in range(0, inner, K):
            stage = step % STAGES
            mbarrier.wait(free.index(stage), (step // STAGES & 1) ^ 1)
            bar = loaded.index(stage)
            mbarrier.expect(bar, (M + N) * K * 2)
            tma.async_copy_global_to_shared(hidden, [row, k], bar, left.index(2 * stage))
            tma.async_copy_global_to_shared(hidden, [row + M // 2, k], bar, left.index(2 * stage + 1))
            tma.async_copy_global_to_shared(weight, [column, k], bar, right.index(stage))
            step += 1


@gluon.jit  # type: ignore[untyped-decorator]
def _multiply(  # type: ignore[no-untyped-def]
    out,
    shared,
    sums,
    rows,
    width,
    inner,
    HALF: gl.constexpr,
    STORED: gl.constexpr,
    SUMMED: gl.constexpr,
    M: gl.constexpr,
    N: gl.constexpr,
    K: gl.constexpr,
    STAGES: gl.constexpr,
    BUFFERS: gl.constexpr,
    BEHIND: gl.constexpr,
):
    left, right, loaded, free, begin, staging = shared
    reference, high, total = sums
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    down = gl.cdiv(rows, M)
    across = gl.cdiv(width, N)
    step = 0
    if HALF == 1:
        mbarrier.wait(begin.index(0), 0)
    for tile in range(gl.program_id(0), down * across, gl.num_programs(0)):
        first = tile % down * M + HALF * (M // 2)
        column = tile // down * N
        row = first + gl.arange(0, M // 2, gl.SliceLayout(1, layout))
        if SUMMED:  # early, so that it is there after the product
            low = gl.load(reference + row, mask=row < rows, other=0.0)
        acc = gl.zeros((M // 2, N), gl.float32, layout)
        for k in range(0, inner, K):
            stage = step % STAGES
            mbarrier.wait(loaded.index(stage), step // STAGES & 1)
            if HALF == 0:
                mbarrier.arrive(begin.index(0), count=1, pred=step == BEHIND)
            acc = warpgroup_mma(
                left.index(2 * stage + HALF),
                right.index(stage).permute((1, 0)),
                acc,
                use_acc=k > 0,
                is_async=True,
            )
            acc = warpgroup_mma_wait(1, deps=(acc,))  # all but this one
            mbarrier.arrive(free.index((step + STAGES - 1) % STAGES), count=1, pred=k > 0)
            step += 1
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(free.index((step + STAGES - 1) % STAGES), count=1)
        if SUMMED:
            if column + N > width:
                beyond = column + gl.arange(0, N, gl.SliceLayout(0, layout)) >= width
                acc = gl.where(beyond[None, :], float("-inf"), acc)
            top = gl.max(acc, 1)
            low += _raised(top, low)
            found = gl.exp2(acc * LOG2_E - low[:, None])
            at = row * across + tile // down
            gl.store(high + at, top, mask=row < rows)
            gl.store(total + at, gl.sum(found, 1), mask=row < rows)
        else:
            found = gl.minimum(gl.maximum(acc, -LARGEST), LARGEST)
        if STORED:
            _store(found.to(out.dtype), out, first, column, staging, HALF * BUFFERS, BUFFERS)
    if STORED:
        tma.store_wait(0)


@gluon.jit  # type: ignore[untyped-decorator]
def _store(found, out, row, column, staging, buffer: gl.constexpr, BUFFERS: gl.constexpr):  # type: ignore[no-untyped-def]
    """Store `found` in quarters, each through one of the buffers from `buffer` on."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, found.shape[1] // 4, 16])
    left, right = _halves(found)
    quarters = _halves(left) + _halves(right)
    for i in gl.static_range(4):
        tma.store_wait(BUFFERS - 1)  # this buffer's last content has been read
        part = staging.index(buffer + i % BUFFERS)
        part.store(gl.convert_layout(quarters[i], layout))
        fence_async_shared()
        tma.async_copy_shared_to_global(out, [row, column + i * (found.shape[1] // 4)], part)


@gluon.jit
def _halves(x):  # type: ignore[no-untyped-def]
    """Columns of the left and of the right half of x."""
    return gl.split(x.reshape((x.shape[0], 2, x.shape[1] // 2)).permute((0, 2, 1)))


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
