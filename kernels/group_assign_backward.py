"""Gradients of Gumbel assignment and masked mean pooling, with exact straight-through semantics.

Shapes: as in group_assign.py. One launch over images for what concerns the centers, one over tiles of patches
for the gradient of the scores, two over groups for what the keys lead back to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import runtime
from .group_assign import options, parts_of, shape_of
from .tiles import tile, vector


@triton.jit
def rows_backward(
    d_pooled,
    centers,
    key_gain,
    key_bias,
    value_weight,
    hard,
    mean,
    d_total,
    sums,
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
    """What is needed per center, for one image; grid (B,).

    d_total (B, L, D): gradient of the sum of each center's patches. sums (B, 3, L): gradient of its count,
    sum of center * gain, sum of center * bias.
    """
    image = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, CENTERS)
    real = k < L
    i = tl.arange(0, WIDTH)
    within = i < W
    counts = tl.zeros((CENTERS, ROWS), tl.float32)
    for block in range(0, BLOCKS):
        n = block * ROWS + tl.arange(0, ROWS)
        counts += tile(hard + image * L * N, k, n, real, n < N, N)
    count = tl.sum(counts, axis=1)

    lost = tl.zeros((CENTERS, WIDTH), tl.float32)
    gained = tl.zeros((CENTERS, WIDTH), tl.float32)
    biased = tl.zeros((CENTERS, WIDTH), tl.float32)
    for g in range(0, D // W):
        column = g * W + i
        upstream = tile(d_pooled + image * L * D, k, column, real, within, D).to(tl.float32)
        weight = tile(value_weight, column, i, within, within, W).to(tl.float32)  # (out, in)
        d_sum = tl.dot(upstream, weight, input_precision=PRECISION) / tl.maximum(count, 1.0)[:, None]
        average = tile(mean + image * L * D, k, column, real, within, D)
        lost += d_sum * average
        center = tile(centers + image * L * D, k, column, real, within, D).to(tl.float32)
        gained += center * vector(key_gain, column, within)[None, :]
        biased += center * vector(key_bias, column, within)[None, :]
        at = (image * L + k[:, None]) * D + column[None, :]
        tl.store(d_total + at, d_sum, mask=real[:, None] & within[None, :])
    d_count = tl.where(count >= 1.0, -tl.sum(lost, axis=1), 0.0)  # the clamp at 1
    tl.store(sums + image * 3 * L + k, d_count, mask=real)
    tl.store(sums + (image * 3 + 1) * L + k, tl.sum(gained, axis=1), mask=real)
    tl.store(sums + (image * 3 + 2) * L + k, tl.sum(biased, axis=1), mask=real)


@triton.jit
def scores_backward(
    patches,
    d_logits,
    d_hard,
    logits,
    soft,
    d_total,
    sums,
    d_scores,
    shares,
    tau,
    B,
    N,
    L: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    ROWS: tl.constexpr,
    CENTERS: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of the clean scores of ROWS patches; grid (ceil(N / ROWS), B).

    shares (2, B, N): the two averages over the channels that LayerNorm's gradient subtracts. They follow from
    the scores, without another pass over the keys.
    """
    image = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = n < N
    k = tl.arange(0, CENTERS)
    real = k < L
    i = tl.arange(0, WIDTH)
    within = i < W
    d_soft = tl.zeros((ROWS, CENTERS), tl.float32)
    for g in range(0, D // W):
        column = g * W + i
        x = tile(patches + image * N * D, n, column, inside, within, D)
        d_sum = tile(d_total + image * L * D, k, column, real, within, D)
        d_soft += tl.dot(x.to(tl.float32), tl.trans(d_sum), input_precision=PRECISION)

    at = (image * L + k[None, :]) * N + n[:, None]
    mask = inside[:, None] & real[None, :]
    d_soft += tl.load(d_hard + at, mask=mask, other=0.0).to(tl.float32)  # straight-through
    d_soft += vector(sums + image * 3 * L, k, real)[None, :]
    probability = tl.load(soft + at, mask=mask, other=0.0)
    d_noisy = probability * (d_soft - tl.sum(probability * d_soft, axis=1)[:, None])
    found = tl.load(d_logits + at, mask=mask, other=0.0).to(tl.float32) + d_noisy / tau
    found = tl.where(mask, found, 0.0)
    gained = vector(sums + (image * 3 + 1) * L, k, real)
    biased = vector(sums + (image * 3 + 2) * L, k, real)
    score = tl.load(logits + at, mask=mask, other=0.0)
    tl.store(d_scores + at, found, mask=mask)
    tl.store(shares + image * N + n, tl.sum(found * gained[None, :], axis=1) / D, mask=inside)
    normed = tl.sum(found * (score - biased[None, :]), axis=1) / D
    tl.store(shares + (B + image) * N + n, normed, mask=inside)


@triton.jit
def patches_backward(
    centers,
    patches,
    key_weight,
    key_gain,
    hard,
    moments,
    d_total,
    d_scores,
    shares,
    gathered,
    d_patches,
    d_key_weight,
    B,
    N,
    L: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    ROWS: tl.constexpr,
    CENTERS: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCKS: tl.constexpr,
    IMAGES: tl.constexpr,
):
    """Gradients of patches and key weight, for one group of IMAGES images; grid (G, parts).

    gathered (B, L, D): sum over the patches of d_score x / deviation, the way to the gradient of the centers.
    d_key_weight (parts, D, W): partial sums over the images of a part.
    """
    part = tl.program_id(1)
    k = tl.arange(0, CENTERS)
    real = k < L
    i = tl.arange(0, WIDTH)
    within = i < W
    column = tl.program_id(0) * W + i
    half = patches.dtype.element_ty  # operands of the products; sums are float32
    weight = tile(key_weight, column, i, within, within, W).to(half)  # (out, in)
    gain = vector(key_gain, column, within)
    d_weight = tl.zeros((WIDTH, WIDTH), tl.float32)
    for turn in range(0, IMAGES):
        # The last image first: it is what the pass over the scores read last.
        image = (B - 1 - part * IMAGES - turn).to(tl.int64)
        present = image >= 0  # the last part may have fewer
        at = (image * L + k[:, None]) * D + column[None, :]
        row_mask = real[:, None] & within[None, :] & present
        center = tl.load(centers + at, mask=row_mask, other=0.0).to(tl.float32)  # (CENTERS, WIDTH)
        gained = (center * gain[None, :]).to(half)
        d_sum = tl.load(d_total + at, mask=row_mask, other=0.0).to(half)
        found = tl.zeros((CENTERS, WIDTH), tl.float32)
        for block in range(0, BLOCKS):
            n = block * ROWS + tl.arange(0, ROWS)
            inside = (n < N) & present
            x = tile(patches + image * N * D, n, column, inside, within, D)  # (ROWS, WIDTH)
            key = tl.dot(x, tl.trans(weight), input_precision=PRECISION)
            rstd = vector(moments + (B + image) * N, n, inside)
            d_score = tile(d_scores + image * L * N, k, n, real, inside, N)  # (CENTERS, ROWS)
            d_score = (d_score * rstd[None, :]).to(half)
            found += tl.dot(d_score, x, input_precision=PRECISION)
            # LayerNorm's gradient, before the gain: d - mean(d) - normed mean(d normed), over the deviation.
            d_key = tl.dot(tl.trans(d_score), gained, input_precision=PRECISION)
            d_key -= (vector(shares + image * N, n, inside) * rstd)[:, None]
            slope = vector(shares + (B + image) * N, n, inside) * rstd * rstd
            d_key -= (key - vector(moments + image * N, n, inside)[:, None]) * slope[:, None]
            d_key = d_key.to(half)  # 0 in rows beyond N
            d_weight += tl.dot(tl.trans(d_key), x, input_precision=PRECISION)
            d_x = tl.dot(d_key, weight, input_precision=PRECISION)
            taken = tile(hard + image * L * N, k, n, real, inside, N).to(half)
            d_x = tl.dot(tl.trans(taken), d_sum, d_x, input_precision=PRECISION)
            there = d_patches + image * N * D + n[:, None] * D + column[None, :]
            tl.store(there, d_x, mask=inside[:, None] & within[None, :])
        tl.store(gathered + at, found, mask=row_mask)
    row = part.to(tl.int64) * D + column
    tl.store(d_key_weight + row[:, None] * W + i[None, :], d_weight, mask=within[:, None] & within[None, :])


@triton.jit
def centers_backward(
    centers,
    patches,
    key_weight,
    key_gain,
    key_bias,
    moments,
    d_scores,
    gathered,
    d_centers,
    d_key_affine,
    B,
    N,
    L: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    ROWS: tl.constexpr,
    CENTERS: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCKS: tl.constexpr,
    IMAGES: tl.constexpr,
):
    """Gradients of centers, key gain and key bias, for one group of IMAGES images; grid (G, parts).

    d_key_affine (parts, 2, D): partial sums over the images of a part.
    """
    part = tl.program_id(1)
    k = tl.arange(0, CENTERS)
    real = k < L
    i = tl.arange(0, WIDTH)
    within = i < W
    column = tl.program_id(0) * W + i
    half = patches.dtype.element_ty
    weight = tile(key_weight, column, i, within, within, W).to(half).to(tl.float32)  # (out, in)
    gain = vector(key_gain, column, within)
    bias = vector(key_bias, column, within)
    d_gain = tl.zeros((WIDTH,), tl.float32)
    d_bias = tl.zeros((WIDTH,), tl.float32)
    for turn in range(0, IMAGES):
        image = (B - 1 - part * IMAGES - turn).to(tl.int64)
        present = image >= 0
        shifts = tl.zeros((CENTERS, ROWS), tl.float32)  # d_score mean / deviation
        scores = tl.zeros((CENTERS, ROWS), tl.float32)
        for block in range(0, BLOCKS):
            n = block * ROWS + tl.arange(0, ROWS)
            inside = (n < N) & present
            d_score = tile(d_scores + image * L * N, k, n, real, inside, N)  # (CENTERS, ROWS)
            scores += d_score
            rstd = vector(moments + (B + image) * N, n, inside)
            rounded = (d_score * rstd[None, :]).to(half).to(tl.float32)  # as in `gathered`
            shifts += rounded * vector(moments + image * N, n, inside)[None, :]
        shift, score_sum = tl.sum(shifts, axis=1), tl.sum(scores, axis=1)
        at = (image * L + k[:, None]) * D + column[None, :]
        mask = real[:, None] & within[None, :] & present
        center = tl.load(centers + at, mask=mask, other=0.0).to(tl.float32)
        found = tl.load(gathered + at, mask=mask, other=0.0)
        normed_sum = tl.dot(found, tl.trans(weight), input_precision=PRECISION) - shift[:, None]
        d_center = normed_sum * gain[None, :] + score_sum[:, None] * bias[None, :]
        tl.store(d_centers + at, d_center, mask=mask)
        d_gain += tl.sum(center * normed_sum, axis=0)
        d_bias += tl.sum(center * score_sum[:, None], axis=0)
    affine = d_key_affine + part.to(tl.int64) * 2 * D + column
    tl.store(affine, d_gain, mask=within)
    tl.store(affine + D, d_bias, mask=within)


KERNELS = (rows_backward, scores_backward, patches_backward, centers_backward)


class Backward(NamedTuple):
    """Gradients that `backward` returns, float32 but for d_patches, which has the dtype of the patches."""

    d_centers: Tensor
    d_patches: Tensor
    d_key_weight: Tensor
    d_key_gain: Tensor
    d_key_bias: Tensor
    d_value_weight: Tensor


def backward(
    grads: Sequence[Tensor], operands: Sequence[Tensor], found: Sequence[Tensor], tau: float
) -> Backward:
    """Gradients of the operands of `forward`.

    Args:
        grads: of pooled (B, L, D), logits and hard (B, L, N).
        operands: the first six of `forward`.
        found: logits, hard, soft, mean, moments, as `forward` returned them.
        tau: the temperature.
    """
    d_pooled, d_logits, d_hard = (t.contiguous() for t in grads)
    centers, patches, key_weight, key_gain, key_bias, value_weight = (t.contiguous() for t in operands)
    logits, hard, soft, mean, moments = found
    B, N, D = patches.shape
    L, W = centers.shape[1], key_weight.shape[1]
    device, shape = patches.device, shape_of(N, L, D, W, patches.dtype)
    settings = shape._asdict()
    parts = parts_of(B, D // W, device)

    def empty(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return runtime.empty(sizes, dtype, device)

    d_total, sums = empty(B, L, D), empty(B, 3, L)
    d_scores, shares = empty(B, L, N), empty(2, B, N)
    gathered, d_centers = empty(B, L, D), empty(B, L, D)
    d_patches = empty(B, N, D, dtype=patches.dtype)
    d_key_weight, d_key_affine = empty(parts, D, W), empty(parts, 2, D)
    blocks = -(-N // shape.ROWS)
    with runtime.on_device(patches):
        rows_backward[(B,)](
            d_pooled,
            centers,
            key_gain,
            key_bias,
            value_weight,
            hard,
            mean,
            d_total,
            sums,
            N,
            BLOCKS=blocks,
            **settings,
            **options(shape, rows_backward),
        )
        scores_backward[(blocks, B)](
            patches,
            d_logits,
            d_hard,
            logits,
            soft,
            d_total,
            sums,
            d_scores,
            shares,
            tau,
            B,
            N,
            **settings,
            **options(shape, scores_backward),
        )
        patches_backward[(D // W, parts)](
            centers,
            patches,
            key_weight,
            key_gain,
            hard,
            moments,
            d_total,
            d_scores,
            shares,
            gathered,
            d_patches,
            d_key_weight,
            B,
            N,
            BLOCKS=blocks,
            IMAGES=-(-B // parts),
            **settings,
            **options(shape, patches_backward),
        )
        centers_backward[(D // W, parts)](
            centers,
            patches,
            key_weight,
            key_gain,
            key_bias,
            moments,
            d_scores,
            gathered,
            d_centers,
            d_key_affine,
            B,
            N,
            BLOCKS=blocks,
            IMAGES=-(-B // parts),
            **settings,
            **options(shape, centers_backward),
        )
    d_key_gain, d_key_bias = d_key_affine.sum(dim=0)
    # B L rows only: a batched product of G small matrices.
    upstream = d_pooled.to(torch.float32).view(B * L, -1, W).permute(1, 2, 0)  # (G, out, B L)
    d_value_weight = torch.bmm(upstream, mean.view(B * L, -1, W).transpose(0, 1)).reshape(D, W)
    return Backward(d_centers, d_patches, d_key_weight.sum(dim=0), d_key_gain, d_key_bias, d_value_weight)
