"""Attention over sequences of different lengths laid end to end, without computing on padding.

Shapes: B sequences, total tokens of all of them, H heads, d head width.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _autotune
from ._autotune import Candidate
from ._dispatch import Backend, accept, select
from .attention import HALF, attention_ref, autocast, refuse_xformers, xformers_ops


def attention_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    longest: int,
    causal: bool = False,
    *,
    lengths: Sequence[int] | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, per head, where each sequence attends to itself only.

    Sequence b is rows starts[b] to starts[b + 1] - 1; it may be empty. No call waits for the device: what is
    in `starts` is checked on the CPU only, and on CUDA wrong values give wrong results.

    Args:
        q: (total, H, d) queries, floating point.
        k: (total, H, d) keys.
        v: (total, H, d) values.
        starts: (B + 1,) int32, 0 to total without decreasing, on q's device.
        longest: at least every length, at least 1; a number of the host.
        causal: a query sees keys up to its own position only.
        lengths: B numbers of the host, the same as starts.diff(); with them xformers can be used too.

    Returns:
        (total, H, d), dtype of q; under autocast its dtype.

    Raises:
        ValueError: shapes, dtypes or values do not fit.
    """
    _check(q, k, v, starts, longest)
    _check_lengths(q, starts, longest, lengths)
    q, k, v = autocast(q, k, v)
    backend = select("attention_packed", BACKENDS, [q, k, v, starts])
    return backend.run(q, k, v, starts, longest, causal, lengths)


def attention_packed_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    longest: int,
    causal: bool = False,
    lengths: Sequence[int] | None = None,
) -> Tensor:
    """Plain-PyTorch twin of `attention_packed`, the specification: one sequence after the other."""
    parts = [x.split(starts.diff().tolist()) for x in (q, k, v)]
    outs = [attention_ref(q[None], k[None], v[None], causal)[0] for q, k, v in zip(*parts, strict=True)]
    return torch.cat(outs)


def _check(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int) -> None:
    if q.ndim != 3:
        raise ValueError(f"q: expected (total, H, d), got shape {tuple(q.shape)}")
    if k.shape != q.shape or v.shape != q.shape:
        raise ValueError(
            f"k, v: expected the shape of q {tuple(q.shape)}, got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if starts.ndim != 1 or starts.shape[0] < 2 or starts.dtype != torch.int32 or starts.device != q.device:
        raise ValueError(
            f"starts: expected (B + 1,) int32 on {q.device}, "
            f"got {tuple(starts.shape)} {starts.dtype} on {starts.device}"
        )
    if not isinstance(longest, (int, torch.SymInt)) or longest < 1:
        raise ValueError(f"longest: expected an integer of at least 1, got {longest!r}")


def _check_lengths(q: Tensor, starts: Tensor, longest: int, lengths: Sequence[int] | None) -> None:
    """What can be checked of the values without waiting for a device."""
    if torch.compiler.is_compiling():
        return
    total, B = q.shape[0], starts.shape[0] - 1
    if lengths is not None and (len(lengths) != B or sum(lengths) != total or not _within(lengths, longest)):
        raise ValueError(
            f"lengths: expected {B} numbers from 0 to longest = {longest}, {total} in all, got {lengths}"
        )
    if type(starts) is Tensor and starts.device.type == "cpu":
        inside = starts.tolist()
        steps = starts.diff().tolist()
        if inside[0] != 0 or inside[-1] != total or not _within(steps, longest):
            raise ValueError(
                f"starts: expected 0 to {total} in steps from 0 to longest = {longest}, got {inside}"
            )
        if lengths is not None and list(lengths) != steps:
            raise ValueError(f"lengths: expected those of starts, {steps}, got {lengths}")


def _within(lengths: Sequence[int], longest: int) -> bool:
    return min(lengths) >= 0 and max(lengths) <= longest


# --- fused: the padded form, or the kernel measured to be the fastest


def _fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    longest: int,
    causal: bool,
    lengths: Sequence[int] | None,
) -> Tensor:
    if not _autotune.applies(q):
        return _padded(q, k, v, starts, longest, causal)
    arguments: dict[str, Any] = {"q": q, "k": k, "v": v, "starts": starts, "longest": longest}
    arguments |= {"causal": causal, "lengths": lengths}
    # Sizes that change with every batch count up to the next power of two, or every batch would be timed.
    sizes = [(size - 1).bit_length() for size in (len(q), len(starts) - 1, longest)]
    key = (_autotune.signature(q, k, v, skip=1), *sizes, causal, lengths is None)
    winner = _autotune.pick("attention_packed", key, CANDIDATES, arguments)
    return (_padded if winner is None else winner.run)(**arguments)


def _padded(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, causal: bool, **_: Any) -> Tensor:
    return torch.ops.segclip_fast.attention_packed(q, k, v, starts, longest, causal)


def _padded_impl(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, causal: bool = False
) -> Tensor:
    """One sequence a row of a padded batch, PyTorch's own choice of kernel, and back."""
    B = starts.shape[0] - 1
    tokens = torch.arange(q.shape[0], device=q.device, dtype=starts.dtype)  # (total,)
    sequence = torch.searchsorted(starts[1:], tokens, right=True)  # (total,), which sequence a token is of
    row = sequence * longest + (tokens - starts[sequence])  # (total,), its place in the padded batch

    def pad(x: Tensor) -> Tensor:
        rows = x.new_zeros(B * longest, x.shape[1], x.shape[2])
        return rows.index_copy(0, row, x).unflatten(0, (B, longest))  # (B, longest, H, d)

    # Causal: what lies beyond the end of a sequence comes after its queries and is hidden already.
    # Otherwise it is hidden by length, of which an empty sequence gets 1: attention takes no 0.
    lengths = None if causal else starts.diff().clamp(min=1)
    out = torch.ops.segclip_fast.attention(pad(q), pad(k), pad(v), causal, lengths)
    return out.flatten(0, 1).index_select(0, row)


# Composite, as attention: autograd, torch.compile and autocast see the PyTorch operations inside.
_library = torch.library.Library("segclip_fast", "FRAGMENT")
_library.define(
    "attention_packed(Tensor q, Tensor k, Tensor v, Tensor starts, SymInt longest, bool causal=False)"
    " -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("attention_packed", _padded_impl, "CompositeImplicitAutograd")

BACKENDS = (Backend("fused", _fused, accept), Backend("reference", attention_packed_ref, accept))


# --- candidates on CUDA


@functools.cache
def _varlen_attn() -> tuple[Any, str | None]:
    """PyTorch's attention for packed sequences and None, or None and why it is missing."""
    try:
        return importlib.import_module("torch.nn.attention.varlen").varlen_attn, None
    except (ImportError, AttributeError) as error:
        return None, f"this PyTorch has no torch.nn.attention.varlen.varlen_attn ({error})"


@functools.cache
def _causal_by_flag() -> bool:
    """Whether varlen_attn has is_causal (PyTorch 2.10); later ones take a window that ends at the query."""
    return "is_causal" in inspect.signature(_varlen_attn()[0]).parameters


def _varlen(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, causal: bool, **_: Any) -> Tensor:
    mask: dict[str, Any] = {}
    if causal:
        mask = {"is_causal": True} if _causal_by_flag() else {"window_size": (-1, 0)}
    return _varlen_attn()[0](q, k, v, starts, starts, longest, longest, **mask)


def _refuse_varlen(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> str | None:
    width = q.shape[-1]
    if not q.is_cuda:
        return f"runs on cuda, inputs are on {q.device.type}"
    if q.dtype not in HALF:
        return f"takes float16 and bfloat16, inputs are {q.dtype}"
    if width % 8 or width > 256:
        return f"takes head widths that are multiples of 8 up to 256, got {width}"
    if any(x.stride(-1) != 1 for x in (q, k, v)):
        return f"needs dense rows, last strides are {[x.stride(-1) for x in (q, k, v)]}"
    capability = torch.cuda.get_device_capability(q.device)
    if capability < (8, 0):
        return f"needs compute capability 8.0, the device has {capability[0]}.{capability[1]}"
    return _varlen_attn()[1]


@functools.lru_cache(maxsize=8)
def _block_mask(lengths: tuple[int, ...], causal: bool, device: torch.device) -> Any:
    """The mask of xformers; kept, because every layer of a batch asks for the same one."""
    masks = xformers_ops()[0].fmha.attn_bias
    kind = masks.BlockDiagonalCausalMask if causal else masks.BlockDiagonalMask
    with torch.inference_mode(False):  # kept beyond this call, it may serve training next
        return kind.from_seqlens(list(lengths), device=device)


def _xformers(q: Tensor, k: Tensor, v: Tensor, causal: bool, lengths: Sequence[int], **_: Any) -> Tensor:
    mask = _block_mask(tuple(lengths), causal, q.device)
    attend = xformers_ops()[0].memory_efficient_attention
    return attend(q[None], k[None], v[None], attn_bias=mask)[0]  # (1, total, H, d) inside


def _refuse_xformers(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int] | None, **_: Any) -> str | None:
    if q.is_cuda and lengths is None:
        return "needs the lengths on the host: pass `lengths`"
    return refuse_xformers(q, k, v)


def _refuse_padded(q: Tensor, **_: Any) -> str | None:
    return None if q.is_cuda else f"a candidate on cuda, inputs are on {q.device.type}"


CANDIDATES = (
    Candidate("varlen", _varlen, _refuse_varlen),
    Candidate("xformers", _xformers, _refuse_xformers),
    Candidate("padded", _padded, _refuse_padded),
)
