"""SegCLIP: two towers, grouping in between, three losses (paper Figure 2).

Shapes: B batch, H W pixels, N patches, K visible patches of a masked image, L centers, E joint embedding, T
tokens.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import losses
from ..config import LossConfig, SegCLIPConfig
from ..losses import Losses
from ..ops import superpixel_kl
from ..ops._dispatch import known, literal, served_by
from ..ops.gumbel import draw_seed
from .initialise import initialise
from .reconstruction import Masking, Reconstruction, mask_patches, patchify
from .text import TextEncoder
from .vision import VisionEncoder

if TYPE_CHECKING:
    from ..evaluation.segmentation import Segmentation


@dataclass(frozen=True)
class ImageFeatures:
    """What the image tower sees.

    Attributes:
        image: (B, E) image feature, not normalised.
        regions: (B, L, E) region features, not normalised.
        logits: (B, L, N) clean center-patch scores.
        soft: (B, L, N) their softmax over the centers; inference reads it.
        hard: (B, L, N) one-hot assignment of every patch to one center.
    """

    image: Tensor
    regions: Tensor
    logits: Tensor
    soft: Tensor
    hard: Tensor


@dataclass(frozen=True)
class Noise:
    """The random numbers of one training step, so that a step can be replayed.

    Attributes:
        full: Gumbel(0, 1) for the assignment of the whole image: (B, L, N), or the (2,) int64 seed of it.
        mask: (B, N) uniform; the patches with the least values stay visible.
        masked: the same for the masked image: (B, L, K), or the (2,) int64 seed of it.
    """

    full: Tensor
    mask: Tensor
    masked: Tensor


class Terms(NamedTuple):
    """What one batch gives to the losses; None where the loss has weight 0 or was not asked for.

    A tuple, because DDP and FSDP look for tensors in those.

    Attributes:
        image: (B, E) image features, not normalised.
        text: (B, E) text features, not normalised.
        reconstruction: () masked-pixel error, mean over the batch.
        superpixel_kl: () superpixel consistency, mean over the batch.
    """

    image: Tensor | None
    text: Tensor | None
    reconstruction: Tensor | None
    superpixel_kl: Tensor | None


def weighted(
    weights: LossConfig,
    contrastive: Tensor | None,
    reconstruction: Tensor | None,
    superpixel_kl: Tensor | None,
    device: torch.device,
) -> Losses:
    """The () losses that there are, with their weighted sum on `device`."""
    total = torch.zeros((), device=device)
    for weight, term in (
        (weights.contrastive, contrastive),
        (weights.reconstruction, reconstruction),
        (weights.superpixel_kl, superpixel_kl),
    ):
        if term is not None:
            total = total + weight * term
    return Losses(total, contrastive, reconstruction, superpixel_kl)


class SegCLIP(nn.Module):
    """Open-vocabulary segmentation learned from captions.

    Args:
        config: the architecture; default the paper's ViT-B/16.
        loss: loss weights and forms used by `forward`.
        backend: "auto" takes the fastest implementation of everything that serves the inputs; "reference"
            computes the paper's formulas op by op in plain PyTorch, the yardstick of tests and benchmarks;
            "fused" and "triton" force one kind of kernel. The same numbers to rounding.

    Raises:
        ValueError: unknown backend.
    """

    def __init__(
        self,
        config: SegCLIPConfig | None = None,
        loss: LossConfig | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.config = config or SegCLIPConfig()
        self.loss = loss or LossConfig()
        self.backend = known(backend)
        self.text = TextEncoder(self.config.text, self.config.embed_dim)
        self.vision = VisionEncoder(self.config.vision, self.config.grouping, self.config.embed_dim)
        self.reconstruction = Reconstruction(self.config) if self.config.reconstruction.enabled else None
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        initialise(self)

    @property
    def image_size(self) -> int:
        """Side in pixels of the images it is trained on, and of the windows of inference."""
        return self.config.vision.image_size

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return self.config.vision.patch_size

    # --- features

    def tokenize(self, texts: Sequence[str], length: int | None = None) -> Tensor:
        """Token ids (B, T) int64; T = `length` or the context length; too long texts keep their end token."""
        from ..data.tokenizer import tokenizer_for

        return tokenizer_for(self.config.text)(texts, length)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Text features (B, E), not normalised, of token ids (B, T) int64."""
        with served_by(self.backend):
            return self.text(tokens)

    def encode_image(self, images: Tensor) -> ImageFeatures:
        """Clean features of normalised images: no noise, no temperature, whatever the training flag says.

        Args:
            images: (B, 3, H, W) floating point, CLIP-normalised; sides divisible by the patch.

        Raises:
            ValueError: wrong shape or dtype.
        """
        with served_by(self.backend):
            grouping = self.vision.grouping(self.vision.encode_patches(self.vision.embed(images)))
            image, regions = self.vision.encode_regions(grouping.regions)
        logits = grouping.logits
        return ImageFeatures(image, regions, logits, logits.softmax(dim=1), grouping.hard)

    # --- training

    def draw_noise(self, images: Tensor, generator: torch.Generator | None = None) -> Noise:
        """Random numbers for a step on `images` (B, 3, H, W), drawn in the order full, mask, masked."""
        patch, device = self.config.vision.patch_size, images.device
        N = (images.shape[2] // patch) * (images.shape[3] // patch)
        full = draw_seed(device, generator)
        mask = torch.rand((len(images), N), device=device, generator=generator)
        return Noise(full, mask, draw_seed(device, generator))

    def forward(
        self,
        images: Tensor,
        tokens: Tensor,
        superpixels: Tensor | None = None,
        noise: Noise | None = None,
        *,
        holds: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Losses:
        """The losses of one batch of image-text pairs, with noisy assignment.

        Args:
            images: (B, 3, H, W) normalised images; with the reconstruction branch H = W = the training size.
            tokens: (B, T) int64 token ids of the captions.
            superpixels: (B, H / patch, W / patch) integer superpixel label of each patch; None leaves the
                superpixel loss out.
            noise: random numbers to replay; None draws them from `generator`.
            holds: (B, B) bool, caption j also holds for image i; read if loss.mask_false_negatives.
            generator: source of the noise; None is torch's global one.

        Returns:
            Losses(total, contrastive, reconstruction, superpixel_kl); terms of weight 0 are None.

        Raises:
            ValueError: shapes do not fit.
        """
        noise = noise or self.draw_noise(images, generator)
        terms = self.terms(images, tokens, superpixels, noise)
        contrast = None
        if terms.image is not None and terms.text is not None:
            known = holds if self.loss.mask_false_negatives else None
            contrast = losses.contrastive(terms.image, terms.text, self.logit_scale, known)
        return weighted(self.loss, contrast, terms.reconstruction, terms.superpixel_kl, images.device)

    def terms(
        self,
        images: Tensor,
        tokens: Tensor,
        superpixels: Tensor | None,
        noise: Noise,
        *,
        features_only: bool = False,
    ) -> Terms:
        """What a batch gives to the losses; the contrastive loss may then span batches and processes.

        Args:
            images: (B, 3, H, W) normalised.
            tokens: (B, T) int64.
            superpixels: (B, H / patch, W / patch) integers, or None.
            noise: of these images.
            features_only: leave the losses of single images out.

        Raises:
            ValueError: shapes do not fit.
        """
        with served_by(self.backend):
            return self._terms(images, tokens, superpixels, noise, features_only)

    def _terms(
        self, images: Tensor, tokens: Tensor, superpixels: Tensor | None, noise: Noise, features_only: bool
    ) -> Terms:
        weights = self.loss
        patches = self.vision.embed(images)  # (B, N, D)
        masking = None
        if weights.reconstruction > 0 and self.reconstruction is not None and not features_only:
            masking = self._masking(images, noise)
        whole, visible = self._first_stage(patches, masking)
        grouping = self.vision.grouping(whole, noise.full)

        image = text = pixels = consistency = None
        if weights.contrastive > 0:
            image, _ = self.vision.encode_regions(grouping.regions)
            text = self.encode_text(tokens)
        if masking is not None and visible is not None:
            pixels = self._reconstruction_loss(images, visible, masking, noise)
        if weights.superpixel_kl > 0 and superpixels is not None and not features_only:
            labels = self._patch_labels(superpixels, images)
            consistency = superpixel_kl(labels, grouping.hard.mT, weights.kl_form)
        return Terms(image, text, pixels, consistency)

    def _masking(self, images: Tensor, noise: Noise) -> Masking:
        size = self.config.vision.image_size
        if images.shape[2:] != (size, size):
            raise ValueError(
                f"images: expected {size} x {size} to reconstruct, got {tuple(images.shape[2:])}"
            )
        return mask_patches(noise.mask, self.config.reconstruction.kept(noise.mask.shape[1]))

    def _first_stage(self, patches: Tensor, masking: Masking | None) -> tuple[Tensor, Tensor | None]:
        """Encoded patches (B, N, D), and those of the masked image (B, K, D) if there is one."""
        if masking is None:
            return self.vision.encode_patches(patches), None
        visible = masking.select(patches)
        if literal():
            return self.vision.encode_patches(patches), self.vision.encode_patches(visible)
        return self.vision.encode_both(patches, visible)

    def _reconstruction_loss(self, images: Tensor, visible: Tensor, masking: Masking, noise: Noise) -> Tensor:
        assert self.reconstruction is not None
        grouping = self.vision.grouping(visible, noise.masked)
        predicted = self.reconstruction(grouping.regions, grouping.hard, masking)
        target = patchify(images, self.config.vision.patch_size)
        return losses.reconstruction(predicted, target, masking.hidden)

    def _patch_labels(self, superpixels: Tensor, images: Tensor) -> Tensor:
        patch = self.config.vision.patch_size
        expected = (len(images), images.shape[2] // patch, images.shape[3] // patch)
        if superpixels.shape != expected:
            raise ValueError(
                f"superpixels: expected {expected} patch labels, got {tuple(superpixels.shape)}; "
                "see segclip_fast.ops.patch_labels"
            )
        return superpixels.flatten(1)

    # --- use

    def segment(self, image: Any, labels: Sequence[str], **options: Any) -> Segmentation:
        """Label every pixel of `image` with one of `labels`; see `evaluation.segmentation.segment`."""
        from ..evaluation.segmentation import segment

        return segment(self, image, labels, **options)

    def segment_batch(
        self, images: Sequence[Any], labels: Sequence[str] | Sequence[Sequence[str]], **options: Any
    ) -> list[Segmentation]:
        """Label several images, by labels for all or for each; see `evaluation.segmentation`."""
        from ..evaluation.segmentation import segment_batch

        return segment_batch(self, images, labels, **options)

    # --- files

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        device: str = "cpu",
        config: SegCLIPConfig | None = None,
        backend: str = "auto",
    ) -> SegCLIP:
        """Load a checkpoint: our folder (config.json + model.safetensors) or the authors' file.

        Args:
            path: folder or file.
            device: where the model goes.
            config: architecture of an authors' file, where its shapes do not tell (heads not 64 wide).
            backend: as for `SegCLIP`.

        Raises:
            FileNotFoundError: nothing at `path`.
            ValueError: truncated, of another architecture (lists the keys), or a pickle with code in it.
        """
        from ..interop.checkpoint import load

        model, values = load(cls, Path(path), config=config)
        model.load_state_dict(values)
        model.backend = known(backend)
        return model.to(device).eval()

    @classmethod
    def from_clip(cls, name: str, pretrained: str | None = None, **options: Any) -> SegCLIP:
        """Start from a CLIP model; see `interop.clip.from_clip`."""
        from ..interop.clip import from_clip

        return from_clip(cls, name, pretrained, **options)

    def save_pretrained(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write config.json and model.safetensors; refuses to replace a checkpoint unless `overwrite`."""
        from ..interop.checkpoint import save

        save(self, Path(folder), overwrite=overwrite)

    def export_authors(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the authors' layout (a torch file of 415 tensors for ViT-B/16); see `interop.authors`."""
        from ..interop.authors import export

        export(self, Path(path), overwrite=overwrite)
