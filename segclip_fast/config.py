"""Every setting of the library as frozen dataclasses; presets are functions. Nothing changes after parsing.

They live beside what they set, in `model/settings.py`, `data/settings.py` and `training/settings.py`, and
all can be imported from here. Defaults are the paper's run (SegCLIP, ICML 2023, Section 3.1).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from .data.settings import DataConfig, SuperpixelConfig
from .model.settings import (
    PRESETS,
    Activation,
    GroupingConfig,
    KLForm,
    LossConfig,
    ReconstructionConfig,
    SegCLIPConfig,
    TextConfig,
    VisionConfig,
    preset,
    scenes_tiny,
    vit_b16,
    vit_b32,
    vit_l14,
)
from .training.settings import OptimConfig, TrainConfig

__all__ = [
    "PRESETS",
    "Activation",
    "DataConfig",
    "GroupingConfig",
    "KLForm",
    "LossConfig",
    "OptimConfig",
    "ReconstructionConfig",
    "SegCLIPConfig",
    "SuperpixelConfig",
    "TextConfig",
    "TrainConfig",
    "VisionConfig",
    "from_dict",
    "preset",
    "scenes_tiny",
    "to_dict",
    "vit_b16",
    "vit_b32",
    "vit_l14",
]

T = TypeVar("T")


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
