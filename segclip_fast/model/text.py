"""CLIP's text transformer.

Shapes: B texts, T tokens, W text width, E joint embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config import TextConfig
from .layers import Block


class TextEncoder(nn.Module):
    """Token ids to one feature per text, read at the end token."""

    def __init__(self, config: TextConfig, embed_dim: int) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Parameter(torch.empty(config.context_length, config.width))
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, activation=config.activation) for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.width)
        self.projection = nn.Parameter(torch.empty(config.width, embed_dim))

    def forward(self, tokens: Tensor) -> Tensor:
        """Text features.

        Args:
            tokens: (B, T) int64, T at most the context length; the end token is each row's largest id and
                what follows it is ignored.

        Returns:
            (B, E), not normalised.

        Raises:
            ValueError: wrong shape, dtype or length.
        """
        limit = self.config.context_length
        if tokens.ndim != 2 or tokens.is_floating_point() or not 0 < tokens.shape[1] <= limit:
            raise ValueError(
                f"tokens: expected (B, T <= {limit}) integers, got {tuple(tokens.shape)} {tokens.dtype}"
            )
        x = self.token_embedding(tokens) + self.position_embedding[: tokens.shape[1]]  # (B, T, W)
        for block in self.blocks:
            x = block(x, causal=True)
        x = self.norm(x)
        end = x[torch.arange(len(x), device=x.device), tokens.argmax(dim=-1)]  # (B, W)
        return end @ self.projection
