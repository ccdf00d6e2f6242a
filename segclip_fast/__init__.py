"""segclip_fast: open-vocabulary semantic segmentation learned from captions alone (SegCLIP, ICML 2023).

```python
from segclip_fast import SegCLIP
model = SegCLIP.from_pretrained("checkpoint_folder")
result = model.segment("photo.jpg", labels=["cat", "sofa", "plant"])
result.overlay().save("overlay.png")
```

Public names load on first use, so importing costs nothing and needs no GPU, Triton, xformers, open_clip or
compiled extension; what is missing speaks when it is first needed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "SegCLIP": "segclip_fast.model.segclip",
    "ImageFeatures": "segclip_fast.model.segclip",
    "Losses": "segclip_fast.losses",
    "Noise": "segclip_fast.model.segclip",
    "SegCLIPConfig": "segclip_fast.config",
    "LossConfig": "segclip_fast.config",
    "Segmentation": "segclip_fast.evaluation.segmentation",
}
__all__ = [
    "ImageFeatures",
    "LossConfig",
    "Losses",
    "Noise",
    "SegCLIP",
    "SegCLIPConfig",
    "Segmentation",
    "__version__",
]

if TYPE_CHECKING:
    from .config import LossConfig, SegCLIPConfig
    from .evaluation.segmentation import Segmentation
    from .losses import Losses
    from .model.segclip import ImageFeatures, Noise, SegCLIP


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
