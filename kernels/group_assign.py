"""Gumbel assignment and masked mean pooling, forward and backward.

Shapes: B batch, N patches, L centers, D width, G groups of W = D / G channels. A tile is ROWS patches by one
group; keys exist only tile by tile, in registers. The patch tensor is read twice forward and twice backward,
the second time from the last image to the first, so that what is still in the L2 cache is used first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import runtime
from .gumbel import gumbel_tile
from .runtime import FLOATS, Variant, power_of_two
from .tiles import tile, vector

MAX_CENTERS = 64
MAX_GROUP_WIDTH = 128
LEAST = 16  # rows and columns of the smallest tile the matrix units take
NO_NOISE, GIVEN_NOISE, COUNTER_NOISE = 0, 1, 2


class Forward(NamedTuple):
    """What `forward` returns; all float32.

    Attributes:
        pooled: (B, L, D).
        logits: (B, L, N) clean scores.
        hard: (B, L, N) one-hot - soft + soft.
        soft: (B, L, N) softmax of the noisy scores.
        mean: (B, L, D) mean patch of each center, before the value projection.
        moments: (2, B, N) mean and 1 / standard deviation of every key.
    """

    pooled: Tensor
    logits: Tensor
    hard: Tensor
    soft: Tensor
    mean: Tensor
    moments: Tensor


@triton.jit
def assign(
    centers,
    patches,
    key_weight,
    key_gain,
    key_bias,
    noise,
    logits,
    hard,
    soft,
    moments,
    tau,
    eps,
    B,
    N,
    L: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    NOISE: tl.constexpr,
    ROWS: tl.constexpr,
    CENTERS: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scores and assignment of ROWS patches of one image; grid (ceil(N / ROWS), B)."""
    image = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = n < N
    k = tl.arange(0, CENTERS)
    real = k < L
    i = tl.arange(0, WIDTH)
    within = i < W

    dots = tl.zeros((ROWS, CENTERS), tl.float32)  # key . (center * gain)
    mean = tl.zeros((ROWS,), tl.float32)
    spread = tl.zeros((ROWS,), tl.float32)  # sum of squared deviations
    # Sums of center * gain and center * bias; added up as tiles and reduced once, after the loop (a reduction
    # carried from turn to turn meets a compiler pass of Triton 3.6 that fails at some sizes).
    gained = tl.zeros((CENTERS, WIDTH), tl.float32)
    biased = tl.zeros((CENTERS, WIDTH), tl.float32)
    for g in range(0, D // W):
        column = g * W + i
        x = tile(patches + image * N * D, n, column, inside, within, D)  # (ROWS, WIDTH)
        weight = tile(key_weight, column, i, within, within, W).to(x.dtype)  # (out, in)
        key = tl.dot(x, tl.trans(weight), input_precision=PRECISION)  # (ROWS, WIDTH)
        # Mean and spread join group by group: no cancellation, as in one pass over sums of squares.
        local = tl.sum(key, axis=1) / W
        apart = tl.where(within[None, :], key - local[:, None], 0.0)
        step = local - mean
        spread += tl.sum(apart * apart, axis=1) + step * step * (W * g / (g + 1.0))
        mean += step / (g + 1.0)
        center = tile(centers + image * L * D, k, column, real, within, D).to(tl.float32)
        scaled = center * vector(key_gain, column, within)[None, :]
        gained += scaled
        biased += center * vector(key_bias, column, within)[None, :]
        dots += tl.dot(key, tl.trans(scaled), input_precision=PRECISION)

    rstd = 1.0 / tl.sqrt(spread / D + eps)
    score = rstd[:, None] * (dots - mean[:, None] * tl.sum(gained, axis=1)[None, :])  # (ROWS, CENTERS)
    score += tl.sum(biased, axis=1)[None, :]
    noisy = score
    if NOISE == 1:  # GIVEN_NOISE
        places = (image * L + k[None, :]) * N + n[:, None]
        noisy += tl.load(noise + places, mask=inside[:, None] & real[None, :], other=0.0).to(tl.float32)
    if NOISE == 2:  # COUNTER_NOISE
        row = (tl.program_id(1) * N + n).to(tl.int32)
        noisy += gumbel_tile(tl.load(noise), tl.load(noise + 1), row, (L + 3) // 4, CENTERS)
    noisy = tl.where(real[None, :], noisy / tau, float("-inf"))
    noisy = tl.exp(noisy - tl.max(noisy, axis=1)[:, None])
    probability = noisy / tl.sum(noisy, axis=1)[:, None]
    chosen = tl.argmax(probability, axis=1)  # the first of equals
    one_hot = tl.where(k[None, :] == chosen[:, None], 1.0, 0.0)

    at = (image * L + k[None, :]) * N + n[:, None]
    mask = inside[:, None] & real[None, :]
    tl.store(logits + at, score, mask=mask)
    tl.store(soft + at, probability, mask=mask)
    tl.store(hard + at, one_hot - probability + probability, mask=mask)
    tl.store(moments + image * N + n, mean, mask=inside)
    tl.store(moments + (B + image) * N + n, rstd, mask=inside)


@triton.jit
def pool(
    patches,
    value_weight,
    hard,
    pooled,
    mean,
    N,
    L: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    ROWS: tl.constexpr,
    CENTERS: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Mean patch of every center and its value, for one group of one image; grid (G, B)."""
    image = (tl.num_programs(1) - 1 - tl.program_id(1)).to(tl.int64)
    k = tl.arange(0, CENTERS)
    real = k < L
    i = tl.arange(0, WIDTH)
    within = i < W
    column = tl.program_id(0) * W + i
    total = tl.zeros((CENTERS, WIDTH), tl.float32)
    counts = tl.zeros((CENTERS, ROWS), tl.float32)
    for block in range(0, BLOCKS):
        n = block * ROWS + tl.arange(0, ROWS)
        inside = n < N
        taken = tile(hard + image * L * N, k, n, real, inside, N)  # (CENTERS, ROWS)
        x = tile(patches + image * N * D, n, column, inside, within, D)
        counts += taken
        total += tl.dot(taken.to(x.dtype), x, input_precision=PRECISION)
    average = total / tl.maximum(tl.sum(counts, axis=1), 1.0)[:, None]
    weight = tile(value_weight, column, i, within, within, W).to(tl.float32)  # (out, in)
    value = tl.dot(average, tl.trans(weight), input_precision=PRECISION)
    at = (image * L + k[:, None]) * D + column[None, :]
    mask = real[:, None] & within[None, :]
    tl.store(mean + at, average, mask=mask)
    tl.store(pooled + at, value, mask=mask)


# --- launchers


def refuse(L: int, W: int) -> str | None:
    """Why the kernels cannot take L centers and groups of W channels; None if they can."""
    if L > MAX_CENTERS:
        return f"takes at most {MAX_CENTERS} centers, got {L}"
    if W > MAX_GROUP_WIDTH:
        return f"takes groups of at most {MAX_GROUP_WIDTH} channels, got {W}"
    if W > MAX_GROUP_WIDTH // 2 and L > LEAST:  # the tiles would not fit into the shared memory of sm_80
        return f"takes {L} centers with groups of at most {MAX_GROUP_WIDTH // 2} channels, got {W}"
    return None


class Shape(NamedTuple):
    """Sizes that a kernel is compiled for, and the tile that goes with them."""

    L: int
    D: int
    W: int
    ROWS: int
    CENTERS: int
    WIDTH: int
    PRECISION: str


def shape_of(N: int, L: int, D: int, W: int, dtype: torch.dtype) -> Shape:
    """Tile sizes for N patches of width D in groups of W, L centers.

    32 patches a tile: 196 = 6 x 32 + 4 wastes 14 %, where 3 x 64 + 4 would waste 31 % and spill backward; 16
    where that wastes less by more than a tenth (48 = 3 x 16).
    """
    wide, narrow = (-(-N // rows) * rows for rows in (32, LEAST))
    exact = dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    return Shape(
        L,
        D,
        W,
        32 if wide <= 1.1 * narrow else LEAST,
        power_of_two(L, LEAST),
        power_of_two(W, LEAST),
        "ieee" if exact else "tf32",
    )


def options(shape: Shape, kernel: Any) -> dict[str, int]:
    """Warps and pipelining depth of a kernel: as many warps as keep its tiles in registers (compile.py)."""
    exact, many = shape.PRECISION == "ieee", shape.CENTERS > LEAST
    warps, stages = {
        "assign": (16 if exact else 4, 2),
        "pool": (8 if exact else 4, 2),
        "rows_backward": (16 if exact and many else 8 if exact or many else 4, 2),
        "scores_backward": (4, 2),
        "patches_backward": (16, 3) if exact else (4, 2),
        "centers_backward": (8 if exact and many else 4, 2),
    }[kernel.__name__]
    return {"num_warps": warps, "num_stages": stages}


def parts_of(B: int, groups: int, device: torch.device) -> int:
    """Into how many parts the images are split: about four programs for every multiprocessor."""
    processors = (
        torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 6
    )
    wanted = min(B, max(1, 4 * processors // groups))
    return -(-B // -(-B // wanted))


def forward(
    centers: Tensor,
    patches: Tensor,
    key_weight: Tensor,
    key_gain: Tensor,
    key_bias: Tensor,
    value_weight: Tensor,
    noise: Tensor | None,
    tau: float,
    eps: float,
) -> Forward:
    """Assign and pool; see `segclip_fast.ops.group_assign` for the operands.

    noise: (B, L, N) Gumbel noise, (2,) int64 key and call of the counter-based noise, or None.
    """
    centers, patches, key_weight, key_gain, key_bias, value_weight = (
        t.contiguous() for t in (centers, patches, key_weight, key_gain, key_bias, value_weight)
    )
    B, N, D = patches.shape
    L = centers.shape[1]
    shape = shape_of(N, L, D, key_weight.shape[1], patches.dtype)
    maps = [runtime.empty((B, L, N), torch.float32, patches.device) for _ in range(3)]
    rows = [runtime.empty((B, L, D), torch.float32, patches.device) for _ in range(2)]
    moments = runtime.empty((2, B, N), torch.float32, patches.device)
    kind = NO_NOISE if noise is None else GIVEN_NOISE if noise.is_floating_point() else COUNTER_NOISE
    noise = patches if noise is None else noise.contiguous()
    logits, hard, soft = maps
    pooled, mean = rows
    with runtime.on_device(patches):
        assign[(-(-N // shape.ROWS), B)](
            centers,
            patches,
            key_weight,
            key_gain,
            key_bias,
            noise,
            logits,
            hard,
            soft,
            moments,
            tau,
            eps,
            B,
            N,
            NOISE=kind,
            **shape._asdict(),
            **options(shape, assign),
        )
        pool[(D // shape.W, B)](
            patches,
            value_weight,
            hard,
            pooled,
            mean,
            N,
            BLOCKS=-(-N // shape.ROWS),
            **shape._asdict(),
            **options(shape, pool),
        )
    return Forward(pooled, logits, hard, soft, mean, moments)


# --- ahead of time


def variants() -> Iterator[Variant]:
    """Every kernel, forward and backward, at the sizes that are compiled ahead of time in tests."""
    from .group_assign_backward import KERNELS as BACKWARD

    cases = [  # N, L, D, W
        (196, 8, 768, 64),
        (48, 8, 768, 64),
        (784, 8, 768, 64),
        (196, 64, 768, 64),
        (196, 10, 1024, 64),
        (64, 8, 96, 24),
        (196, 16, 1024, 128),
        (1, 1, 64, 16),
    ]
    for N, L, D, W in cases:
        for dtype, name in FLOATS.items():
            shape = shape_of(N, L, D, W, dtype)
            for kernel in (assign, pool, *BACKWARD):
                yield from _variants_of(kernel, shape, name, N)


def _variants_of(kernel: Any, shape: Shape, dtype: str, N: int) -> Iterator[Variant]:
    scalars = {"tau": "fp32", "eps": "fp32", "B": "i32", "N": "i32"}
    loops = {"BLOCKS": -(-N // shape.ROWS), "IMAGES": 6}
    in_dtype = ("patches", "d_patches")
    kinds = (NO_NOISE, GIVEN_NOISE, COUNTER_NOISE) if "NOISE" in kernel.arg_names else (None,)
    for kind in kinds:
        constants: dict[str, Any] = dict(shape._asdict())
        constants |= {name: value for name, value in loops.items() if name in kernel.arg_names}
        if kind is not None:
            constants["NOISE"] = kind
        arguments = {
            name: scalars.get(name, f"*{dtype}" if name in in_dtype else "*fp32")
            for name in kernel.arg_names
            if name not in constants
        }
        if kind == COUNTER_NOISE:
            arguments["noise"] = "*i64"
        launch = options(shape, kernel)
        yield Variant(
            f"group_assign.{kernel.__name__} {dtype} N{N} L{shape.L} D{shape.D} W{shape.W}"
            + ("" if kind is None else f" noise{kind}"),
            kernel,
            arguments,
            constants,
            launch["num_warps"],
            launch["num_stages"],
            paper=(shape.L, shape.D) == (8, 768),
        )
