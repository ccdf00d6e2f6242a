"""Pictures and captions: loading, embedded scenes, stamps, folders, pseudo-labels, transforms, tokenizing.

Names load on first use: importing this package needs neither torch nor Pillow.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_PUBLIC = {
    "FolderSource": "folder",
    "IGNORE_LABEL": "sample",
    "ImageTextSource": "sample",
    "MATERIALS": "scenes",
    "RawSample": "sample",
    "SceneSource": "scenes",
    "StampSource": "stamps",
    "caption_vocabulary": "scenes",
    "load_image": "images",
    "load_segments": "images",
    "make_scene": "scenes",
    "resize_bilinear_uint8": "images",
}
__all__ = [
    "IGNORE_LABEL",
    "MATERIALS",
    "FolderSource",
    "ImageTextSource",
    "RawSample",
    "SceneSource",
    "StampSource",
    "caption_vocabulary",
    "load_image",
    "load_segments",
    "make_scene",
    "resize_bilinear_uint8",
]

if TYPE_CHECKING:
    from .folder import FolderSource
    from .images import load_image, load_segments, resize_bilinear_uint8
    from .sample import IGNORE_LABEL, ImageTextSource, RawSample
    from .scenes import MATERIALS, SceneSource, caption_vocabulary, make_scene
    from .stamps import StampSource


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
