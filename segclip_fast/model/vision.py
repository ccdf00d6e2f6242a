"""The image tower: patch embedding, first stage, semantic grouping, third stage (paper Figure 2, left).

Shapes: B batch, H W pixels, N = (H / patch)(W / patch) patches, row-major, L centers, D width, E joint
embedding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import GroupingConfig, VisionConfig
from .grouping import SemanticGrouping
from .layers import Block, LayerNorm, apart


class VisionEncoder(nn.Module):
    """CLIP's ViT cut after `group_after` blocks, with the grouping module in the gap.

    The [CLS] token is dropped before the first block, as in the release: `class_embedding` and row 0 of
    `position_embedding` are kept for the checkpoint's sake and influence nothing.
    """

    class_embedding: Tensor

    def __init__(self, config: VisionConfig, grouping: GroupingConfig, embed_dim: int) -> None:
        super().__init__()
        self.config = config
        width, patch = config.width, config.patch_size
        self.patch_embedding = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.register_buffer("class_embedding", torch.zeros(width))
        self.position_embedding = nn.Parameter(torch.empty(config.grid**2 + 1, width))
        self.norm_in = LayerNorm(width)
        blocks = [
            Block(width, config.heads, config.mlp_ratio, config.activation) for _ in range(config.layers)
        ]
        self.first_stage = nn.ModuleList(blocks[: config.group_after])
        self.grouping = SemanticGrouping(config, grouping)
        self.third_stage = nn.ModuleList(blocks[config.group_after :])
        self.norm_out = LayerNorm(width)
        self.projection = nn.Parameter(torch.empty(width, embed_dim))

    def embed(self, images: Tensor) -> Tensor:
        """Patch tokens (B, N, D) of normalised images (B, 3, H, W); H and W multiples of the patch."""
        patch = self.config.patch_size
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(
                f"images: expected (B, 3, H, W) floating point, got {tuple(images.shape)} {images.dtype}"
            )
        height, width = images.shape[2:]
        if not height or not width or height % patch or width % patch:
            raise ValueError(
                f"images: expected sides divisible by the patch size {patch}, got {height} x {width}"
            )
        tokens = self.patch_embedding(images).flatten(2).mT  # (B, N, D)
        return self.norm_in(tokens + self.positions(height // patch, width // patch))

    def positions(self, rows: int, columns: int) -> Tensor:
        """Position embeddings (N, D) of a rows x columns grid, bicubic where it is not the training grid."""
        grid = self.config.grid
        table = self.position_embedding[1:]  # without [CLS]
        if (rows, columns) == (grid, grid):
            return table
        square = table.unflatten(0, (grid, grid)).permute(2, 0, 1)[None]  # (1, D, grid, grid)
        resized = F.interpolate(square, (rows, columns), mode="bicubic", align_corners=False)
        return resized[0].flatten(1).mT

    def encode_patches(self, tokens: Tensor) -> Tensor:
        """First stage: (B, N, D) -> (B, N, D), for all patches or the visible ones of a masked image."""
        for block in self.first_stage:
            tokens = block(tokens)
        return tokens

    def encode_both(self, patches: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
        """First stage of whole images (B, N, D) and of their visible patches (B, K, D) in one pass.

        They meet in no attention: two passes in which every weight is read, and its gradient written, once.
        """
        sizes = patches.shape[1], visible.shape[1]
        tokens = torch.cat([patches, visible], dim=1)  # (B, N + K, D)
        attend = apart(*sizes)
        for block in self.first_stage:
            tokens = block(tokens, attend)
        whole, masked = tokens.split(sizes, dim=1)
        return whole, masked

    def encode_regions(self, regions: Tensor) -> tuple[Tensor, Tensor]:
        """Third stage: region tokens (B, L, D) -> image feature (B, E) and region features (B, L, E).

        The image feature is the element-wise maximum over the regions, before the last norm and projection.
        """
        for block in self.third_stage:
            regions = block(regions)
        tokens = torch.cat([regions.amax(dim=1, keepdim=True), regions], dim=1)  # (B, 1 + L, D)
        features = self.norm_out(tokens) @ self.projection  # (B, 1 + L, E)
        return features[:, 0], features[:, 1:]
