"""Superpixel consistency: symmetric KL between patch assignments and their superpixel means (paper Eq. 5-6).

Shapes: B batch, N patches, L centers.

Both forms are one covariance. Let P = softmax(M) over the centers, and a bar be the mean over the patches of
one superpixel. A patch's KL(P || Q) + KL(Q || P) is the sum of (P - Q)(log P - log Q) over the centers. There
P - Q sums to 0, so log P and log Q matter up to a constant over the centers: log P may become M. In
    "paper", Q = P_bar: over a superpixel P - Q sums to 0 and log Q is constant: log Q may become M_bar;
    "official", Q = softmax(M_bar): log Q may become M_bar, and as over a superpixel M - M_bar then sums to 0
        and Q is constant, P - Q may become P - P_bar.
Either way a superpixel contributes the sum of (P - P_bar) C with C = M - M_bar, and its gradient for M is
    P - P_bar + P (C - sum over the centers of P C).
The forms differ in their divisor alone. Two segment means are all there is to compute; no logarithm is taken,
and a P that rounds to 0 does no harm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import KLForm
from ._dispatch import Backend, accept, refuse_triton, select

FORMS = ("paper", "official")


def superpixel_kl(labels: Tensor, assignment: Tensor, form: KLForm = "paper") -> Tensor:
    """Loss that pulls the assignments of one superpixel's patches together.

    "paper": P_j = softmax(M_j) over the centers, Q_j the mean of P over the patches of j's superpixel,
    loss = 1/(2N) sum_j [KL(P_j || Q_j) + KL(Q_j || P_j)], mean over the batch (Eq. 5-6).
    "official" (the released code): Q_j = softmax(mean of M over the superpixel), divided by 2 B N L instead.
    Neither side is detached. Memory is O(B N L). The two are the same number but for the divisor.

    Args:
        labels: (B, N) integers, the superpixel of each patch; any values.
        assignment: (B, N, L) floating-point assignment M of patches to centers (straight-through one-hot), of
            any strides.
        form: "paper" or "official".

    Returns:
        () loss, fp32 for a half-precision assignment, else in its dtype; under autocast too. The reference
        back end alone keeps half precision.

    Raises:
        ValueError: shapes do not fit or are empty, labels are not integers, or an unknown form.
    """
    if labels.ndim != 2 or labels.is_floating_point():
        raise ValueError(f"labels: expected (B, N) integers, got {tuple(labels.shape)} {labels.dtype}")
    if assignment.ndim != 3 or assignment.shape[:2] != labels.shape or 0 in assignment.shape:
        raise ValueError(
            f"assignment: expected ({labels.shape[0]}, {labels.shape[1]}, L), got {tuple(assignment.shape)}"
        )
    if form not in FORMS:
        raise ValueError(f"form: expected one of {FORMS}, got {form!r}")
    return select("superpixel_kl", BACKENDS, [labels, assignment]).run(labels, assignment, form)


def superpixel_kl_ref(labels: Tensor, assignment: Tensor, form: KLForm = "paper") -> Tensor:
    """Plain-PyTorch twin of `superpixel_kl`, the specification, with an (N, N) equality matrix."""
    B, N, L = assignment.shape
    same = (labels[:, :, None] == labels[:, None, :]).to(assignment.dtype)  # (B, N, N)
    average = same / same.sum(dim=-1, keepdim=True)
    p = assignment.softmax(dim=-1)
    q = (average @ assignment).softmax(dim=-1) if form == "official" else average @ p
    divergence = (p * (p.log() - q.log())).sum() + (q * (q.log() - p.log())).sum()
    return divergence / (2 * B * N * (L if form == "official" else 1))


# --- one registered op, for PyTorch's operations and for the Triton kernel


def _fused(labels: Tensor, assignment: Tensor, form: KLForm) -> Tensor:
    return torch.ops.segclip_fast.superpixel_kl(labels, assignment, form == "official", False)[0]


def _triton(labels: Tensor, assignment: Tensor, form: KLForm) -> Tensor:
    return torch.ops.segclip_fast.superpixel_kl(labels, assignment, form == "official", True)[0]


# PyTorch does not sort these everywhere. Other numbers of the same bits are as distinct.
_SORTABLE = {
    torch.bool: torch.uint8,
    torch.uint16: torch.int16,
    torch.uint32: torch.int32,
    torch.uint64: torch.int64,
}


def _segments(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Rank of each label within its row (B, N), 0 to N - 1, and the size of its segment (B, N, 1)."""
    ordered, order = labels.view(_SORTABLE.get(labels.dtype, labels.dtype)).sort(dim=1)
    starts = torch.zeros_like(order)
    starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    ranks = torch.empty_like(order).scatter_(1, order, starts.cumsum(dim=1))
    sizes = torch.zeros_like(ranks).scatter_add_(1, ranks, torch.ones_like(ranks))
    return ranks, sizes.gather(1, ranks)[:, :, None]


def _segment_mean(x: Tensor, ranks: Tensor, sizes: Tensor) -> Tensor:
    """Mean of x (B, N, L) over each row's segment, at every patch."""
    index = ranks[:, :, None].expand(x.shape)
    sums = torch.zeros_like(x).scatter_add_(1, index, x)
    return sums.gather(1, index) / sizes


def _covariance(labels: Tensor, assignment: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Loss () and its gradient (B, N, L), contiguous."""
    M = assignment.contiguous()
    M = M - M.amax(dim=-1, keepdim=True)  # a constant over the centers; keeps the sums small
    p = M.softmax(dim=-1)
    ranks, sizes = _segments(labels)
    gap = p - _segment_mean(p, ranks, sizes)
    c = M - _segment_mean(M, ranks, sizes)
    loss = (gap * c).sum() * scale
    return loss, (gap + p * (c - (p * c).sum(dim=-1, keepdim=True))) * scale


def _working(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _kl(labels: Tensor, assignment: Tensor, official: bool, triton: bool) -> tuple[Tensor, Tensor]:
    """Loss () and its gradient (B, N, L) in one pass, both in the working dtype."""
    if triton:
        from ..kernels import superpixel_kl as kernels

        return kernels.superpixel_kl(labels, assignment, official)
    B, N, L = assignment.shape
    with torch.autocast(assignment.device.type, enabled=False):
        scale = 1.0 / (2 * B * N * (L if official else 1))
        return _covariance(labels, assignment.to(_working(assignment.dtype)), scale)


def _kl_fake(labels: Tensor, assignment: Tensor, official: bool, triton: bool) -> tuple[Tensor, Tensor]:
    dtype = _working(assignment.dtype)
    if triton:
        grad = torch.empty_like(assignment, dtype=dtype)
    else:
        grad = assignment.new_empty(assignment.shape, dtype=dtype)
    return assignment.new_empty((), dtype=dtype), grad


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])
    ctx.dtype = inputs[1].dtype


def _autograd(ctx: Any, d_loss: Tensor, _: Tensor) -> tuple[None, Tensor, None, None]:
    (grad,) = ctx.saved_tensors
    # Scaled in fp32: fp16 holds neither a gradient of order 1 / (2 B N) nor a loss scale of 65536.
    return None, (grad * d_loss).to(ctx.dtype), None, None


_library = torch.library.Library("segclip_fast", "FRAGMENT")
_library.define(
    "superpixel_kl(Tensor labels, Tensor assignment, bool official, bool triton) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("superpixel_kl", _kl, "CompositeExplicitAutograd")
torch.library.register_fake("segclip_fast::superpixel_kl", _kl_fake, lib=_library)
torch.library.register_autograd(
    "segclip_fast::superpixel_kl", _autograd, setup_context=_setup_context, lib=_library
)


def _refuse_triton(tensors: Sequence[Tensor]) -> str | None:
    reason = refuse_triton(tensors)
    if reason is not None or len(tensors) == 1:  # one tensor: asked in general, by `segclip_fast.info`
        return reason
    from ..kernels.superpixel_kl import refuse

    labels, assignment = tensors
    return refuse(labels, assignment)


BACKENDS = (
    Backend("triton", _triton, _refuse_triton),
    Backend("fused", _fused, accept),
    Backend("reference", superpixel_kl_ref, accept),
)
