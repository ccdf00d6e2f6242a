"""Transformer parts shared by both towers and the decoder; batch-first (B, N, D) everywhere.

Shapes: B batch, N tokens, L centers, D width, H heads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from ..config import Activation
from ..ops import attention, linear
from ..ops._dispatch import force, literal, requested

# Who attends to whom: queries, keys and values (..., N, H, D / H) -> (..., N, H, D / H).
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention to oneself and what came before."""
    return attention(q, k, v, causal=True)


def apart(*sizes: int) -> Attend:
    """Attention within consecutive runs of `sizes` tokens and not across: several images in one sequence."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        runs = zip(*(x.split(sizes, dim=1) for x in (q, k, v)), strict=True)
        return torch.cat([attention(*run) for run in runs], dim=1)

    return attend


def quick_gelu(x: Tensor) -> Tensor:
    """X * sigmoid(1.702 x), the GELU of OpenAI's CLIP."""
    if literal() or torch.compiler.is_compiling():
        return x * torch.sigmoid(1.702 * x)
    if not x.requires_grad:
        return (1.702 * x).sigmoid_().mul_(x)  # the same bits, one temporary
    return _QuickGELU.apply(x)


class _QuickGELU(torch.autograd.Function):
    """quick_gelu that keeps its input alone and works in place: half the traffic without a compiler."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (1.702 * x).sigmoid_().mul_(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        scaled = 1.702 * x  # quick_gelu(x) = silu(1.702 x) / 1.702
        return torch.ops.aten.silu_backward.grad_input(grad, scaled, grad_input=scaled)


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class LayerNorm(nn.LayerNorm):
    """LayerNorm in the precision of its parameters: float32 under autocast, on every device."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D), dtype of the parameters."""
        return F.layer_norm(x.to(self.weight.dtype), self.normalized_shape, self.weight, self.bias, self.eps)


class Linear(nn.Linear):
    """Linear layer on `ops.linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        return linear(x, self.weight, self.bias)


class MLP(nn.Module):
    """Two linear layers with an activation between: (B, N, D) -> (B, N, D)."""

    def __init__(self, width: int, hidden: int, activation: Activation) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return self.fc2(self.activation(self.fc1(x)))


class Attention(nn.Module):
    """Multi-head attention with one fused query-key-value projection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(self, x: Tensor, attend: Attend = attention) -> Tensor:
        """Self-attention (..., N, D) -> (..., N, D)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)  # (..., N, H, D / H)
        return self.proj(attend(q, k, v).flatten(-2))

    def cross(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Attention of `queries` (B, L, D) over `keys` (B, N, D), which also give the values: (B, L, D).

        Few queries, many keys: the key projection moves to the queries (q (W k) = (W' q) k; the key bias adds
        the same to every score, which softmax does not see), the value projection behind the weighted sum.
        """
        if literal():
            return self._cross_literal(queries, keys)
        query, key, value = (w.unflatten(0, (self.heads, -1)) for w in self.qkv.weight.chunk(3))
        query_bias, _, value_bias = self.qkv.bias.chunk(3)
        scale = query.shape[1] ** -0.5
        q = linear(queries, query.flatten(0, 1), query_bias).unflatten(-1, (self.heads, -1)) * scale
        absorbed = torch.einsum("blhe,hed->bhld", q, key).flatten(1, 2)  # (B, H L, D)
        logits = absorbed @ keys.mT  # (B, H L, N)
        weights = logits.softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        gathered = weights.to(keys.dtype) @ keys  # (B, H L, D)
        gathered = gathered.unflatten(1, (self.heads, -1))
        found = torch.einsum("bhld,hed->blhe", gathered, value).flatten(2) + value_bias
        return self.proj(found)

    def _cross_literal(self, queries: Tensor, keys: Tensor) -> Tensor:
        width = queries.shape[-1]
        weight, bias = self.qkv.weight, self.qkv.bias
        q = linear(queries, weight[:width], bias[:width]).unflatten(-1, (self.heads, -1))
        kv = linear(keys, weight[width:], bias[width:]).unflatten(-1, (2, self.heads, -1))
        return self.proj(attention(q, kv[:, :, 0], kv[:, :, 1]).flatten(2))


class Block(nn.Module):
    """Pre-norm transformer block.

    Attributes:
        checkpointed: keep no activations for the backward pass, compute them again there.
    """

    checkpointed = False

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float = 4.0,
        activation: Activation = "quick_gelu",
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm(width, eps)
        self.attention = Attention(width, heads)
        self.norm2 = LayerNorm(width, eps)
        self.mlp = MLP(width, int(width * mlp_ratio), activation)

    def forward(self, x: Tensor, attend: Attend = attention) -> Tensor:
        """(..., N, D) -> (..., N, D)."""
        if self.checkpointed and torch.is_grad_enabled():
            return recomputed(self._run, x, attend)
        return self._run(x, attend)

    def _run(self, x: Tensor, attend: Attend) -> Tensor:
        x = x + self.attention(self.norm1(x), attend)
        return x + self.mlp(self.norm2(x))


def recomputed(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """`function(*arguments)`, whose intermediate results the backward pass computes again."""
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # nothing random inside
    backend = requested()
    if backend != "auto":  # the backward pass is outside of the block that asked for it
        options["context_fn"] = lambda: (contextlib.nullcontext(), force(backend))
    return checkpoint(function, *arguments, **options)


class CrossBlock(nn.Module):
    """Cross-attention block of the grouping module: centers look at themselves and the patches."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, activation: Activation) -> None:
        super().__init__()
        self.norm1 = LayerNorm(width)
        self.norm_keys = LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = LayerNorm(width)
        self.mlp = MLP(width, int(width * mlp_ratio), activation)

    def forward(self, centers: Tensor, patches: Tensor) -> Tensor:
        """Centers (B, L, D) attend to [centers, patches (B, N, D)]: (B, L, D)."""
        keys = self.norm_keys(torch.cat([centers, patches], dim=1))  # (B, L + N, D)
        centers = centers + self.attention.cross(self.norm1(centers), keys)
        return centers + self.mlp(self.norm2(centers))
