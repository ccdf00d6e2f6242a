"""Scaled dot-product attention behind one function.

On the CPU, and wherever a call is traced, captured or must be deterministic, PyTorch chooses among its own
kernels. On CUDA the candidates below are timed once per kind of input (`_autotune`).

Shapes: B batch, T queries, S keys, H heads, d head width.
"""

from __future__ import annotations

import functools
import importlib
import threading
from collections.abc import Hashable
from typing import Any

import torch
import torch.backends.cuda as kernels
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import _autotune
from ._autotune import Candidate
from ._dispatch import Backend, accept, select

HALF = (torch.float16, torch.bfloat16)


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, lengths: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, per head; the softmax is computed in at least float32.

    Args:
        q: (B, T, H, d) queries, floating point.
        k: (B, S, H, d) keys.
        v: (B, S, H, d) values.
        causal: query t sees keys up to t only; needs T == S.
        lengths: (B,) integers, 1 to S: keys of sample b from lengths[b] on are hidden. None: all are seen.

    Returns:
        (B, T, H, d), dtype of q; under autocast its dtype.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    _check(q, k, v, causal, lengths)
    q, k, v = autocast(q, k, v)
    tensors = [q, k, v] if lengths is None else [q, k, v, lengths]
    return select("attention", BACKENDS, tensors).run(q, k, v, causal, lengths)


def attention_ref(
    q: Tensor, k: Tensor, v: Tensor, causal: bool = False, lengths: Tensor | None = None
) -> Tensor:
    """Plain-PyTorch twin of `attention`, the specification."""
    logits = torch.einsum("bthd,bshd->bhts", q * q.shape[-1] ** -0.5, k)  # (B, H, T, S)
    hidden = _hidden(q, k, causal, lengths)
    if hidden is not None:
        logits = logits.masked_fill(hidden, -torch.inf)
    weights = logits.softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    return torch.einsum("bhts,bshd->bthd", weights.to(v.dtype), v)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype where it is on: as PyTorch's own attention, and for every kernel alike.

    Raises:
        ValueError: they are not of one floating-point dtype then.
    """
    device = tensors[0].device.type
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        tensors = tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)
    dtypes = [x.dtype for x in tensors]
    if not dtypes[0].is_floating_point or len(set(dtypes)) > 1:
        raise ValueError(f"q, k, v: expected one floating-point dtype, got {dtypes}")
    return tensors


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


# --- fused: PyTorch's own choice, or the kernel measured to be the fastest


def _fused(q: Tensor, k: Tensor, v: Tensor, causal: bool, lengths: Tensor | None) -> Tensor:
    if not _autotune.applies(q):
        return torch.ops.segclip_fast.attention(q, k, v, causal, lengths)
    arguments = {"q": q, "k": k, "v": v, "causal": causal, "lengths": lengths}
    winner = _autotune.pick("attention", _key(q, k, v, causal, lengths), CANDIDATES, arguments)
    return (torch.ops.segclip_fast.attention if winner is None else winner.run)(**arguments)


def _key(q: Tensor, k: Tensor, v: Tensor, causal: bool, lengths: Tensor | None) -> Hashable:
    # Which kernels the user allows is part of the kind of input: a choice made before must not override it.
    return _autotune.signature(q, k, v), causal, lengths is None, tuple(_allowed())


def _own_choice(
    q: Tensor, k: Tensor, v: Tensor, causal: bool = False, lengths: Tensor | None = None
) -> Tensor:
    """PyTorch's own choice among its kernels, on any device."""
    return _dot_product(*_heads_first(q, k, v, causal, lengths))


def _dot_product(*arguments: Any) -> Tensor:
    """PyTorch's attention as it stands, (B, T, H, d); on CUDA its gradient arrives dense."""
    out = F.scaled_dot_product_attention(*arguments).transpose(1, 2)
    return _DenseGradient.apply(out) if out.is_cuda and out.requires_grad else out


class _DenseGradient(torch.autograd.Function):
    """Identity whose gradient is contiguous, as the output is.

    PyTorch remembers cuDNN's backward plan by shapes and by the strides of q, k and v, not by those of the
    gradient: after a call with a dense gradient, one with the slice of a larger tensor (`layers.apart`) was
    read with the wrong strides, and every gradient below it was wrong (seen with torch 2.11 on an H200).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()


def _heads_first(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, lengths: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, float, bool]:
    """Arguments of PyTorch's attention, which takes (B, H, T, d): q, k, v, mask, dropout, is_causal."""
    hidden = None if lengths is None else _hidden(q, k, causal, lengths)
    mask = None if hidden is None else ~hidden
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask, 0.0, causal and mask is None


# Composite: autograd, torch.compile and autocast see the PyTorch operations inside.
_library = torch.library.Library("segclip_fast", "FRAGMENT")
_library.define(
    "attention(Tensor q, Tensor k, Tensor v, bool causal=False, Tensor? lengths=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("attention", _own_choice, "CompositeImplicitAutograd")

BACKENDS = (Backend("fused", _fused, accept), Backend("reference", attention_ref, accept))


# --- candidates on CUDA: each of PyTorch's kernels


_flags = threading.Lock()  # the order of PyTorch's kernels is global to the process


def _allowed() -> list[SDPBackend]:
    """PyTorch's kernels that are not switched off (torch.backends.cuda.enable_*_sdp, sdpa_kernel)."""
    switches = {
        SDPBackend.FLASH_ATTENTION: kernels.flash_sdp_enabled,
        SDPBackend.CUDNN_ATTENTION: kernels.cudnn_sdp_enabled,
        SDPBackend.EFFICIENT_ATTENTION: kernels.mem_efficient_sdp_enabled,
        SDPBackend.MATH: kernels.math_sdp_enabled,
    }
    return [kernel for kernel, allowed in switches.items() if allowed()]


def _sdpa(
    kernel: SDPBackend, q: Tensor, k: Tensor, v: Tensor, causal: bool, lengths: Tensor | None
) -> Tensor:
    """PyTorch's attention by one of its kernels.

    The kernel is put first in PyTorch's order instead of being the only one left, so that a call of another
    thread in between still finds a kernel. `_refuse_sdpa` has made sure that PyTorch takes it.
    """
    arguments = _heads_first(q, k, v, causal, lengths)
    if _first_choice(*arguments) == kernel.value:  # the usual case: no need for 20 us of switching
        return _dot_product(*arguments)
    others = [other for other in _allowed() if other != kernel]
    with _flags, sdpa_kernel([kernel, *others], set_priority=True):
        return _dot_product(*arguments)


def _first_choice(*arguments: Any) -> int | None:
    """The kernel that PyTorch would take by itself; None where this version does not tell."""
    tell = getattr(torch, "_fused_sdp_choice", None)
    return None if tell is None else tell(*arguments)


def _refuse_sdpa(
    kernel: SDPBackend, q: Tensor, k: Tensor, v: Tensor, causal: bool, lengths: Tensor | None
) -> str | None:
    width = q.shape[-1]
    if not q.is_cuda:
        return f"runs on cuda, inputs are on {q.device.type}"
    if kernel not in _allowed():
        return "switched off in PyTorch (torch.backends.cuda, sdpa_kernel)"
    if kernel is SDPBackend.MATH:
        return None
    if kernel is not SDPBackend.EFFICIENT_ATTENTION and q.dtype not in HALF:
        return f"takes float16 and bfloat16, inputs are {q.dtype}"
    if kernel is SDPBackend.FLASH_ATTENTION and lengths is not None:
        return "has no mask, which lengths needs"
    if kernel is SDPBackend.FLASH_ATTENTION and width > 256:
        return f"takes head widths up to 256, got {width}"
    if kernel is SDPBackend.CUDNN_ATTENTION and width % 8:
        return f"takes head widths that are multiples of 8, got {width}"
    accepts = _ACCEPTS[kernel]
    parameters: Any = kernels.SDPAParams  # typed for an older signature
    if accepts(parameters(*_heads_first(q, k, v, causal, lengths), False)):
        return None
    return f"PyTorch refuses these inputs on this device (torch.backends.cuda.{accepts.__name__})"


_ACCEPTS = {
    SDPBackend.FLASH_ATTENTION: kernels.can_use_flash_attention,
    SDPBackend.CUDNN_ATTENTION: kernels.can_use_cudnn_attention,
    SDPBackend.EFFICIENT_ATTENTION: kernels.can_use_efficient_attention,
}


# --- candidates on CUDA: xformers


@functools.cache
def xformers_ops() -> tuple[Any, str | None]:
    """The module xformers.ops and None, or None and why it is missing."""
    try:
        return importlib.import_module("xformers.ops"), None
    except ModuleNotFoundError as error:
        return None, f"xformers is not installed ({error})"
    except Exception as error:  # built for another torch, it fails in ways of its own
        return None, f"importing xformers fails: {type(error).__name__}: {error}"


@functools.cache
def xformers_kernels() -> str | None:
    """Why xformers has no kernels here, or None; built for another torch, it imports without them."""
    ops, missing = xformers_ops()
    if missing is not None:
        return missing
    forward, backward = ops.fmha.cutlass.FwOp, ops.fmha.cutlass.BwOp
    if not (forward.is_available() and backward.is_available()):
        return f"xformers' kernels do not load: built for another torch than {torch.__version__}"
    return None


def refuse_xformers(*tensors: Tensor) -> str | None:
    """Why xformers cannot take queries, keys and values (..., H, d), or None."""
    q = tensors[0]
    if not q.is_cuda:
        return f"runs on cuda, inputs are on {q.device.type}"
    if q.dtype not in (*HALF, torch.float32):
        return f"takes float16, bfloat16 and float32, inputs are {q.dtype}"
    unit = 16 // q.element_size()  # rows are read 16 bytes at a time
    if q.shape[-1] % unit:
        return f"takes head widths that are multiples of {unit} in {q.dtype}, got {q.shape[-1]}"
    if any(x.stride(-1) != 1 for x in tensors):
        return f"needs dense rows, last strides are {[x.stride(-1) for x in tensors]}"
    return xformers_kernels()


def _xformers(q: Tensor, k: Tensor, v: Tensor, causal: bool, lengths: Tensor | None) -> Tensor:
    ops, _ = xformers_ops()
    bias = ops.LowerTriangularMask() if causal else None
    if lengths is not None:
        bias = _bias(q, k, causal, lengths)
    return ops.memory_efficient_attention(q, k, v, attn_bias=bias)


def _bias(q: Tensor, k: Tensor, causal: bool, lengths: Tensor) -> Tensor:
    """Additive mask (B, H, T, S), dtype of q: 0 for what is seen, -inf for what is hidden."""
    hidden = _hidden(q, k, causal, lengths)
    assert hidden is not None
    (B, T, H, _), S = q.shape, k.shape[1]
    room = -(-S // 8) * 8  # xformers wants every row of the mask aligned to 16 bytes
    bias = q.new_zeros(B, 1, hidden.shape[2], room)[..., :S].masked_fill_(hidden, -torch.inf)
    return bias.expand(B, H, T, S)


def _refuse_xformers(q: Tensor, k: Tensor, v: Tensor, causal: bool, lengths: Tensor | None) -> str | None:
    return refuse_xformers(q, k, v)


CANDIDATES = (
    *(
        Candidate(name, functools.partial(_sdpa, kernel), functools.partial(_refuse_sdpa, kernel))
        for name, kernel in {
            "flash": SDPBackend.FLASH_ATTENTION,
            "cudnn": SDPBackend.CUDNN_ATTENTION,
            "efficient": SDPBackend.EFFICIENT_ATTENTION,
            "math": SDPBackend.MATH,
        }.items()
    ),
    Candidate("xformers", _xformers, _refuse_xformers),
)
