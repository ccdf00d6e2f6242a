"""From a photo and a list of labels to a `Segmentation`: the label of every pixel, and pictures to look at.

Shape legend: H W the photo's own size, C labels (with the background where there is one), R regions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..data.images import load_image
from .drawing import borders, distinct_colours, row_blocks, with_legend
from .options import Options, Vocabulary, prepare_vocabulary
from .prompts import TEMPLATES, check_labels, check_templates
from .refine import label_pixels, photo_superpixels
from .score_map import Scores
from .scoring import Protocol
from .segmenter import Segmenter
from .vocabularies import BACKGROUND
from .windows import Precision, Sliding, resize_on, score_resized

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

PALETTE_SIZE = 256  # colours of an indexed PNG


@dataclass(frozen=True, eq=False)
class Segmentation:
    """What was found in a photo, at the photo's own size.

    Attributes:
        labels: (H, W) int64, index into `names`.
        scores: (H, W) float32 in [0, 1], the winning label's score (snapped: its mean in the superpixel).
        regions: (H, W) int64 in 0..R-1, the semantic region of each pixel; every sliding window has its own.
        names: the C labels; "background" is index 0 where it was asked for.
        image: (H, W, 3) uint8 RGB, the photo itself, for `overlay`; may be None.
    """

    labels: np.ndarray
    scores: np.ndarray
    regions: np.ndarray
    names: tuple[str, ...]
    image: np.ndarray | None = None

    @property
    def coverage(self) -> dict[str, float]:
        """Fraction of the photo that each label covers, in the order of `names`; they add up to 1."""
        counts = np.bincount(self.labels.ravel(), minlength=len(self.names))
        return {name: float(n) / self.labels.size for name, n in zip(self.names, counts, strict=True)}

    @property
    def colours(self) -> np.ndarray:
        """The colour of each label in all pictures, (C, 3) uint8; black for the background."""
        offset = int(self.names[0] == BACKGROUND)
        colours = np.zeros((len(self.names), 3), dtype=np.uint8)
        colours[offset:] = distinct_colours(len(self.names) - offset)
        return colours

    def overlay(self, alpha: float = 0.55, legend: bool = True) -> PILImage:
        """The photo with its labels painted over; background stays as it is.

        Args:
            alpha: opacity of the paint, 0 to 1.
            legend: add a strip below with the colour, name and coverage of every label present; without it
                the picture has the photo's size.

        Raises:
            ValueError: the segmentation does not hold the photo, or `alpha` is out of range.
        """
        from PIL import Image

        if self.image is None:
            raise ValueError("overlay: expected a segmentation that holds its photo, got image=None")
        if not 0.0 <= alpha <= 1.0:
            raise ValueError(f"alpha: expected a number from 0 to 1, got {alpha}")
        opacity = np.full(len(self.names), alpha, dtype=np.float32)
        opacity[: int(self.names[0] == BACKGROUND)] = 0.0
        table = self.colours * opacity[:, None]  # colour times opacity, per label
        picture = np.empty_like(self.image)
        for rows in row_blocks(self.labels):
            index = self.labels[rows]
            blend = self.image[rows] * (1.0 - opacity)[index, None] + table[index]
            picture[rows] = np.round(blend).astype(np.uint8)
        picture[borders(self.labels)] = 255
        photo = Image.fromarray(picture)
        return with_legend(photo, self) if legend else photo

    def region_image(self) -> PILImage:
        """The semantic regions, before any label, each in its own colour: RGB, at the photo's size."""
        from PIL import Image

        colours = distinct_colours(int(self.regions.max()) + 1)
        return Image.fromarray(colours[self.regions])

    def label_image(self) -> PILImage:
        """The labels as an indexed picture whose palette holds `colours`.

        Raises:
            ValueError: more than 256 labels.
        """
        from PIL import Image

        if len(self.names) > PALETTE_SIZE:
            raise ValueError(
                f"names: expected at most {PALETTE_SIZE} for a PNG (use .npy), got {len(self.names)}"
            )
        picture = Image.fromarray(self.labels.astype(np.uint8), mode=None)
        picture.putpalette(self.colours.tobytes())
        return picture

    def save(self, path: str | Path) -> None:
        """Write the labels: an indexed `.png` (pixel value = index into `names`) or the array as `.npy`.

        Raises:
            ValueError: another suffix, or more than 256 labels in a PNG.
        """
        path = Path(path)
        suffix = path.suffix.lower()
        if suffix == ".png":
            self.label_image().save(path)
        elif suffix == ".npy":
            np.save(path, self.labels)
        else:
            raise ValueError(f"path: expected a file name ending in .png or .npy, got {str(path)!r}")


def segment(model: Segmenter, image: Any, labels: Sequence[str], **options: Any) -> Segmentation:
    """Give every pixel of a photo one of the labels.

    Args:
        model: the segmenter, on any device; its mode (training or evaluation) is left as it was.
        image: a path, PIL image, NumPy array or tensor, see `load_image`.
        labels: the names to look for.
        **options: background, threshold, templates, snap, pamr, short_side, stride, protocol, batch_size,
            precision: see `segment_batch`.

    Raises:
        ValueError: an image, label or option that cannot be used; the message names it.
        FileNotFoundError: `image` is the path of no file.
    """
    photo = load_image(image, name="image")
    return segment_batch(model, [photo], labels, **options)[0]


def segment_batch(
    model: Segmenter,
    images: Sequence[Any],
    labels: Sequence[str] | Sequence[Sequence[str]],
    *,
    background: bool | Sequence[str] = False,
    threshold: float | None = None,
    templates: Sequence[str] = TEMPLATES,
    snap: bool = False,
    pamr: bool = False,
    short_side: int | None = None,
    stride: int | None = None,
    protocol: Protocol = "official",
    batch_size: int | None = None,
    precision: Precision = "fp32",
) -> list[Segmentation]:
    """Segment several photos of any sizes; their windows share the batches of the image encoder.

    Args:
        model: the segmenter, on any device; its mode (training or evaluation) is left as it was.
        images: each a path, PIL image, NumPy array or tensor, see `load_image`.
        labels: the names to look for, as they go into the prompts: strings for all photos, or for each photo
            a list of its own.
        background: False: every pixel gets a label. True: "background", index 0, where no label scores well
            enough (protocol step 5). Names, for instance ["wall", "floor"]: these compete with the labels,
            and what they win is "background".
        threshold: with background=True, a region whose best score is lower is background; .80 by default (.75
            in protocol "paper"). Scores are shares among the labels: fewer labels mean higher scores.
        templates: prompts with {} for the label; their text features are averaged.
        snap: give every superpixel of the photo one label, so that borders follow its edges.
        pamr: refine the scores by PAMR (`evaluation.pamr`) at the resized photo's size.
        short_side: short side in pixels after resizing; the model's image size by default.
        stride: step between windows in pixels; the window side, which is the model's image size, by default.
        protocol: "official", what the released code does, or "paper", the paper's Section 2.5.
        batch_size: windows per call of the image encoder; by default 32, on a GPU what its memory holds.
        precision: of the image encoder, "fp32", "bf16" or "fp16".

    Returns:
        One result per photo, in their order.

    Raises:
        ValueError: an image, label or option that cannot be used; the message names it.
        FileNotFoundError: an image path of no file.
    """
    photos = [load_image(image, name=f"images[{i}]") for i, image in enumerate(images)]
    sliding = Sliding(protocol, short_side, stride, batch_size, precision)
    names = background if isinstance(background, bool) else check_labels(background, "background")
    options = Options(names, threshold, check_templates(templates), snap, pamr, sliding)
    vocabularies = _vocabularies(model, labels, len(photos), options)
    return segment_photos(model, photos, vocabularies, options) if photos else []


def segment_photos(
    model: Segmenter, photos: Sequence[np.ndarray], vocabularies: Sequence[Vocabulary], options: Options
) -> list[Segmentation]:
    """`segment_batch` when all is read and checked.

    Args:
        model: the segmenter.
        photos: (H, W, 3) uint8 each, at least one.
        vocabularies: of each photo, made by `prepare_vocabulary` with the same options.
        options: all settings.
    """
    sliding = options.sliding
    short = model.image_size if sliding.short_side is None else sliding.short_side
    device = next(model.parameters()).device
    resized = [resize_on(photo, short, device) for photo in photos]
    texts = [vocabulary.text for vocabulary in vocabularies]
    maps = score_resized(model, resized, texts, vocabularies[0].background, sliding)
    parts = zip(maps, photos, resized, vocabularies, strict=True)
    return [_finish(scores, photo, small, found.names, options) for scores, photo, small, found in parts]


def _vocabularies(model: Segmenter, labels: Sequence[Any], photos: int, options: Options) -> list[Vocabulary]:
    """The vocabulary of every photo; one and the same object for photos that share it."""
    own = isinstance(labels, (list, tuple)) and any(isinstance(entry, (list, tuple)) for entry in labels)
    if not own:
        return [prepare_vocabulary(model, labels, options)] * photos
    if len(labels) != photos:
        raise ValueError(f"labels: expected a list for each of {photos} images, got {len(labels)}")
    known: dict[tuple[str, ...], Vocabulary] = {}
    for i, entry in enumerate(labels):
        key = check_labels(entry, f"labels[{i}]")
        if key not in known:
            known[key] = prepare_vocabulary(model, key, options)
    return [known[check_labels(entry)] for entry in labels]


def _finish(
    scores: Scores,
    photo: np.ndarray,
    small: np.ndarray | torch.Tensor,
    names: tuple[str, ...],
    options: Options,
) -> Segmentation:
    """Score map of the resized photo -> result at the photo's own size (protocol step 6)."""
    height, width = photo.shape[:2]
    superpixels = photo_superpixels(photo) if options.snap else None
    labels, values = label_pixels(
        scores, height, width, superpixels=superpixels, photo=small if options.pamr else None
    )
    regions = scores.regions
    rows, columns = (
        (2 * torch.arange(target, device=regions.device) + 1) * source // (2 * target)  # nearest
        for source, target in zip(regions.shape, (height, width), strict=True)
    )
    regions = regions[rows[:, None], columns]
    return Segmentation(labels.cpu().numpy(), values.cpu().numpy(), regions.cpu().numpy(), names, photo)
