"""The semantic grouping module (paper Section 2.3): patches gather into regions around learnable centers.

Shapes: B batch, N patches, L centers, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import GroupingConfig, VisionConfig
from ..ops import group_assign
from .layers import MLP, CrossBlock, LayerNorm, quick_gelu


@dataclass(frozen=True)
class Grouping:
    """Regions of one pass and how patches were assigned to them.

    Attributes:
        regions: (B, L, D) region tokens.
        logits: (B, L, N) clean center-patch scores.
        hard: (B, L, N) one-hot assignment over the centers, straight-through gradient.
    """

    regions: Tensor
    logits: Tensor
    hard: Tensor


class SemanticGrouping(nn.Module):
    """Learnable centers, cross-attention, assignment, pooling."""

    def __init__(self, vision: VisionConfig, config: GroupingConfig) -> None:
        super().__init__()
        width = vision.width
        self.tau = config.tau
        self.centers = nn.Parameter(torch.empty(config.centers, width))
        self.norm = LayerNorm(width)
        self.blocks = nn.ModuleList(
            CrossBlock(width, vision.heads, vision.mlp_ratio, vision.activation)
            for _ in range(config.cross_layers)
        )
        self.center_norm = LayerNorm(width)
        self.key_weight = nn.Parameter(torch.empty(width, width // vision.heads))
        self.key_norm = LayerNorm(width)
        self.value_weight = nn.Parameter(torch.empty(width, width // vision.heads))
        self.out_norm = LayerNorm(width)
        self.out_mlp = MLP(width, int(width * vision.mlp_ratio), "gelu")

    def forward(self, patches: Tensor, noise: Tensor | None = None) -> Grouping:
        """Group patches into regions.

        Args:
            patches: (B, N, D) tokens of the first stage.
            noise: (B, L, N) Gumbel noise or its (2,) int64 seed for a training pass (temperature tau); None
                for a clean assignment.

        Returns:
            Grouping(regions (B, L, D), logits (B, L, N), hard (B, L, N)).
        """
        # Contextual centers: cross-attention over the raw patches and the centers themselves.
        centers = self.centers.expand(len(patches), -1, -1)  # (B, L, D)
        for block in self.blocks:
            centers = block(centers, patches)
        centers = self.center_norm(centers)

        # Assignment and masked mean pooling (Eq. 2-3).
        found = group_assign(
            centers,
            self.norm(patches),
            self.key_weight,
            self.key_norm.weight,
            self.key_norm.bias,
            self.value_weight,
            noise=noise,
            tau=1.0 if noise is None else self.tau,
        )

        # Region tokens; the release's output MLP has no residual.
        regions = quick_gelu(self.out_mlp(self.out_norm(centers + found.pooled))).to(centers.dtype)
        return Grouping(regions, found.logits, found.hard)
