"""Scaled dot-product attention behind one function.

Shapes: B batch, T queries, S keys, H heads, d head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._dispatch import Backend, accept, select


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, lengths: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, per head.

    Args:
        q: (B, T, H, d) queries, floating point.
        k: (B, S, H, d) keys.
        v: (B, S, H, d) values.
        causal: query t sees keys up to t only; needs T == S.
        lengths: (B,) integers, 1 to S: keys of sample b from lengths[b] on are hidden. None: all are seen.

    Returns:
        (B, T, H, d), dtype of q.

    Raises:
        ValueError: shapes do not fit.
    """
    _check(q, k, v, causal, lengths)
    tensors = [q, k, v] if lengths is None else [q, k, v, lengths]
    return select("attention", BACKENDS, tensors).run(q, k, v, causal, lengths)


def attention_ref(
    q: Tensor, k: Tensor, v: Tensor, causal: bool = False, lengths: Tensor | None = None
) -> Tensor:
    """Plain-PyTorch twin of `attention`, the specification."""
    logits = torch.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5  # (B, H, T, S)
    hidden = _hidden(q, k, causal, lengths)
    if hidden is not None:
        logits = logits.masked_fill(hidden, -torch.inf)
    return torch.einsum("bhts,bshd->bthd", logits.softmax(dim=-1), v)


def _hidden(q: Tensor, k: Tensor, causal: bool, lengths: Tensor | None) -> Tensor | None:
    """Which (query, key) pairs are masked: bool, broadcastable to (B, H, T, S), or None for none."""
    keys = torch.arange(k.shape[1], device=q.device)  # (S,)
    hidden = None
    if causal:
        hidden = (keys[None, :] > keys[:, None])[None, None]  # (1, 1, T, S)
    if lengths is not None:
        beyond = (keys[None, :] >= lengths[:, None])[:, None, None]  # (B, 1, 1, S)
        hidden = beyond if hidden is None else hidden | beyond
    return hidden


def _check(q: Tensor, k: Tensor, v: Tensor, causal: bool, lengths: Tensor | None) -> None:
    if q.ndim != 4:
        raise ValueError(f"q: expected (B, T, H, d), got shape {tuple(q.shape)}")
    if k.ndim != 4 or k.shape != v.shape or k.shape[::2] != q.shape[::2] or k.shape[3] != q.shape[3]:
        raise ValueError(
            f"k, v: expected (B, S, H, d) matching "
            f"q {tuple(q.shape)}, got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if causal and q.shape[1] != k.shape[1]:
        raise ValueError(f"causal: expected as many queries as keys, got {q.shape[1]} and {k.shape[1]}")
    if lengths is not None and (lengths.shape != q.shape[:1] or lengths.is_floating_point()):
        raise ValueError(
            f"lengths: expected ({q.shape[0]},) integers, got {tuple(lengths.shape)} {lengths.dtype}"
        )


def _sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool, lengths: Tensor | None) -> Tensor:
    """PyTorch's own choice among its kernels, on any device."""
    return torch.ops.segclip_fast.attention(q, k, v, causal, lengths)


def _sdpa_impl(
    q: Tensor, k: Tensor, v: Tensor, causal: bool = False, lengths: Tensor | None = None
) -> Tensor:
    hidden = None if lengths is None else _hidden(q, k, causal, lengths)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=None if hidden is None else ~hidden,
        is_causal=causal and hidden is None,
    )
    return out.transpose(1, 2)


# Composite: autograd, torch.compile and autocast see the PyTorch operations inside.
_library = torch.library.Library("segclip_fast", "FRAGMENT")
_library.define(
    "attention(Tensor q, Tensor k, Tensor v, bool causal=False, Tensor? lengths=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("attention", _sdpa_impl, "CompositeImplicitAutograd")

BACKENDS = (Backend("fused", _sdpa, accept), Backend("reference", attention_ref, accept))
