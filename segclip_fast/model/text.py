"""CLIP's text transformer.

Shapes: B texts, T tokens, W text width, E joint embedding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import TextConfig
from ..ops import attention_packed
from ..ops._dispatch import literal
from .layers import Block, LayerNorm, causal


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
        self.norm = LayerNorm(config.width)
        self.projection = nn.Parameter(torch.empty(config.width, embed_dim))

    def forward(self, tokens: Tensor) -> Tensor:
        """Text features.

        Args:
            tokens: (B, T) int64, T at most the context length; the end token is each row's largest id and
                what follows it is ignored. Leave them on the CPU, also for a model on CUDA: then the texts
                are packed to their lengths before they travel, which on CUDA would mean to wait for it.

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
        on_host = tokens.device.type == "cpu" and not torch.compiler.is_compiling()
        return self._packed(tokens) if on_host and not literal() else self._padded(tokens)

    def _padded(self, tokens: Tensor) -> Tensor:
        """Every text at the length of the longest allowed: fixed shapes, nothing to wait for."""
        tokens = tokens.to(self.position_embedding.device)
        x = self.token_embedding(tokens) + self.position_embedding[: tokens.shape[1]]  # (B, T, W)
        for block in self.blocks:
            x = block(x, causal)
        x = self.norm(x)
        end = x[torch.arange(len(x), device=x.device), tokens.argmax(dim=-1)]  # (B, W)
        return end @ self.projection

    def _packed(self, tokens: Tensor) -> Tensor:
        """The texts end to end, without what follows their end tokens: under the causal mask it is unseen."""
        device = self.position_embedding.device
        lengths = tokens.argmax(dim=-1) + 1  # (B,)
        used = torch.arange(tokens.shape[1]) < lengths[:, None]  # (B, T)
        _, positions = used.nonzero(as_tuple=True)  # (total,)
        starts = F.pad(lengths.cumsum(dim=0), (1, 0)).to(torch.int32)
        counts: list[int] = lengths.tolist()
        ids, positions, starts = (
            x.to(device, non_blocking=True) for x in (tokens[used].long(), positions, starts)
        )

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention_packed(q, k, v, starts, max(counts), causal=True, lengths=counts)

        x = self.token_embedding(ids) + F.embedding(positions, self.position_embedding)  # (total, W)
        for block in self.blocks:
            x = block(x, attend)
        return self.norm(x[starts[1:] - 1]) @ self.projection
