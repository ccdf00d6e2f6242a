"""From a photo and a list of labels to a `Segmentation`: the label of every pixel, and pictures to look at.

Shape legend: H W the photo's own size, C labels (with the background where there is one), R regions.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..data.images import load_image
from .prompts import TEMPLATES, check_labels, encode_labels
from .refine import photo_superpixels, superpixel_scores
from .vocabularies import BACKGROUND, VOC
from .windows import Protocol, ScoreMap, score_images

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage
    from PIL.ImageFont import FreeTypeFont, ImageFont

    from ..model.segclip import SegCLIP

PALETTE_SIZE = 256  # colours of an indexed PNG
# OKLab (https://bottosson.github.io/posts/oklab): lightness and colour axes -> cone responses -> linear sRGB
_LAB_TO_CONES = np.array(
    [
        [1, 0.3963377774, 0.2158037573],
        [1, -0.1055613458, -0.0638541728],
        [1, -0.0894841775, -1.291485548],
    ]
)
_CONES_TO_RGB = np.array(
    [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.707614701],
    ]
)
_LOGGER = logging.getLogger("segclip_fast")


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
        for rows in _row_blocks(self.labels):
            index = self.labels[rows]
            blend = self.image[rows] * (1.0 - opacity)[index, None] + table[index]
            picture[rows] = np.round(blend).astype(np.uint8)
        picture[_borders(self.labels)] = 255
        photo = Image.fromarray(picture)
        return _with_legend(photo, self) if legend else photo

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


def segment(
    model: SegCLIP,
    image: Any,
    labels: Sequence[str],
    *,
    background: bool | Sequence[str] = False,
    threshold: float | None = None,
    templates: Sequence[str] = TEMPLATES,
    snap: bool = False,
    short_side: int | None = None,
    stride: int | None = None,
    protocol: Protocol = "official",
) -> Segmentation:
    """Give every pixel of a photo one of the labels; see `segment_batch` for the arguments.

    Args:
        model: the segmenter, on any device; its mode (training or evaluation) is left as it was.
        image: a path, PIL image, NumPy array or tensor, see `load_image`.
        labels: the names to look for.
        background: allow "none of them", by score (True) or by further names.
        threshold: background below this score.
        templates: prompts.
        snap: follow the photo's edges.
        short_side: resolution.
        stride: overlap of the windows.
        protocol: "official" or "paper".

    Raises:
        ValueError: an image, label or option that cannot be used; the message names it.
        FileNotFoundError: `image` is the path of no file.
    """
    photo = load_image(image, name="image")
    return segment_batch(
        model,
        [photo],
        labels,
        background=background,
        threshold=threshold,
        templates=templates,
        snap=snap,
        short_side=short_side,
        stride=stride,
        protocol=protocol,
    )[0]


def segment_batch(
    model: SegCLIP,
    images: Sequence[Any],
    labels: Sequence[str],
    *,
    background: bool | Sequence[str] = False,
    threshold: float | None = None,
    templates: Sequence[str] = TEMPLATES,
    snap: bool = False,
    short_side: int | None = None,
    stride: int | None = None,
    protocol: Protocol = "official",
) -> list[Segmentation]:
    """Segment several photos of any sizes; their windows share the batches of the image encoder.

    Args:
        model: the segmenter, on any device; its mode (training or evaluation) is left as it was.
        images: each a path, PIL image, NumPy array or tensor, see `load_image`.
        labels: the names to look for, as they go into the prompts.
        background: False: every pixel gets a label. True: "background", index 0, where no label scores well
            enough (protocol step 5). Names, for instance ["wall", "floor"]: these compete with the labels,
            and what they win is "background".
        threshold: with background=True, a region whose best score is lower is background; .80 by default (.75
            in protocol "paper"). Scores are shares among the labels: fewer labels mean higher scores.
        templates: prompts with {} for the label; their text features are averaged.
        snap: give every superpixel of the photo one label, so that borders follow its edges.
        short_side: short side in pixels after resizing; the model's image size by default.
        stride: step between windows in pixels; the window side, which is the model's image size, by default.
        protocol: "official", what the released code does, or "paper", the paper's Section 2.5.

    Raises:
        ValueError: an image, label or option that cannot be used; the message names it.
        FileNotFoundError: an image path of no file.
    """
    photos = [load_image(image, name=f"images[{i}]") for i, image in enumerate(images)]
    labels = check_labels(labels)
    rest = () if isinstance(background, bool) else check_labels(background, "background")
    limit = _check_threshold(threshold, background, protocol)
    if background and BACKGROUND in (label.casefold() for label in labels):
        raise ValueError(f"labels: expected no {BACKGROUND!r} among them, `background` adds it")
    if limit is not None and len(labels) == 1:
        _LOGGER.warning(
            "labels: the only label %r always scores 1, so no pixel can be background by threshold; "
            "name what else there is instead: background=[...]",
            labels[0],
        )
    text = encode_labels(model, (*labels, *rest), templates)
    maps = score_images(
        model, photos, text, threshold=limit, protocol=protocol, short_side=short_side, stride=stride
    )
    if rest:
        maps = [_fold_background(scores, len(labels)) for scores in maps]
    names = (BACKGROUND, *labels) if background else labels
    return [_finish(scores, photo, names, snap) for scores, photo in zip(maps, photos, strict=True)]


def _check_threshold(
    threshold: float | None, background: bool | Sequence[str], protocol: Protocol
) -> float | None:
    """The threshold to use, None where no background is found by threshold."""
    if background is not True:
        if threshold is not None:
            raise ValueError(f"threshold: expected None unless background=True, got {threshold}")
        return None
    if threshold is None:
        return VOC.paper_threshold if protocol == "paper" else VOC.threshold
    if not 0.0 <= threshold <= 1.0:
        raise ValueError(f"threshold: expected a number from 0 to 1, got {threshold}")
    return threshold


def _fold_background(scores: ScoreMap, labels: int) -> ScoreMap:
    """Merge the columns after the first `labels` into one background column at index 0."""
    rest = scores.palette[:, labels:].amax(dim=1, keepdim=True)
    return ScoreMap(torch.cat((rest, scores.palette[:, :labels]), dim=1), scores.index, scores.regions)


def _finish(scores: ScoreMap, photo: np.ndarray, names: tuple[str, ...], snap: bool) -> Segmentation:
    """Score map of the resized photo -> result at the photo's own size (protocol step 6)."""
    height, width = photo.shape[:2]
    if snap:
        means, superpixels = superpixel_scores(scores, photo_superpixels(photo))  # (S, C), (H, W)
        best, winner = means.max(dim=1)
        labels, values = winner[superpixels], best[superpixels]
    else:
        labels, values = scores.arg_max(height, width)
    rows, columns = (
        ((2 * np.arange(target) + 1) * source) // (2 * target)  # nearest: the pixel under each centre
        for source, target in zip(scores.regions.shape, (height, width), strict=True)
    )
    regions = scores.regions.numpy()[rows[:, None], columns]
    return Segmentation(labels.numpy(), values.numpy(), regions, names, photo)


# --- pictures ----------------------------------------------------------------------------------------------


def distinct_colours(count: int) -> np.ndarray:
    """Colours that stay apart, (count, 3) uint8; the first ones do not change with `count`."""
    table = _colour_table()
    return table[np.arange(count) % len(table)]


@functools.cache
def _colour_table() -> np.ndarray:
    """All colours to choose from, each the one farthest from those before it, (563, 3) uint8.

    They lie on a grid in OKLab, where distances follow the eye: 40 hues, five levels of lightness (none too
    dark or light for a photo) and of chroma, as far as sRGB can show them. The first is the reddest.
    """
    light, chroma, turn = np.meshgrid(
        [0.52, 0.60, 0.68, 0.76, 0.84], [0.08, 0.12, 0.16, 0.20, 0.24], np.arange(40) / 40, indexing="ij"
    )
    hue = 2 * np.pi * turn + 0.45
    lab = np.stack((light, chroma * np.cos(hue), chroma * np.sin(hue)), axis=-1).reshape(-1, 3)
    linear = (lab @ _LAB_TO_CONES.T) ** 3 @ _CONES_TO_RGB.T
    shown = ((linear > -0.02) & (linear < 1.02)).all(axis=1)
    lab, linear = lab[shown], linear[shown].clip(0, 1)
    order, nearest = [int((linear @ [1, -1, -1]).argmax())], np.full(len(lab), np.inf)
    while len(order) < len(lab):
        nearest = np.minimum(nearest, np.linalg.norm(lab - lab[order[-1]], axis=1))
        order.append(int(nearest.argmax()))
    linear = linear[order]
    gamma = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.round(255.0 * gamma).astype(np.uint8)


def _row_blocks(labels: np.ndarray) -> list[slice]:
    """Rows in blocks of about a million pixels, so that float copies of a large photo stay small."""
    step = max(1, 2**20 // labels.shape[1])
    return [slice(start, start + step) for start in range(0, labels.shape[0], step)]


def _borders(labels: np.ndarray) -> np.ndarray:
    """Pixels where the label changes, (H, W) bool; the line grows with the photo."""
    line = np.zeros(labels.shape, dtype=bool)
    line[1:] |= labels[1:] != labels[:-1]
    line[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    for _ in range(round(min(labels.shape) / 400)):
        line[1:] |= line[:-1].copy()
        line[:, 1:] |= line[:, :-1].copy()
    return line


def _font(size: int) -> FreeTypeFont | ImageFont:
    from PIL import ImageFont

    try:
        return ImageFont.load_default(size=size)
    except TypeError:  # Pillow 10.0 has one size only
        return ImageFont.load_default()


def _with_legend(photo: PILImage, result: Segmentation) -> PILImage:
    """`photo` above a white strip that names the labels present, the largest first."""
    from PIL import Image, ImageDraw

    size = int(np.clip(math.sqrt(photo.width * photo.height) / 28, 12, 60))
    font, margin = _font(size), size // 2
    share = result.coverage
    present = sorted(
        (i for i, name in enumerate(result.names) if share[name] > 0), key=lambda i: -share[result.names[i]]
    )
    texts = [f"{result.names[i]}  {share[result.names[i]]:.0%}" for i in present]
    measure = ImageDraw.Draw(photo)
    widths = [size + margin + math.ceil(measure.textlength(text, font=font)) for text in texts]
    width = max(photo.width, max(widths) + 2 * margin)
    places, x, row = [], margin, 0
    for entry in widths:
        if x > margin and x + entry + margin > width:
            x, row = margin, row + 1
        places.append((x, photo.height + margin + row * (size + margin)))
        x += entry + 2 * margin
    canvas = Image.new("RGB", (width, photo.height + margin + (row + 1) * (size + margin)), "white")
    canvas.paste(photo, (0, 0))
    draw = ImageDraw.Draw(canvas)
    for i, text, (x, y) in zip(present, texts, places, strict=True):
        colour = tuple(int(c) for c in result.colours[i])
        fill = None if result.names[i] == BACKGROUND else colour  # the background is not painted
        draw.rectangle((x, y, x + size - 1, y + size - 1), fill=fill, outline=colour)
        draw.text((x + size + margin, y + size / 2), text, fill="black", font=font, anchor="lm")
    return canvas
