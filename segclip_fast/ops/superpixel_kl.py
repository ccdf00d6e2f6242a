"""Superpixel consistency: symmetric KL between patch assignments and their superpixel means (paper Eq. 5-6).

Shapes: B batch, N patches, L centers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import KLForm
from ._dispatch import Backend, accept, select

FORMS = ("paper", "official")


def superpixel_kl(labels: Tensor, assignment: Tensor, form: KLForm = "paper") -> Tensor:
    """Loss that pulls the assignments of one superpixel's patches together.

    "paper": P_j = softmax(M_j) over the centers, Q_j the mean of P over the patches of j's superpixel,
    loss = 1/(2N) sum_j [KL(P_j || Q_j) + KL(Q_j || P_j)], mean over the batch (Eq. 5-6).
    "official" (the released code): Q_j = softmax(mean of M over the superpixel), divided by 2 B N L instead.
    Neither side is detached. O(B N L) time and memory.

    Args:
        labels: (B, N) integers, the superpixel of each patch; any values.
        assignment: (B, N, L) floating-point assignment M of patches to centers (straight-through one-hot).
        form: "paper" or "official".

    Returns:
        () loss, dtype of assignment.

    Raises:
        ValueError: shapes do not fit, labels are not integers, or an unknown form.
    """
    if labels.ndim != 2 or labels.is_floating_point():
        raise ValueError(f"labels: expected (B, N) integers, got {tuple(labels.shape)} {labels.dtype}")
    if assignment.ndim != 3 or assignment.shape[:2] != labels.shape:
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


# --- fused: segment sums instead of the equality matrix


def _fused(labels: Tensor, assignment: Tensor, form: KLForm) -> Tensor:
    return torch.ops.segclip_fast.superpixel_kl(labels, assignment, form == "official")[0]


def _segments(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Rank of each label within its row (B, N), 0 to N - 1, and the size of its segment (B, N, 1)."""
    ordered, order = labels.sort(dim=1)
    starts = torch.zeros_like(ordered)
    starts[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]).to(ordered.dtype)
    ranks = torch.empty_like(ordered).scatter_(1, order, starts.cumsum(dim=1)).to(torch.int64)
    sizes = torch.zeros_like(ranks).scatter_add_(1, ranks, torch.ones_like(ranks))
    return ranks, sizes.gather(1, ranks)[:, :, None]


def _segment_mean(x: Tensor, ranks: Tensor, sizes: Tensor) -> Tensor:
    """Mean of x (B, N, L) over each row's segment, at every patch; its own transpose."""
    index = ranks[:, :, None].expand(x.shape)
    sums = torch.zeros_like(x).scatter_add_(1, index, x)
    return sums.gather(1, index) / sizes


def _kl_cpu(labels: Tensor, assignment: Tensor, official: bool) -> tuple[Tensor, Tensor]:
    """Loss and its gradient with respect to the assignment in one pass."""
    B, N, L = assignment.shape
    ranks, sizes = _segments(labels)
    log_p = assignment.log_softmax(dim=-1)
    p = log_p.exp()
    if official:
        log_q = _segment_mean(assignment, ranks, sizes).log_softmax(dim=-1)
        q = log_q.exp()
    else:
        q = _segment_mean(p, ranks, sizes)
        log_q = q.log()
    # KL(p || q) + KL(q || p) = sum (p - q)(log p - log q)
    gap, log_gap = p - q, log_p - log_q
    scale = 1.0 / (2 * B * N * (L if official else 1))
    loss = (gap * log_gap).sum() * scale
    if official:
        d_mean = -gap - q * (log_gap - (q * log_gap).sum(dim=-1, keepdim=True))
        d_direct = gap + p * (log_gap - (p * log_gap).sum(dim=-1, keepdim=True))
        grad = d_direct + _segment_mean(d_mean, ranks, sizes)
    else:
        d_p = log_gap + gap / p + _segment_mean(-log_gap - gap / q, ranks, sizes)
        grad = p * (d_p - (p * d_p).sum(dim=-1, keepdim=True))
    return loss, grad * scale


def _kl_fake(labels: Tensor, assignment: Tensor, official: bool) -> tuple[Tensor, Tensor]:
    return assignment.new_empty(()), assignment.new_empty(assignment.shape)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


def _autograd(ctx: Any, d_loss: Tensor, _: Tensor) -> tuple[None, Tensor, None]:
    (grad,) = ctx.saved_tensors
    return None, grad * d_loss, None


_library = torch.library.Library("segclip_fast", "FRAGMENT")
_library.define(
    "superpixel_kl(Tensor labels, Tensor assignment, bool official) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("superpixel_kl", _kl_cpu, "CPU")
torch.library.register_fake("segclip_fast::superpixel_kl", _kl_fake, lib=_library)
torch.library.register_autograd(
    "segclip_fast::superpixel_kl", _autograd, setup_context=_setup_context, lib=_library
)


def _refuse_fused(tensors: Sequence[Tensor]) -> str | None:
    device = tensors[0].device.type
    return None if device == "cpu" else f"implemented for cpu, inputs are on {device}"


BACKENDS = (Backend("fused", _fused, _refuse_fused), Backend("reference", superpixel_kl_ref, accept))
