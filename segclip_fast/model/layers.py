"""Transformer parts shared by both towers and the decoder; batch-first (B, N, D) everywhere.

Shapes: B batch, N tokens, L centers, D width, H heads.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import Activation
from ..ops import attention


def quick_gelu(x: Tensor) -> Tensor:
    """X * sigmoid(1.702 x), the GELU of OpenAI's CLIP."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class MLP(nn.Module):
    """Two linear layers with an activation between: (B, N, D) -> (B, N, D)."""

    def __init__(self, width: int, hidden: int, activation: Activation) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return self.fc2(self.activation(self.fc1(x)))


class Attention(nn.Module):
    """Multi-head attention with one fused query-key-value projection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, causal: bool = False, lengths: Tensor | None = None) -> Tensor:
        """Self-attention (B, N, D) -> (B, N, D); `lengths` (B,) hides the tokens from there on."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)  # (B, N, H, D / H)
        return self.proj(attention(q, k, v, causal, lengths).flatten(2))

    def cross(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Attention of `queries` (B, L, D) over `keys` (B, N, D), which also give the values: (B, L, D)."""
        width = queries.shape[-1]
        weight, bias = self.qkv.weight, self.qkv.bias
        q = F.linear(queries, weight[:width], bias[:width]).unflatten(-1, (self.heads, -1))
        kv = F.linear(keys, weight[width:], bias[width:]).unflatten(-1, (2, self.heads, -1))
        return self.proj(attention(q, kv[:, :, 0], kv[:, :, 1]).flatten(2))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float = 4.0,
        activation: Activation = "quick_gelu",
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps)
        self.mlp = MLP(width, int(width * mlp_ratio), activation)

    def forward(self, x: Tensor, causal: bool = False, lengths: Tensor | None = None) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        x = x + self.attention(self.norm1(x), causal, lengths)
        return x + self.mlp(self.norm2(x))


class CrossBlock(nn.Module):
    """Cross-attention block of the grouping module: centers look at themselves and the patches."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, activation: Activation) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.norm_keys = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, int(width * mlp_ratio), activation)

    def forward(self, centers: Tensor, patches: Tensor) -> Tensor:
        """Centers (B, L, D) attend to [centers, patches (B, N, D)]: (B, L, D)."""
        keys = self.norm_keys(torch.cat([centers, patches], dim=1))  # (B, L + N, D)
        centers = centers + self.attention.cross(self.norm1(centers), keys)
        return centers + self.mlp(self.norm2(centers))
