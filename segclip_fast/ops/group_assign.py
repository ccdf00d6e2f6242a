"""Gumbel assignment of patches to centers and masked mean pooling (paper Section 2.3, Eq. 2-3).

Shapes: B batch, L centers, N patches, D width, G groups of the 1x1 key and value projections.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._dispatch import Backend, accept, select

EPS = 1e-5  # of the key LayerNorm


@dataclass(frozen=True)
class GroupAssignment:
    """What grouping yields.

    Attributes:
        pooled: (B, L, D) mean of the values of each center's patches; 0 for an empty center.
        logits: (B, L, N) center-patch scores, clean (no noise, no temperature).
        hard: (B, L, N) one-hot over the centers; its gradient is that of the soft assignment.
    """

    pooled: Tensor
    logits: Tensor
    hard: Tensor


def group_assign(
    centers: Tensor,
    patches: Tensor,
    key_weight: Tensor,
    key_gain: Tensor,
    key_bias: Tensor,
    value_weight: Tensor,
    noise: Tensor | None = None,
    tau: float = 1.0,
) -> GroupAssignment:
    """Assign every patch to one center and average the values of each center's patches.

    keys K = LayerNorm(grouped 1x1 projection of the patches), logits A = centers K^T (unscaled), soft
    assignment softmax((A + noise) / tau) over the centers, hard assignment its one-hot arg max with the soft
    one's gradient (straight-through), pooled = hard V / max(count, 1). The count is differentiated as well.

    Args:
        centers: (B, L, D) contextual centers.
        patches: (B, N, D) normalised patch tokens.
        key_weight: (D, D / G) grouped 1x1 projection; output channel o sees the D / G inputs of its group.
        key_gain: (D,) gain of the key LayerNorm.
        key_bias: (D,) bias of the key LayerNorm.
        value_weight: (D, D / G) grouped 1x1 projection of the values, no norm.
        noise: (B, L, N) Gumbel(0, 1) noise in training; None assigns by the clean logits.
        tau: temperature, positive. Training 0.9; inference 1.

    Returns:
        GroupAssignment(pooled (B, L, D), logits (B, L, N), hard (B, L, N)).

    Raises:
        ValueError: shapes do not fit, or tau is not positive.
    """
    _check(centers, patches, key_weight, key_gain, key_bias, value_weight, noise, tau)
    tensors = [centers, patches, key_weight, value_weight]
    backend = select("group_assign", BACKENDS, tensors)
    return backend.run(centers, patches, key_weight, key_gain, key_bias, value_weight, noise, tau)


def group_assign_ref(
    centers: Tensor,
    patches: Tensor,
    key_weight: Tensor,
    key_gain: Tensor,
    key_bias: Tensor,
    value_weight: Tensor,
    noise: Tensor | None = None,
    tau: float = 1.0,
) -> GroupAssignment:
    """Plain-PyTorch twin of `group_assign`, the specification: the paper's formulas op by op."""
    groups = patches.shape[-1] // key_weight.shape[1]
    channels_first = patches.mT  # (B, D, N)
    keys = F.conv1d(channels_first, key_weight[:, :, None], groups=groups).mT
    keys = F.layer_norm(keys, keys.shape[-1:], key_gain, key_bias, EPS)  # (B, N, D)
    values = F.conv1d(channels_first, value_weight[:, :, None], groups=groups).mT  # (B, N, D)

    logits = centers @ keys.mT  # (B, L, N)
    noisy = logits if noise is None else logits + noise
    soft = (noisy / tau).softmax(dim=1)
    one_hot = torch.zeros_like(soft).scatter_(1, soft.argmax(dim=1, keepdim=True), 1.0)
    hard = one_hot - soft.detach() + soft  # straight-through
    count = hard.sum(dim=-1, keepdim=True).clamp(min=1.0)  # (B, L, 1)
    return GroupAssignment(hard @ values / count, logits, hard)


def _check(
    centers: Tensor,
    patches: Tensor,
    key_weight: Tensor,
    key_gain: Tensor,
    key_bias: Tensor,
    value_weight: Tensor,
    noise: Tensor | None,
    tau: float,
) -> None:
    if patches.ndim != 3:
        raise ValueError(f"patches: expected (B, N, D), got shape {tuple(patches.shape)}")
    B, N, D = patches.shape
    if centers.ndim != 3 or centers.shape[0] != B or centers.shape[2] != D:
        raise ValueError(f"centers: expected ({B}, L, {D}), got shape {tuple(centers.shape)}")
    for name, weight in (("key_weight", key_weight), ("value_weight", value_weight)):
        if weight.ndim != 2 or weight.shape[0] != D or D % weight.shape[1]:
            raise ValueError(f"{name}: expected ({D}, {D} / groups), got shape {tuple(weight.shape)}")
    for name, vector in (("key_gain", key_gain), ("key_bias", key_bias)):
        if vector.shape != (D,):
            raise ValueError(f"{name}: expected ({D},), got shape {tuple(vector.shape)}")
    if noise is not None and noise.shape != (B, centers.shape[1], N):
        raise ValueError(f"noise: expected ({B}, {centers.shape[1]}, {N}), got shape {tuple(noise.shape)}")
    if tau <= 0:
        raise ValueError(f"tau: expected a positive number, got {tau}")


# --- fused: one registered op forward, one backward; CPU here, other devices register their own


def _fused(
    centers: Tensor,
    patches: Tensor,
    key_weight: Tensor,
    key_gain: Tensor,
    key_bias: Tensor,
    value_weight: Tensor,
    noise: Tensor | None,
    tau: float,
) -> GroupAssignment:
    pooled, logits, hard, _, _ = torch.ops.segclip_fast.group_assign(
        centers, patches, key_weight, key_gain, key_bias, value_weight, noise, tau
    )
    return GroupAssignment(pooled, logits, hard)


def _grouped(x: Tensor, weight: Tensor) -> Tensor:
    """Grouped 1x1 projection of (B, M, D) rows by (D, D / G): (B, M, D)."""
    width = weight.shape[1]
    rows = x.unflatten(-1, (-1, width))  # (B, M, G, D / G)
    return torch.einsum("bmgi,goi->bmgo", rows, weight.unflatten(0, (-1, width))).flatten(2)


def _grouped_backward(x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `_grouped` for x and weight."""
    width = weight.shape[1]
    blocks = weight.unflatten(0, (-1, width))  # (G, out, in)
    grad = grad.unflatten(-1, (-1, width))
    d_x = torch.einsum("bmgo,goi->bmgi", grad, blocks).flatten(2)
    d_weight = torch.einsum("bmgo,bmgi->goi", grad, x.unflatten(-1, (-1, width))).flatten(0, 1)
    return d_x, d_weight


def _forward_cpu(
    centers: Tensor,
    patches: Tensor,
    key_weight: Tensor,
    key_gain: Tensor,
    key_bias: Tensor,
    value_weight: Tensor,
    noise: Tensor | None,
    tau: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    keys = F.layer_norm(_grouped(patches, key_weight), patches.shape[-1:], key_gain, key_bias, EPS)
    logits = centers @ keys.mT  # (B, L, N)
    soft = ((logits if noise is None else logits + noise) / tau).softmax(dim=1)
    one_hot = torch.zeros_like(soft).scatter_(1, soft.argmax(dim=1, keepdim=True), 1.0)
    hard = one_hot - soft + soft
    count = hard.sum(dim=-1, keepdim=True)  # (B, L, 1), before the clamp
    # The value projection is linear: average L rows first, then project L rows instead of N.
    mean = (hard @ patches) / count.clamp(min=1.0)  # (B, L, D)
    return _grouped(mean, value_weight), logits, hard, soft, mean


def _forward_fake(
    centers: Tensor,
    patches: Tensor,
    key_weight: Tensor,
    key_gain: Tensor,
    key_bias: Tensor,
    value_weight: Tensor,
    noise: Tensor | None,
    tau: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    shape = (centers.shape[0], centers.shape[1], patches.shape[1])
    maps = [centers.new_empty(shape) for _ in range(3)]
    rows = [centers.new_empty(centers.shape) for _ in range(2)]
    return rows[0], maps[0], maps[1], maps[2], rows[1]


def _backward_cpu(
    d_pooled: Tensor,
    d_logits: Tensor,
    d_hard: Tensor,
    centers: Tensor,
    patches: Tensor,
    key_weight: Tensor,
    key_gain: Tensor,
    key_bias: Tensor,
    value_weight: Tensor,
    hard: Tensor,
    soft: Tensor,
    mean: Tensor,
    tau: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    count = hard.sum(dim=-1, keepdim=True)  # (B, L, 1)
    # pooled = project(mean), mean = (hard patches) / max(count, 1)
    d_mean, d_value_weight = _grouped_backward(mean, value_weight, d_pooled)
    d_sum = d_mean / count.clamp(min=1.0)  # (B, L, D)
    d_count = -(d_sum * mean).sum(dim=-1, keepdim=True) * (count >= 1.0)
    d_soft = d_hard + d_sum @ patches.mT + d_count  # straight-through: the gradient of hard goes to soft
    # soft = softmax((logits + noise) / tau) over the centers
    d_noisy = soft * (d_soft - (soft * d_soft).sum(dim=1, keepdim=True))
    d_scores = d_logits + d_noisy / tau  # (B, L, N)
    # logits = centers keys^T, keys = LayerNorm(projected)
    projected = _grouped(patches, key_weight)
    normed, mu, rstd = torch.native_layer_norm(projected, projected.shape[-1:], key_gain, key_bias, EPS)
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
    d_patches, d_key_weight = _grouped_backward(patches, key_weight, d_projected)
    d_patches = d_patches + hard.mT @ d_sum
    return d_scores @ normed, d_patches, d_key_weight, d_gain, d_bias, d_value_weight


def _backward_fake(
    d_pooled: Tensor,
    d_logits: Tensor,
    d_hard: Tensor,
    centers: Tensor,
    patches: Tensor,
    key_weight: Tensor,
    key_gain: Tensor,
    key_bias: Tensor,
    value_weight: Tensor,
    hard: Tensor,
    soft: Tensor,
    mean: Tensor,
    tau: float,
) -> tuple[Tensor, ...]:
    inputs = (centers, patches, key_weight, key_gain, key_bias, value_weight)
    return tuple(tensor.new_empty(tensor.shape) for tensor in inputs)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, _, tau = inputs
    _, _, hard, soft, mean = output
    ctx.mark_non_differentiable(soft, mean)
    ctx.save_for_backward(*tensors, hard, soft, mean)
    ctx.tau = tau


def _autograd(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    d_pooled, d_logits, d_hard = grads[:3]
    found = torch.ops.segclip_fast.group_assign_backward(d_pooled, d_logits, d_hard, *saved, ctx.tau)
    return (*found, None, None)


_OPERANDS = (
    "Tensor centers, Tensor patches, Tensor key_weight, Tensor key_gain, Tensor key_bias, Tensor value_weight"
)
_library = torch.library.Library("segclip_fast", "FRAGMENT")
_library.define(
    f"group_assign({_OPERANDS}, Tensor? noise, float tau) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    f"group_assign_backward(Tensor d_pooled, Tensor d_logits, Tensor d_hard, {_OPERANDS}, Tensor hard, "
    "Tensor soft, Tensor mean, float tau) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("group_assign", _forward_cpu, "CPU")
_library.impl("group_assign_backward", _backward_cpu, "CPU")
torch.library.register_fake("segclip_fast::group_assign", _forward_fake, lib=_library)
torch.library.register_fake("segclip_fast::group_assign_backward", _backward_fake, lib=_library)
torch.library.register_autograd(
    "segclip_fast::group_assign", _autograd, setup_context=_setup_context, lib=_library
)


def _refuse_fused(tensors: Sequence[Tensor]) -> str | None:
    device = tensors[0].device.type
    return None if device == "cpu" else f"implemented for cpu, inputs are on {device}"


BACKENDS = (Backend("fused", _fused, _refuse_fused), Backend("reference", group_assign_ref, accept))
