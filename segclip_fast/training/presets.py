"""Prepared runs: complete settings by name, each a function."""

from __future__ import annotations

from collections.abc import Callable

from ..config import (
    DataConfig,
    GroupingConfig,
    LossConfig,
    OptimConfig,
    ReconstructionConfig,
    SegCLIPConfig,
    SuperpixelConfig,
    TextConfig,
    TrainConfig,
    VisionConfig,
    scenes_tiny,
    vit_b16,
)

# The paper's 224, 0.9 and 224 at 224 x 224 pixels, scaled to 64 x 64.
SMALL_PICTURES = SuperpixelConfig(scale=64.0, sigma=0.6, min_size=24)


def paper() -> TrainConfig:
    """The paper's recipe from CLIP ViT-B/16; bring the pictures and captions as a folder (--data.root)."""
    return TrainConfig(
        output="runs/paper",
        model=vit_b16(),
        data=DataConfig(source="folder", workers=8),
        init="clip:ViT-B-16-quickgelu:openai",
        batch_size=768,  # 96 x 8 GPUs
        steps=44_000,  # 10 epochs of about 3.4M pairs
        save_every=1000,
    )


def scenes() -> TrainConfig:
    """Learn the embedded scenes from scratch on a laptop's CPU, in minutes."""
    return TrainConfig(
        output="runs/scenes",
        model=scenes_tiny(),
        # With some seeds full weight fails, and so does none at all: docs/scenes.md.
        loss=LossConfig(superpixel_kl=0.1, mask_false_negatives=True),
        data=DataConfig(
            source="scenes",
            samples=8192,
            crop_area=(1.0, 1.0),
            superpixels=SMALL_PICTURES,
            cache=True,
        ),
        optim=OptimConfig(lr=2e-3, lower_lr=2e-3),
        steps=1000,
        batch_size=64,
        save_every=250,
    )


def stamps() -> TrainConfig:
    """A small model from scratch on scenes composed of Tux Paint stamps (needs --data.root)."""
    return TrainConfig(
        output="runs/stamps",
        model=SegCLIPConfig(
            embed_dim=128,
            vision=VisionConfig(image_size=64, patch_size=8, width=128, layers=3, heads=4, group_after=3),
            grouping=GroupingConfig(centers=6, cross_layers=1),
            text=TextConfig(context_length=32, width=128, layers=2, heads=4),
            reconstruction=ReconstructionConfig(decoder_width=96, decoder_layers=1, decoder_heads=4),
        ),
        loss=LossConfig(superpixel_kl=0.1, mask_false_negatives=True),
        data=DataConfig(source="stamps", samples=8192, superpixels=SMALL_PICTURES),
        optim=OptimConfig(lr=1e-3, lower_lr=1e-3),
        steps=1000,
        batch_size=32,
        eval_images=100,
    )


RUNS: dict[str, Callable[[], TrainConfig]] = {"paper": paper, "scenes": scenes, "stamps": stamps}
