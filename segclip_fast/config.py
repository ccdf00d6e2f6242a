"""Every setting of the library as frozen dataclasses; presets are functions. Nothing changes after parsing.

Those of the data are in `data/settings.py`; all can be imported from here.

Defaults are the paper's run (SegCLIP, ICML 2023, Section 3.1): ViT-B/16 cut after layer 10, 8 centers, two
cross-attention layers, batch 768, learning rates 4e-6 before and 4e-3 from the grouping module on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from ._checks import require
from .data.settings import DataConfig
from .data.settings import SuperpixelConfig as SuperpixelConfig

Activation = Literal["quick_gelu", "gelu"]
KLForm = Literal["paper", "official"]

T = TypeVar("T")


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


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with linear warm-up and a cosine; two learning rates around the grouping module.

    Attributes:
        lr: peak rate of the grouping module and everything after it.
        lower_lr: peak rate of what CLIP brings: first stage and text tower.
        weight_decay: decoupled decay.
        decay: which parameters decay: "default" (matrices only) or "official" (all but those named bias).
        betas: Adam moments.
        eps: Adam denominator.
        warmup: share of all steps for the linear warm-up.
        clip: global gradient norm limit.
    """

    lr: float = 4e-3
    lower_lr: float = 4e-6
    weight_decay: float = 0.05
    decay: Literal["default", "official"] = "default"
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    warmup: float = 0.15
    clip: float = 1.0

    def __post_init__(self) -> None:
        require(self.lr > 0 and self.lower_lr >= 0, "optim.lr", "positive rates", (self.lr, self.lower_lr))
        require(0 <= self.warmup < 1, "optim.warmup", "between 0 and 1", self.warmup)
        require(self.clip > 0, "optim.clip", "a positive norm", self.clip)


@dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Attributes:
        output: run folder (config, log, checkpoints).
        model: the architecture.
        loss: loss weights.
        data: the source of pairs.
        optim: optimizer and schedule.
        init: "scratch", a checkpoint folder or file to start from, or "clip:NAME[:PRETRAINED]".
        steps: optimizer steps in total.
        batch_size: pairs per step.
        seed: of initialisation, order, augmentation and noise.
        save_every: steps between checkpoints.
        keep: newest checkpoints that stay; the best by zero-shot mIoU stays besides.
        max_skipped: steps in a row without a finite loss and gradient after which the run stops.
        eval_every: steps between zero-shot evaluations; 0 for none before the end. A folder has no masks and
            is not evaluated at all.
        eval_images: held-out images per evaluation.
        precision: autocast type of the forward pass.
        device: "auto", "cpu" or "cuda".
        resume: continue the run in `output` from its newest checkpoint (or start it).
        overwrite: replace the run in `output`.
        quiet: no progress bar.
    """

    output: str = "runs/segclip"
    model: SegCLIPConfig = field(default_factory=SegCLIPConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    init: str = "scratch"
    steps: int = 1000
    batch_size: int = 64
    seed: int = 42
    save_every: int = 100
    keep: int = 2
    max_skipped: int = 20
    eval_every: int = 0
    eval_images: int = 200
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    device: str = "auto"
    resume: bool = False
    overwrite: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        require(not (self.resume and self.overwrite), "resume", "not together with overwrite", True)
        for name in ("steps", "batch_size", "save_every", "keep", "max_skipped"):
            require(getattr(self, name) > 0, name, "a positive number", getattr(self, name))
        without_masks = self.data.source == "folder"
        expected = "0 with data.source 'folder', which has no masks to compare with"
        require(not (without_masks and self.eval_every), "eval_every", expected, self.eval_every)


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
        from .data.scenes import caption_vocabulary

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


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass config as plain dictionaries, lists and scalars (for JSON)."""
    return dataclasses.asdict(config)


def from_dict(cls: type[T], values: Mapping[str, Any], where: str = "config") -> T:
    """Build the config dataclass `cls` from plain values (inverse of `to_dict`); unknown names are errors."""
    hints = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ValueError(f"{where}: expected fields {sorted(hints)}, got unknown {unknown}")
    built: dict[str, Any] = {}
    for name, value in values.items():
        factory = hints[name].default_factory
        if isinstance(value, Mapping) and factory is not dataclasses.MISSING:
            value = from_dict(type(factory()), value, f"{where}.{name}")
        elif isinstance(value, list):
            value = tuple(value)
        built[name] = value
    try:
        return cls(**built)
    except TypeError as error:
        raise ValueError(
            f"{where}: expected values of the right types, got {dict(values)}: {error}"
        ) from error
