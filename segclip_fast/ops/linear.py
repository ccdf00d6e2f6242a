"""Affine map whose float32 products use all of the CPU.

Shapes: (..., I) inputs, O outputs.
"""

from __future__ import annotations

import platform
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._dispatch import Backend, accept, select

LEAST = 2**20  # multiplications from which oneDNN's fixed cost is made up for
_X86 = platform.machine().lower() in ("x86_64", "amd64")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Product x W^T + b.

    PyTorch multiplies float32 matrices on the CPU with MKL, which on an AMD processor with AVX-512 was seen
    to run at less than half the rate of oneDNN, another library inside PyTorch (benchmarks/bench_linear.py).
    So on x86 CPUs the product and its two backward products go to oneDNN, in plain float32 as well.
    Everywhere else this is `torch.nn.functional.linear`.

    Args:
        x: (..., I).
        weight: (O, I).
        bias: (O,) or None.

    Returns:
        (..., O).
    """
    return select("linear", BACKENDS, [x, weight]).run(x, weight, bias)


def linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Twin of `linear`, the specification."""
    return F.linear(x, weight, bias)


def why_not_onednn(x: Tensor, weight: Tensor) -> str | None:
    """Why oneDNN does not multiply x (..., I) by weight (O, I) here; None if it does."""
    if x.device.type != "cpu" or not _X86:
        return f"for x86 CPUs, inputs are on {x.device.type} of {platform.machine()}"
    if x.dtype != torch.float32 or weight.dtype != torch.float32:
        return f"for float32, got {x.dtype} and {weight.dtype}"
    if torch.is_autocast_enabled("cpu"):
        return "autocast casts to half precision"
    if x.numel() * weight.shape[0] < LEAST:
        return f"for at least {LEAST} multiplications, got {x.numel() * weight.shape[0]}"
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "this PyTorch has no oneDNN"
    if not torch._C._get_mkldnn_enabled():
        return "torch.backends.mkldnn is switched off"
    return None


def _fused(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # A compiler makes its own choice, and sees the product as it is.
    if torch.compiler.is_compiling() or why_not_onednn(x, weight) is not None:
        return F.linear(x, weight, bias)
    return _OneDNN.apply(x, weight, bias)


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Product a b^T + bias of (M, I) and (O, I), of any strides."""
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


class _OneDNN(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        ctx.save_for_backward(rows, weight)
        return _product(rows, weight, bias).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        rows, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        d_out = grad.reshape(-1, grad.shape[-1])
        d_x = d_weight = d_bias = None
        if needs_x:
            d_x = _product(d_out, weight.t()).view(*grad.shape[:-1], -1)
        if needs_weight:
            d_weight = _product(d_out.t(), rows.t())
        if needs_bias:
            d_bias = d_out.sum(dim=0)
        return d_x, d_weight, d_bias


BACKENDS = (Backend("fused", _fused, accept), Backend("reference", linear_ref, accept))
