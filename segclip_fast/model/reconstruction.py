"""The masked-reconstruction branch: patch masking, reconstruction layer (paper Eq. 4), MAE decoder.

Shapes: B batch, N patches, K visible patches, L centers, D width, D' decoder width, P = 3 patch^2 pixel
values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import SegCLIPConfig
from .layers import Block, LayerNorm, Linear, quick_gelu


@dataclass(frozen=True)
class Masking:
    """Which patches of each image are visible.

    Attributes:
        keep: (B, K) int64 indices of the visible patches, in random order.
        restore: (B, N) int64, position of each patch in [visible, hidden] order.
        hidden: (B, N) float, 1 where hidden.
    """

    keep: Tensor
    restore: Tensor
    hidden: Tensor

    def select(self, tokens: Tensor) -> Tensor:
        """The visible rows of (B, N, D) tokens: (B, K, D)."""
        return tokens.gather(1, self.keep[:, :, None].expand(-1, -1, tokens.shape[-1]))


def mask_patches(noise: Tensor, kept: int) -> Masking:
    """Keep the `kept` patches of least `noise` (B, N) in every image."""
    shuffle = noise.argsort(dim=1)
    restore = shuffle.argsort(dim=1)
    return Masking(shuffle[:, :kept], restore, (restore >= kept).to(noise.dtype))


class Reconstruction(nn.Module):
    """From the regions of a masked image back to the pixels of its hidden patches."""

    positions: Tensor

    def __init__(self, config: SegCLIPConfig) -> None:
        super().__init__()
        vision, settings = config.vision, config.reconstruction
        centers, width, hidden = config.grouping.centers, vision.width, settings.decoder_width
        self.mix = Linear(centers, centers)
        self.blocks = nn.ModuleList(
            Block(width, vision.heads, vision.mlp_ratio, vision.activation)
            for _ in range(vision.layers - vision.group_after)
        )
        self.embed = Linear(width, hidden)
        self.mask_token = nn.Parameter(torch.empty(hidden))
        self.register_buffer("positions", sincos_positions(vision.grid, hidden), persistent=False)
        self.decoder = nn.ModuleList(
            Block(hidden, settings.decoder_heads, 4.0, "gelu", eps=1e-6)
            for _ in range(settings.decoder_layers)
        )
        self.norm = LayerNorm(hidden, eps=1e-6)
        self.predict = Linear(hidden, 3 * vision.patch_size**2)

    def forward(self, regions: Tensor, hard: Tensor, masking: Masking) -> Tensor:
        """Predicted pixels of every patch.

        Args:
            regions: (B, L, D) region tokens of the masked image.
            hard: (B, L, K) assignment of its visible patches.
            masking: which patches those are.

        Returns:
            (B, N, P) pixel values, ordered (row, column, channel) inside a patch.
        """
        # Reconstruction layer (Eq. 4): every visible patch becomes a mix of the regions.
        mix = self.mix(hard.mT.to(self.mix.weight.dtype))  # (B, K, L)
        tokens = quick_gelu(mix @ regions).to(regions.dtype)  # (B, K, D)
        for block in self.blocks:
            tokens = block(tokens)

        # MAE decoder: mean token in front, mask tokens for the hidden patches.
        tokens = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1)
        tokens = self.embed(tokens)  # (B, 1 + K, D')
        front, visible = tokens[:, :1], tokens[:, 1:]
        B, K, hidden = visible.shape
        N = masking.restore.shape[1]
        mask = self.mask_token.to(visible.dtype).expand(B, N - K, -1)
        patches = torch.cat([visible, mask], dim=1)
        patches = patches.gather(1, masking.restore[:, :, None].expand(-1, -1, hidden))  # (B, N, D')
        tokens = torch.cat([front, patches], dim=1) + self.positions
        for block in self.decoder:
            tokens = block(tokens)
        return self.predict(self.norm(tokens))[:, 1:]  # (B, N, P)


def patchify(images: Tensor, patch: int) -> Tensor:
    """Pixels of each patch: (B, 3, H, W) -> (B, N, 3 patch^2), ordered (row, column, channel)."""
    B, C, H, W = images.shape
    tiles = images.reshape(B, C, H // patch, patch, W // patch, patch)
    return tiles.permute(0, 2, 4, 3, 5, 1).reshape(B, -1, patch * patch * C)


def sincos_positions(grid: int, width: int) -> Tensor:
    """Fixed 2-D sin-cos table (1 + grid^2, width), row 0 ([CLS]) zero; first half columns, then rows."""
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * frequencies  # (grid, width / 4)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid, width / 2)
    rows, columns = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    table = torch.cat([axis[columns.flatten()], axis[rows.flatten()]], dim=1)
    return torch.cat([torch.zeros(1, width, dtype=torch.float64), table]).float()
