"""What the evaluation asks of a model, so that every model of the library runs through the same harness.

Shape legend: B images, H W pixels, N patches, E joint embedding, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

if TYPE_CHECKING:
    from ..model.segclip import ImageFeatures


@dataclass(frozen=True)
class PatchFeatures:
    """What a dense model sees: a feature for each patch instead of one for each region.

    Attributes:
        image: (B, E) image feature, not normalised.
        patches: (B, N, E) patch features, row-major, not normalised.
    """

    image: Tensor
    patches: Tensor


class Segmenter(Protocol):
    """A model that can be evaluated: an `nn.Module` with the methods below.

    Grouping models (SegCLIP, GroupViT) return `ImageFeatures`, dense ones (MaskCLIP) `PatchFeatures`.

    Attributes:
        image_size: side of the square window that the image encoder takes, in pixels.
        patch_size: side of a patch in pixels.
        logit_scale: scalar, log of the inverse temperature; its exponential is clamped to 100.
    """

    training: bool

    @property
    def image_size(self) -> int:
        """Pixels."""
        ...

    @property
    def patch_size(self) -> int:
        """Pixels."""
        ...

    @property
    def logit_scale(self) -> Tensor:
        """Scalar."""
        ...

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Token ids (B, T) int64."""
        ...

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Text features (B, E), not normalised."""
        ...

    def encode_image(self, images: Tensor) -> ImageFeatures | PatchFeatures:
        """Features of normalised images (B, 3, H, W), sides multiples of the patch."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """Of `nn.Module`."""
        ...

    def modules(self) -> Iterator[nn.Module]:
        """Of `nn.Module`."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Of `nn.Module`."""
        ...

    def train(self, mode: bool = True) -> Any:
        """Of `nn.Module`."""
        ...

    def eval(self) -> Any:
        """Of `nn.Module`."""
        ...
