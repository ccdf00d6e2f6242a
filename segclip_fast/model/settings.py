"""Settings of the model and its losses as frozen dataclasses, and the named architectures.

Defaults are the paper's model (SegCLIP, ICML 2023, Section 3.1): ViT-B/16 cut after layer 10, 8 centers, two
cross-attention layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .._checks import require

Activation = Literal["quick_gelu", "gelu"]
KLForm = Literal["paper", "official"]


@dataclass(frozen=True)
class VisionConfig:
    """The image tower: patch embedding, first stage, (grouping,) third stage.

    Attributes:
        image_size: training image side in pixels; other sides work, the position embedding is interpolated.
        patch_size: patch side in pixels.
        width: token width D.
        layers: transformer blocks in total, before and after the grouping module.
        heads: attention heads; also the number of groups of the 1x1 key and value projections.
        group_after: blocks before the grouping module (the plug layer; the paper cuts after 10 of 12).
        mlp_ratio: hidden width of every MLP over its input width.
        activation: inside the transformer blocks (OpenAI's CLIP: quick_gelu).
    """

    image_size: int = 224
    patch_size: int = 16
    width: int = 768
    layers: int = 12
    heads: int = 12
    group_after: int = 10
    mlp_ratio: float = 4.0
    activation: Activation = "quick_gelu"

    def __post_init__(self) -> None:
        require(self.image_size > 0, "vision.image_size", "a positive number", self.image_size)
        require(self.patch_size > 0, "vision.patch_size", "a positive number", self.patch_size)
        require(
            self.image_size % self.patch_size == 0,
            "vision.image_size",
            f"a multiple of patch_size {self.patch_size}",
            self.image_size,
        )
        require(self.width % self.heads == 0, "vision.width", f"a multiple of heads {self.heads}", self.width)
        require(
            0 <= self.group_after <= self.layers,
            "vision.group_after",
            f"between 0 and layers {self.layers}",
            self.group_after,
        )

    @property
    def grid(self) -> int:
        """Patches per side at the training size."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class GroupingConfig:
    """The semantic grouping module (paper Section 2.3).

    Attributes:
        centers: learnable centers L, 1 to 64; the most regions an image can have.
        cross_layers: cross-attention layers from centers to patches, 0 to 4.
        tau: temperature of the Gumbel-softmax in training.
    """

    centers: int = 8
    cross_layers: int = 2
    tau: float = 0.9

    def __post_init__(self) -> None:
        require(1 <= self.centers <= 64, "grouping.centers", "1 to 64", self.centers)
        require(0 <= self.cross_layers <= 4, "grouping.cross_layers", "0 to 4", self.cross_layers)
        require(self.tau > 0, "grouping.tau", "a positive number", self.tau)


@dataclass(frozen=True)
class TextConfig:
    """The text tower and how text becomes tokens.

    Attributes:
        vocab_size: number of token ids; the end token is the largest id.
        context_length: longest token sequence, start and end tokens included.
        width: token width.
        layers: transformer blocks.
        heads: attention heads.
        activation: inside the blocks.
        vocabulary: empty for CLIP's byte-pair encoding; else the words of a closed vocabulary (small models
            trained from scratch), and vocab_size must be len(vocabulary) + 3 (padding, start, end).
    """

    vocab_size: int = 49408
    context_length: int = 77
    width: int = 512
    layers: int = 12
    heads: int = 8
    activation: Activation = "quick_gelu"
    vocabulary: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require(self.width % self.heads == 0, "text.width", f"a multiple of heads {self.heads}", self.width)
        require(self.context_length >= 2, "text.context_length", "at least 2", self.context_length)
        if self.vocabulary:
            require(
                self.vocab_size == len(self.vocabulary) + 3,
                "text.vocab_size",
                f"len(vocabulary) + 3 = {len(self.vocabulary) + 3}",
                self.vocab_size,
            )


@dataclass(frozen=True)
class ReconstructionConfig:
    """The masked-reconstruction branch (paper Eq. 4) and its MAE decoder; unused at inference.

    Attributes:
        enabled: build the branch. Without it the model has no reconstruction loss and fewer parameters.
        mask_ratio: share of patches hidden; 0.75 keeps 48 of 196.
        decoder_width: token width of the decoder; divisible by 4 (sin-cos positions).
        decoder_layers: decoder blocks.
        decoder_heads: decoder attention heads.
    """

    enabled: bool = True
    mask_ratio: float = 0.75
    decoder_width: int = 384
    decoder_layers: int = 3
    decoder_heads: int = 8

    def __post_init__(self) -> None:
        require(0 < self.mask_ratio < 1, "reconstruction.mask_ratio", "between 0 and 1", self.mask_ratio)
        divisor = 4 if self.decoder_width % 4 else self.decoder_heads
        require(
            self.decoder_width % divisor == 0,
            "reconstruction.decoder_width",
            f"a multiple of 4 and of decoder_heads {self.decoder_heads}",
            self.decoder_width,
        )

    def kept(self, patches: int) -> int:
        """Patches that stay visible, at least 1: int((N + 1) * (1 - ratio)) counts the dropped [CLS] too."""
        return max(int((patches + 1) * (1 - self.mask_ratio)) - 1, 1)


@dataclass(frozen=True)
class SegCLIPConfig:
    """The whole model. `embed_dim` is the joint image-text embedding E."""

    embed_dim: int = 512
    vision: VisionConfig = field(default_factory=VisionConfig)
    grouping: GroupingConfig = field(default_factory=GroupingConfig)
    text: TextConfig = field(default_factory=TextConfig)
    reconstruction: ReconstructionConfig = field(default_factory=ReconstructionConfig)


@dataclass(frozen=True)
class LossConfig:
    """Weights of the three losses (the paper: all 1) and the form of the superpixel KL.

    Attributes:
        contrastive: weight of the image-text InfoNCE loss.
        reconstruction: weight of the masked-pixel loss.
        superpixel_kl: weight of the superpixel loss.
        kl_form: "paper" (Eq. 5-6) or "official" (the released code's reading).
        mask_false_negatives: do not count a caption that is known to hold for another image of the batch as
            that image's negative. For small closed worlds; off in the paper.
    """

    contrastive: float = 1.0
    reconstruction: float = 1.0
    superpixel_kl: float = 1.0
    kl_form: KLForm = "paper"
    mask_false_negatives: bool = False

    def __post_init__(self) -> None:
        for name in ("contrastive", "reconstruction", "superpixel_kl"):
            require(getattr(self, name) >= 0, f"loss.{name}", "a weight of at least 0", getattr(self, name))
        require(self.kl_form in ("paper", "official"), "loss.kl_form", "paper or official", self.kl_form)


def vit_b16() -> SegCLIPConfig:
    """The paper's model: CLIP ViT-B/16 cut after layer 10, 8 centers; 188.8M parameters with the decoder."""
    return SegCLIPConfig()


def vit_b32() -> SegCLIPConfig:
    """CLIP ViT-B/32: 7 x 7 patches."""
    return SegCLIPConfig(vision=VisionConfig(patch_size=32))


def vit_l14() -> SegCLIPConfig:
    """CLIP ViT-L/14 cut two layers before its end."""
    return SegCLIPConfig(
        embed_dim=768,
        vision=VisionConfig(patch_size=14, width=1024, layers=24, heads=16, group_after=22),
        text=TextConfig(width=768, heads=12),
    )


def scenes_tiny(vocabulary: tuple[str, ...] = ()) -> SegCLIPConfig:
    """A model that learns the embedded scenes on a laptop's CPU in minutes (64 x 64, 8 x 8 patches).

    It has no blocks after the grouping module. Trained from scratch with one, more regions answer to the name
    of another material of the same picture (docs/scenes.md).

    Args:
        vocabulary: the words its captions use; empty takes those of the embedded scenes.
    """
    if not vocabulary:
        from ..data.scenes import caption_vocabulary

        vocabulary = caption_vocabulary()
    return SegCLIPConfig(
        embed_dim=96,
        vision=VisionConfig(image_size=64, patch_size=8, width=96, layers=2, heads=4, group_after=2),
        grouping=GroupingConfig(centers=4, cross_layers=1),
        text=TextConfig(
            vocab_size=len(vocabulary) + 3,
            context_length=16,
            width=96,
            layers=2,
            heads=4,
            vocabulary=vocabulary,
        ),
        reconstruction=ReconstructionConfig(decoder_width=64, decoder_layers=1, decoder_heads=4),
    )


PRESETS = {"vit_b16": vit_b16, "vit_b32": vit_b32, "vit_l14": vit_l14, "scenes_tiny": scenes_tiny}


def preset(name: str) -> SegCLIPConfig:
    """The model configuration called `name`; raises ValueError with the known names otherwise."""
    if name not in PRESETS:
        raise ValueError(f"preset: expected one of {sorted(PRESETS)}, got {name!r}")
    return PRESETS[name]()
