"""Superpixel consistency loss and its gradient in one launch, one program an image, O(B N L) memory.

Shapes: B batch, N patches, L centers; in the kernels N is a power of two and W centers are done at a time.

With P = softmax(M) over the centers and a bar for the mean over the patches of a superpixel, C = M - M_bar:
    loss = sum (P - P_bar) C      gradient = P - P_bar + P (C - sum over the centers of P C)
in both forms, times a constant; `segclip_fast/ops/superpixel_kl.py` has the proof. A program sorts its
patches by label, so that a superpixel is a run of rows, and sums over runs by doubling.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import runtime
from .runtime import FLOATS, Variant, power_of_two

MOST_PATCHES = 2048  # at 4096 the sort spills registers
MOST_CENTERS = 64
TILE = 8192  # elements of a tile: 64 KB of shared memory, and no spills with 16 warps
EACH = 256  # elements of a tile for a warp, 8 a thread
STRIDES = (
    "labels_b",
    "labels_n",
    "assignment_b",
    "assignment_n",
    "assignment_l",
    "grad_b",
    "grad_n",
    "grad_l",
)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _smaller(a, b):
    return tl.minimum(a, b)


@triton.jit
def _order(labels, stride, n, N: tl.constexpr):
    """Patches in the order of their labels, and the first and last row of each one's run: three of (N,).

    Rows from n on are padding: they keep their place, each a run of its own.
    """
    row = tl.arange(0, N)
    label = tl.load(labels + row * stride, mask=row < n, other=0).to(tl.int64)
    # Lower 32 bits of the label, then the row. No two keys are equal, so padding stays behind even a patch of
    # the largest label.
    key = tl.sort(tl.where(row < n, label << 32, 0x7FFFFFFF << 32) | row)
    index = (key & 0xFFFFFFFF).to(tl.int32)
    group = key >> 32
    if labels.dtype.element_ty.primitive_bitwidth == 64:  # noqa: SIM102  known when compiled, unlike the next
        # Labels that need more than 32 bits, such as hashes: sort by the upper half as well, stably.
        if tl.max((label != ((label << 32) >> 32)).to(tl.int32), 0) != 0:
            label = tl.load(labels + index * stride, mask=row < n, other=0).to(tl.int64)
            key = tl.sort(tl.where(row < n, (label >> 32) << 32, 0x7FFFFFFF << 32) | row)
            index = tl.gather(index, (key & 0xFFFFFFFF).to(tl.int32), 0)
            group = tl.load(labels + index * stride, mask=row < n, other=0).to(tl.int64)
    before = tl.gather(group, tl.maximum(row - 1, 0), 0)
    after = tl.gather(group, tl.minimum(row + 1, N - 1), 0)
    opens = (row == 0) | (group != before) | (row >= n)
    closes = (group != after) | (row >= n - 1)
    first = tl.associative_scan(tl.where(opens, row, 0), 0, _larger)
    last = tl.associative_scan(tl.where(closes, row, N), 0, _smaller, reverse=True)
    return index, first, last


@triton.jit
def _rows(x, at, N: tl.constexpr, W: tl.constexpr):
    """Rows `at` (N,) of x (N, W).

    Flat, because a gather along an axis of two would get a layout with whole columns in one warp and shuffle
    every register of a thread with every other: 4,000 shuffles at N 1024, not one trip through shared memory.
    """
    place = tl.reshape(at[:, None] * W + tl.arange(0, W)[None, :], (N * W,))
    return tl.reshape(tl.gather(tl.reshape(x, (N * W,)), place, 0), (N, W))


@triton.jit
def _run_mean(x, first, last, longest, N: tl.constexpr, W: tl.constexpr):
    """Mean of x (N, W) over the run first..last of each row, at that row; longest: length of the longest."""
    row = tl.arange(0, N)
    reach = 1
    while reach < longest:
        # The sum of a run's `reach` rows up to here becomes that of its 2 `reach` rows up to here.
        earlier = _rows(x, tl.maximum(row - reach, 0), N, W)
        x += tl.where((row - reach >= first)[:, None], earlier, 0.0)
        reach *= 2
    # All rows read their run's last one, so all get the same bits. Rounded division: the mean of ones is one.
    return tl.div_rn(_rows(x, last, N, W), (last - first + 1).to(tl.float32)[:, None])


@triton.jit
def _whole(
    source, target, unit_in, unit_out, real, first, last, longest, scale, L, N: tl.constexpr, W: tl.constexpr
):
    """Loss of an image whose centers fit a tile, W >= L; writes the gradient."""
    column = tl.arange(0, W)[None, :]
    inside = column < L
    x = tl.load(source + column * unit_in, mask=real & inside, other=0.0).to(tl.float32)
    # No constant over the centers matters; this one keeps the sums small.
    x -= tl.max(tl.where(inside, x, float("-inf")), 1)[:, None]
    p = tl.where(inside, tl.exp(x), 0.0)
    p *= (1.0 / tl.sum(p, 1))[:, None]
    both = tl.reshape(tl.join(p, x), (N, 2 * W))
    mean = tl.reshape(_run_mean(both, first, last, longest, N, 2 * W), (N, W, 2))
    p_mean, x_mean = tl.split(mean)
    gap, c = p - p_mean, x - x_mean
    turn = p * (c - tl.sum(p * c, 1)[:, None])
    tl.store(target + column * unit_out, (gap + turn) * scale, mask=real & inside)
    return tl.sum(gap * c) * scale


@triton.jit
def _by_parts(
    source, target, unit_in, unit_out, real, first, last, longest, scale, L, N: tl.constexpr, W: tl.constexpr
):
    """Loss of an image, W centers at a time; writes the gradient, whose memory keeps C meanwhile."""
    columns = tl.arange(0, W)[None, :]
    anchor = tl.load(source, mask=real, other=0.0).to(tl.float32)  # (N, 1), in the place of the maximum
    top = tl.full((N,), float("-inf"), tl.float32)
    total = tl.zeros((N,), tl.float32)  # sum of exp(x - top)
    slope = tl.zeros((N,), tl.float32)  # sum of exp(x - top) C
    for begin in range(0, L, W):
        column = begin + columns
        inside = real & (column < L)
        x = tl.load(source + column * unit_in, mask=inside, other=0.0).to(tl.float32) - anchor
        c = x - _run_mean(x, first, last, longest, N, W)
        tl.store(target + column * unit_out, c, mask=inside)
        x = tl.where(column < L, x, float("-inf"))
        higher = tl.maximum(top, tl.max(x, 1))
        fade = tl.exp(top - higher)
        e = tl.exp(x - higher[:, None])
        total = total * fade + tl.sum(e, 1)
        slope = slope * fade + tl.sum(e * c, 1)
        top = higher
    share = (1.0 / total)[:, None]
    shift = anchor + top[:, None]
    center = slope[:, None] * share  # (N, 1) sum over the centers of P C
    tl.debug_barrier()  # the loads of C below see the stores above, whichever thread made them
    loss = tl.zeros((N,), tl.float32)
    for begin in range(0, L, W):
        column = begin + columns
        inside = real & (column < L)
        x = tl.load(source + column * unit_in, mask=inside, other=0.0).to(tl.float32)
        p = tl.where(column < L, tl.exp(x - shift) * share, 0.0)
        gap = p - _run_mean(p, first, last, longest, N, W)
        c = tl.load(target + column * unit_out, mask=inside, other=0.0)
        loss += tl.sum(gap * c, 1)
        tl.store(target + column * unit_out, (gap + p * (c - center)) * scale, mask=inside)
    return tl.sum(loss) * scale


# Strides stay arguments. Known to be 1, they make the compiler vectorise over the centers, and spill.
@triton.jit(do_not_specialize=[*STRIDES, "n"])
def _superpixel_kl(
    labels,  # (B, n) integers
    assignment,  # (B, n, L)
    loss,  # (B,)
    grad,  # (B, n, L)
    labels_b,  # strides, in elements
    labels_n,
    assignment_b,
    assignment_n,
    assignment_l,
    grad_b,
    grad_n,
    grad_l,
    n,
    scale,
    L: tl.constexpr,
    N: tl.constexpr,
    W: tl.constexpr,
):
    """Loss and gradient of one image, times scale."""
    image = tl.program_id(0).to(tl.int64)
    index, first, last = _order(labels + image * labels_b, labels_n, n, N)
    longest = tl.max(last - first, 0) + 1
    patch = index.to(tl.int64)[:, None]
    real = tl.arange(0, N)[:, None] < n
    source = assignment + image * assignment_b + patch * assignment_n
    target = grad + image * grad_b + patch * grad_n
    if L <= W:
        cost = _whole(source, target, assignment_l, grad_l, real, first, last, longest, scale, L, N, W)
    else:
        cost = _by_parts(source, target, assignment_l, grad_l, real, first, last, longest, scale, L, N, W)
    tl.store(loss + image, cost)


@dataclass(frozen=True)
class Shape:
    """How sizes are compiled: N rows, W of L centers at a time, warps of a program."""

    L: int
    N: int
    W: int
    warps: int


def shape_of(N: int, L: int) -> Shape:
    """The shape for N patches and L centers."""
    rows = power_of_two(N, 16)
    width = min(power_of_two(L), TILE // rows)
    return Shape(L, rows, width, min(16, max(4, rows * width // EACH)))


def refuse(labels: Tensor, assignment: Tensor) -> str | None:
    """Why the kernel cannot take labels (B, N) and assignment (B, N, L); None if it can."""
    if labels.device != assignment.device:
        return f"labels are on {labels.device}, assignment on {assignment.device}"
    _, N, L = assignment.shape
    if N > MOST_PATCHES or L > MOST_CENTERS:
        return f"takes up to {MOST_PATCHES} patches and {MOST_CENTERS} centers, got {N} and {L}"
    return None


def superpixel_kl(labels: Tensor, assignment: Tensor, official: bool) -> tuple[Tensor, Tensor]:
    """Loss and its gradient with respect to the assignment; neither input need be contiguous.

    Args:
        labels: (B, N) integers, any values.
        assignment: (B, N, L) fp32, fp16 or bf16.
        official: divide by L as well.

    Returns:
        () loss and (B, N, L) gradient, both fp32 whatever the assignment is: fp16 has two or three bits for a
        gradient of 1 / (2 B N), and none for a loss scale of 65536. Strides as torch.empty_like gives them.
    """
    B, N, L = assignment.shape
    device = assignment.device
    shape = shape_of(N, L)
    strides = torch.empty_like(assignment, device="meta").stride()
    grad = runtime.empty((B * N * L,), torch.float32, device).as_strided((B, N, L), strides)
    loss = runtime.empty((B,), torch.float32, device)
    with runtime.on_device(assignment):
        _superpixel_kl[(B,)](
            labels,
            assignment,
            loss,
            grad,
            *labels.stride(),
            *assignment.stride(),
            *strides,
            N,
            1.0 / (2 * B * N * (L if official else 1)),
            L=shape.L,
            N=shape.N,
            W=shape.W,
            num_warps=shape.warps,
            num_stages=1,
        )
    return loss.sum(), grad


def variants() -> Iterator[Variant]:
    """Every size, dtype and kind of label that is compiled ahead of time; both forms are one kernel."""
    for N in (48, 196, 784):
        for L in (8, 10, 64):
            for name in FLOATS.values():
                yield _variant(N, L, name, "i32")
            yield _variant(N, L, "fp32", "i64")
    for label in ("i1", "u8", "i16", "u64"):
        yield _variant(196, 8, "fp32", label)
    yield _variant(MOST_PATCHES, 8, "fp32", "i32")
    yield _variant(MOST_PATCHES, MOST_CENTERS, "fp32", "i64")


def _variant(N: int, L: int, dtype: str, label: str) -> Variant:
    shape = shape_of(N, L)
    pointers = {"labels": f"*{label}", "assignment": f"*{dtype}", "loss": "*fp32", "grad": "*fp32"}
    return Variant(
        name=f"superpixel_kl {dtype} labels {label} N{N} L{L}",
        kernel=_superpixel_kl,
        arguments={**pointers, **dict.fromkeys((*STRIDES, "n"), "i32"), "scale": "fp32"},
        constants={"L": shape.L, "N": shape.N, "W": shape.W},
        warps=shape.warps,
        stages=1,
        paper=N <= 196 and L <= 10,
    )
