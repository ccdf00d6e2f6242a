"""The training losses as pure functions (paper Section 2.4), in float32, or float64 if that comes.

Shapes: B batch, N patches, L centers, E joint embedding, P pixel values of a patch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_LOGIT_SCALE = 100.0


@dataclass(frozen=True)
class Losses:
    """Losses of one step, each a () tensor before weighting; None where a term was not computed.

    Attributes:
        total: weighted sum of the computed terms.
        contrastive: image-text InfoNCE.
        reconstruction: masked-pixel error.
        superpixel_kl: superpixel consistency.
    """

    total: Tensor
    contrastive: Tensor | None
    reconstruction: Tensor | None
    superpixel_kl: Tensor | None

    def named(self) -> dict[str, Tensor]:
        """The computed terms by name, total first."""
        return {name: value for name, value in vars(self).items() if value is not None}


def contrastive(image: Tensor, text: Tensor, logit_scale: Tensor, holds: Tensor | None = None) -> Tensor:
    """Symmetric InfoNCE between matching rows.

    Args:
        image: (B, E) image features.
        text: (B, E) text features.
        logit_scale: () log of the inverse temperature; its exponential is clamped at 100.
        holds: (B, B) bool, True where the caption j also holds for image i: such pairs are no negatives.
            The diagonal is ignored. None: every other pair is a negative (the paper).

    Returns:
        () mean of the image-to-text and text-to-image cross-entropies.

    Raises:
        ValueError: shapes do not fit.
    """
    if image.ndim != 2 or image.shape != text.shape:
        raise ValueError(
            f"image, text: expected two equal (B, E) shapes, got {tuple(image.shape)} and {tuple(text.shape)}"
        )
    if holds is not None and (holds.dtype != torch.bool or holds.shape != (len(image), len(image))):
        raise ValueError(
            f"holds: expected ({len(image)}, {len(image)}) bool, got {tuple(holds.shape)} {holds.dtype}"
        )
    image, text = _wide(image), _wide(text)
    image = image / image.norm(dim=-1, keepdim=True)
    text = text / text.norm(dim=-1, keepdim=True)
    with torch.autocast(image.device.type, enabled=False):  # which would multiply in half precision
        logits = inverse_temperature(logit_scale) * image @ text.mT  # (B, B), image i against text j
    if holds is not None:
        matching = torch.eye(len(image), dtype=torch.bool, device=image.device)
        logits = logits.masked_fill(holds & ~matching, -torch.inf)
    targets = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.mT, targets)) / 2


def inverse_temperature(logit_scale: Tensor) -> Tensor:
    """exp(logit_scale), at most 100 (no gradient above)."""
    return _wide(logit_scale).exp().clamp(max=MAX_LOGIT_SCALE)


def _wide(x: Tensor) -> Tensor:
    """At least float32, whatever autocast made of it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def reconstruction(predicted: Tensor, pixels: Tensor, hidden: Tensor) -> Tensor:
    """Mean-squared error over the hidden patches.

    Args:
        predicted: (B, N, P) predicted pixel values.
        pixels: (B, N, P) normalised pixel values of the input, not normalised per patch.
        hidden: (B, N) 1 where a patch was hidden, else 0.

    Returns:
        () mean over hidden patches of the mean-squared error.
    """
    error = (_wide(predicted) - _wide(pixels)).square().mean(dim=-1)  # (B, N)
    return (error * hidden).sum() / hidden.sum()
