"""Pictures and captions: loading, shards, tables, folders, stamps, scenes, pseudo-labels, transforms.

Names load on first use: importing this package needs neither torch nor Pillow.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_PUBLIC = {
    "CocoCaptions": "caption_files",
    "FolderSource": "folder",
    "IGNORE_LABEL": "sample",
    "ImageTextSource": "sample",
    "MATERIALS": "scenes",
    "Mixture": "mixture",
    "RawSample": "sample",
    "SampleError": "sample",
    "SceneSource": "scenes",
    "ShardSource": "shards",
    "StampSource": "stamps",
    "Synthetic": "mixture",
    "TableSource": "caption_files",
    "caption_vocabulary": "scenes",
    "load_image": "images",
    "load_segments": "images",
    "make_scene": "scenes",
    "make_source": "opening",
    "resize_bilinear_uint8": "images",
}
__all__ = [
    "IGNORE_LABEL",
    "MATERIALS",
    "CocoCaptions",
    "FolderSource",
    "ImageTextSource",
    "Mixture",
    "RawSample",
    "SampleError",
    "SceneSource",
    "ShardSource",
    "StampSource",
    "Synthetic",
    "TableSource",
    "caption_vocabulary",
    "load_image",
    "load_segments",
    "make_scene",
    "make_source",
    "resize_bilinear_uint8",
]

if TYPE_CHECKING:
    from .caption_files import CocoCaptions, TableSource
    from .folder import FolderSource
    from .images import load_image, load_segments, resize_bilinear_uint8
    from .mixture import Mixture, Synthetic
    from .opening import make_source
    from .sample import IGNORE_LABEL, ImageTextSource, RawSample, SampleError
    from .scenes import MATERIALS, SceneSource, caption_vocabulary, make_scene
    from .shards import ShardSource
    from .stamps import StampSource


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
