"""group_assign in PyTorch with the algebra that saves work and a written-out backward; any device.

Shapes: B batch, L centers, N patches, D width, G groups of the 1x1 key and value projections. Everything is
computed in float32, or float64 where that is what comes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .gumbel import gumbel

EPS = 1e-5  # of the key LayerNorm


def forward(operands: Sequence[Tensor], noise: Tensor | None, tau: float) -> tuple[Tensor, ...]:
    """Pooled (B, L, D), logits, hard and soft (B, L, N), mean (B, L, D) and moments (2, B, N) of the keys."""
    centers, patches, key_weight, key_gain, key_bias, value_weight = operands
    projected = grouped(patches, key_weight)
    keys, mu, rstd = torch.native_layer_norm(projected, projected.shape[-1:], key_gain, key_bias, EPS)
    logits = centers @ keys.mT  # (B, L, N)
    if noise is None:
        noisy = logits
    elif noise.is_floating_point():
        noisy = logits + noise
    else:
        noisy = logits + gumbel(noise, *logits.shape)
    soft = (noisy / tau).softmax(dim=1)
    one_hot = torch.zeros_like(soft).scatter_(1, soft.argmax(dim=1, keepdim=True), 1.0)
    hard = one_hot - soft + soft
    count = hard.sum(dim=-1, keepdim=True)  # (B, L, 1), before the clamp
    # The value projection is linear: average L rows first, then project L rows instead of N.
    mean = (hard @ patches) / count.clamp(min=1.0)  # (B, L, D)
    moments = torch.stack([mu, rstd]).squeeze(-1)
    return grouped(mean, value_weight), logits, hard, soft, mean, moments


def backward(
    grads: Sequence[Tensor], operands: Sequence[Tensor], found: Sequence[Tensor], tau: float
) -> tuple[Tensor, ...]:
    """Gradients of centers, patches, key weight, gain and bias, value weight."""
    d_pooled, d_logits, d_hard = grads
    centers, patches, key_weight, key_gain, key_bias, value_weight = operands
    _, hard, soft, mean, moments = found
    count = hard.sum(dim=-1, keepdim=True)  # (B, L, 1)
    # pooled = project(mean), mean = (hard patches) / max(count, 1)
    d_mean, d_value_weight = grouped_backward(mean, value_weight, d_pooled)
    d_sum = d_mean / count.clamp(min=1.0)  # (B, L, D)
    d_count = -(d_sum * mean).sum(dim=-1, keepdim=True) * (count >= 1.0)
    d_soft = d_hard + d_sum @ patches.mT + d_count  # straight-through: the gradient of hard goes to soft
    # soft = softmax((logits + noise) / tau) over the centers
    d_noisy = soft * (d_soft - (soft * d_soft).sum(dim=1, keepdim=True))
    d_scores = d_logits + d_noisy / tau  # (B, L, N)
    # logits = centers keys^T, keys = LayerNorm(projected)
    projected = grouped(patches, key_weight)
    mu, rstd = moments[:, :, :, None]  # (B, N, 1) each
    normed = (projected - mu) * rstd * key_gain + key_bias
    d_projected, d_gain, d_bias = torch.ops.aten.native_layer_norm_backward(
        d_scores.mT @ centers,
        projected,
        projected.shape[-1:],
        mu,
        rstd,
        key_gain,
        key_bias,
        [True, True, True],
    )
    d_patches, d_key_weight = grouped_backward(patches, key_weight, d_projected)
    d_patches = d_patches + hard.mT @ d_sum
    return d_scores @ normed, d_patches, d_key_weight, d_gain, d_bias, d_value_weight


def grouped(x: Tensor, weight: Tensor) -> Tensor:
    """Grouped 1x1 projection of (B, M, D) rows by (D, D / G): (B, M, D)."""
    width = weight.shape[1]
    rows = x.unflatten(-1, (-1, width))  # (B, M, G, D / G)
    return torch.einsum("bmgi,goi->bmgo", rows, weight.unflatten(0, (-1, width))).flatten(2)


def grouped_backward(x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `grouped` for x and weight."""
    width = weight.shape[1]
    blocks = weight.unflatten(0, (-1, width))  # (G, out, in)
    grad = grad.unflatten(-1, (-1, width))
    d_x = torch.einsum("bmgo,goi->bmgi", grad, blocks).flatten(2)
    d_weight = torch.einsum("bmgo,bmgi->goi", grad, x.unflatten(-1, (-1, width))).flatten(0, 1)
    return d_x, d_weight
