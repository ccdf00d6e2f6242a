"""Small models for tests: every part present, a fraction of a second to run."""

from __future__ import annotations

import dataclasses

from segclip_fast import SegCLIP, SegCLIPConfig
from segclip_fast.config import GroupingConfig, ReconstructionConfig, TextConfig, VisionConfig

WORDS = ("a", "photo", "of", "cat", "dog", "sofa", "grass", "and")


def small_config(**changes) -> SegCLIPConfig:
    """A 32 x 32 model with 4 x 4 patches of 8; `changes` are dotted fields such as vision__patch_size."""
    config = SegCLIPConfig(
        embed_dim=16,
        vision=VisionConfig(image_size=32, patch_size=8, width=24, layers=3, heads=3, group_after=2),
        grouping=GroupingConfig(centers=3, cross_layers=1),
        text=TextConfig(len(WORDS) + 3, 12, 16, 2, 2, vocabulary=WORDS),
        reconstruction=ReconstructionConfig(decoder_width=16, decoder_layers=1, decoder_heads=2),
    )
    for name, value in changes.items():
        part, _, field = name.rpartition("__")
        if part:
            value = dataclasses.replace(getattr(config, part), **{field: value})
        config = dataclasses.replace(config, **{part or field: value})
    return config


def small_model(**changes) -> SegCLIP:
    """A randomly initialised small model."""
    return SegCLIP(small_config(**changes))
