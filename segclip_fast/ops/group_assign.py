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

from . import group_assign_fused
from ._dispatch import Backend, accept, refuse_triton, select
from .group_assign_fused import EPS
from .gumbel import gumbel


@dataclass(frozen=True)
class GroupAssignment:
    """What grouping yields.

    Attributes:
        pooled: (B, L, D) mean of the values of each center's patches; 0 for an empty center. Dtype of the
            centers.
        logits: (B, L, N) center-patch scores, clean (no noise, no temperature); float32, or float64.
        hard: (B, L, N) one-hot over the centers, dtype of the logits; its gradient is that of the soft
            assignment.
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
        noise: in training (B, L, N) Gumbel(0, 1) noise, or a (2,) int64 seed from which every backend makes
            the same noise (`ops.gumbel`, inside the kernel on CUDA); None assigns by the clean logits.
        tau: temperature, positive. Training 0.9; inference 1.

    Returns:
        GroupAssignment(pooled (B, L, D), logits (B, L, N), hard (B, L, N)).

    Raises:
        ValueError: shapes do not fit, or tau is not positive.
    """
    _check(centers, patches, key_weight, key_gain, key_bias, value_weight, noise, tau)
    if patches.is_cuda and torch.is_autocast_enabled("cuda"):
        # The one large operand in half precision; centers, norm and maps stay in float32.
        patches = patches.to(torch.get_autocast_dtype("cuda"))
    tensors = [centers, patches, key_weight, value_weight]
    backend = select("group_assign", BACKENDS, tensors if noise is None else [*tensors, noise])
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
    keys = F.layer_norm(keys.to(key_gain.dtype), keys.shape[-1:], key_gain, key_bias, EPS)  # (B, N, D)
    values = F.conv1d(channels_first, value_weight[:, :, None], groups=groups).mT  # (B, N, D)

    logits = centers @ keys.mT  # (B, L, N)
    if noise is None:
        noisy = logits
    else:
        noisy = logits + (noise if noise.is_floating_point() else gumbel(noise, *logits.shape))
    soft = (noisy / tau).softmax(dim=1, dtype=torch.promote_types(noisy.dtype, torch.float32))
    one_hot = torch.zeros_like(soft).scatter_(1, soft.argmax(dim=1, keepdim=True), 1.0)
    hard = one_hot - soft.detach() + soft  # straight-through
    count = hard.sum(dim=-1, keepdim=True).clamp(min=1.0)  # (B, L, 1)
    pooled = hard.to(values.dtype) @ values / count
    return GroupAssignment(pooled.to(centers.dtype), logits.to(hard.dtype), hard)


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
    if noise is not None:
        kind = (B, centers.shape[1], N) if noise.is_floating_point() else (2,)
        if noise.shape != kind or noise.dtype in (torch.int32, torch.bool):
            raise ValueError(
                f"noise: expected ({B}, {centers.shape[1]}, {N}) floating point or a (2,) int64 seed, "
                f"got {tuple(noise.shape)} {noise.dtype}"
            )
    if tau <= 0:
        raise ValueError(f"tau: expected a positive number, got {tau}")


# --- one registered op forward, one backward, for PyTorch's operations and for the Triton kernels


def _fused(*operands: Any) -> GroupAssignment:
    return _registered(*operands, triton=False)


def _triton(*operands: Any) -> GroupAssignment:
    return _registered(*operands, triton=True)


def _registered(*operands: Any, triton: bool) -> GroupAssignment:
    pooled, logits, hard, *_ = torch.ops.segclip_fast.group_assign(*operands, triton)
    return GroupAssignment(pooled, logits, hard)


def _working(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _forward(
    centers: Tensor,
    patches: Tensor,
    key_weight: Tensor,
    key_gain: Tensor,
    key_bias: Tensor,
    value_weight: Tensor,
    noise: Tensor | None,
    tau: float,
    triton: bool,
) -> tuple[Tensor, ...]:
    operands = (centers, patches, key_weight, key_gain, key_bias, value_weight)
    with torch.autocast(patches.device.type, enabled=False):
        if triton:
            from ..kernels import group_assign as kernels

            pooled, *rest = kernels.forward(*operands, noise, tau, EPS)
        else:
            dtype = _working(patches.dtype)
            pooled, *rest = group_assign_fused.forward([t.to(dtype) for t in operands], noise, tau)
    return pooled.to(centers.dtype), *rest


def _forward_fake(
    centers: Tensor,
    patches: Tensor,
    key_weight: Tensor,
    key_gain: Tensor,
    key_bias: Tensor,
    value_weight: Tensor,
    noise: Tensor | None,
    tau: float,
    triton: bool,
) -> tuple[Tensor, ...]:
    B, L, _ = centers.shape
    N, dtype = patches.shape[1], _working(patches.dtype)
    maps = [centers.new_empty((B, L, N), dtype=dtype) for _ in range(3)]
    mean = centers.new_empty(centers.shape, dtype=dtype)
    return centers.new_empty(centers.shape), *maps, mean, centers.new_empty((2, B, N), dtype=dtype)


def _backward(
    grads: Sequence[Tensor],
    operands: Sequence[Tensor],
    found: Sequence[Tensor],
    tau: float,
    triton: bool,
) -> list[Tensor]:
    with torch.autocast(operands[0].device.type, enabled=False):
        if triton:
            from ..kernels import group_assign_backward as kernels

            results: Sequence[Tensor] = kernels.backward(grads, operands, found, tau)
        else:
            dtype = found[0].dtype
            grads = [t.to(dtype) for t in grads]
            wide = [t.to(dtype) for t in operands]
            results = group_assign_fused.backward(grads, wide, found, tau)
    return [result.to(operand.dtype) for result, operand in zip(results, operands, strict=True)]


def _backward_fake(
    grads: Sequence[Tensor],
    operands: Sequence[Tensor],
    found: Sequence[Tensor],
    tau: float,
    triton: bool,
) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor in operands]


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    *operands, _, tau, triton = inputs
    _, *found = output
    ctx.mark_non_differentiable(*found[2:])
    ctx.save_for_backward(*operands, *found)
    ctx.tau, ctx.triton = tau, triton


def _autograd(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    saved = list(ctx.saved_tensors)
    found = torch.ops.segclip_fast.group_assign_backward(
        list(grads[:3]), saved[:6], saved[6:], ctx.tau, ctx.triton
    )
    return (*found, None, None, None)


_library = torch.library.Library("segclip_fast", "FRAGMENT")
_library.define(
    "group_assign(Tensor centers, Tensor patches, Tensor key_weight, Tensor key_gain, Tensor key_bias, "
    "Tensor value_weight, Tensor? noise, float tau, bool triton) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "group_assign_backward(Tensor[] grads, Tensor[] operands, Tensor[] found, float tau, bool triton) "
    "-> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("group_assign", _forward, "CompositeExplicitAutograd")
_library.impl("group_assign_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("segclip_fast::group_assign", _forward_fake, lib=_library)
torch.library.register_fake("segclip_fast::group_assign_backward", _backward_fake, lib=_library)
torch.library.register_autograd(
    "segclip_fast::group_assign", _autograd, setup_context=_setup_context, lib=_library
)


def _refuse_triton(tensors: Sequence[Tensor]) -> str | None:
    reason = refuse_triton(tensors)
    if reason is not None or len(tensors) == 1:  # one tensor: asked in general, by `segclip_fast.info`
        return reason
    from ..kernels.group_assign import refuse

    centers, _, key_weight, *_ = tensors
    return refuse(centers.shape[1], key_weight.shape[1])


BACKENDS = (
    Backend("triton", _triton, _refuse_triton),
    Backend("fused", _fused, accept),
    Backend("reference", group_assign_ref, accept),
)
