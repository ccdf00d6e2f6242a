"""What a model sees in a few fixed samples, as one picture that can be followed over a run.

A row for each sample; columns: the picture, its regions, the reconstruction of its hidden patches, the
segmentation by class names, the truth.

Shapes: S side of the training size, N patches, L centers, P = 3 patch^2, D side of a cell (S times a whole
number, so that small pictures can be looked at).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .._checks import require
from ..data.sample import IGNORE_LABEL, RawSample
from ..data.transforms import cut_segments, normalise, pixel_statistics, resized_crop
from ..evaluation.drawing import borders, distinct_colours
from ..evaluation.vocabularies import BACKGROUND
from ..evaluation.windows import evaluation_mode
from ..interop.files import write_whole
from ..model.reconstruction import mask_patches
from ..model.segclip import SegCLIP
from ..ops._dispatch import served_by

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont

    Font = FreeTypeFont | ImageFont

FOLDER = "pictures"  # in the run folder
SEED = 7  # of masks and Gumbel noise, always the same, so that pictures of one run compare
SMALLEST_CELL = 160  # pixels
GAP = 8  # pixels between cells
OPACITY = 0.55
NOTE_LINES = 2  # below a row: caption and legends
_NOT_COUNTED = (150, 150, 150)

Legend = tuple[tuple[str, tuple[int, int, int]], ...]


@dataclass(frozen=True, eq=False)
class Column:
    """One kind of picture of all samples.

    Attributes:
        title: what it shows.
        cells: (D, D, 3) uint8 for each sample.
        legends: for each sample the names present and their colours, the largest first; empty without.
    """

    title: str
    cells: tuple[np.ndarray, ...]
    legends: tuple[Legend, ...] = ()


@dataclass(frozen=True, eq=False)
class _Square:
    """A sample at the training size: image (S, S, 3) uint8, mask (S, S) or None."""

    image: np.ndarray
    mask: np.ndarray | None


def draw(
    model: SegCLIP,
    samples: Sequence[RawSample],
    class_names: Sequence[str] = (),
    *,
    threshold: float | None = None,
) -> np.ndarray:
    """One picture of all samples, with captions and the names found in them.

    Mode, gradients and global random states stay as they were. The same model gives the same picture.

    Args:
        model: on any device, in training or evaluation mode.
        samples: pictures of any size; their central squares are taken at the training size.
        class_names: what to look for, in the order of the masks' indices; if the first one is "background",
            it is found by threshold. None leaves the segmentation out.
        threshold: of the background, see `segment_batch`.

    Returns:
        (height, width, 3) uint8 RGB.

    Raises:
        ValueError: no sample, one with an unusable image or mask, or unusable class names.
    """
    shown = columns(model, samples, class_names, threshold=threshold)
    return _compose(shown, [" ".join(sample.caption.split()) for sample in samples])


def columns(
    model: SegCLIP,
    samples: Sequence[RawSample],
    class_names: Sequence[str] = (),
    *,
    threshold: float | None = None,
) -> list[Column]:
    """The parts of `draw`: those that model, class names and masks allow for."""
    require(len(samples) > 0, "samples", "at least one sample", len(samples))
    size = model.image_size
    squares = [_square(sample, number, size) for number, sample in enumerate(samples)]
    masks = [square.mask for square in squares if square.mask is not None]
    names = tuple(class_names) or tuple(str(label) for label in range(_labels_in(masks)))
    require(
        not class_names or _labels_in(masks) <= len(names),
        "class_names",
        f"a name for each of the {_labels_in(masks)} labels of the masks",
        list(class_names),
    )
    scale = -(-SMALLEST_CELL // size)
    large = [_enlarge(square.image, scale) for square in squares]
    with evaluation_mode(model):
        regions = [_enlarge(_regions(model, square.image), scale) for square in squares]
        shown = [Column("picture", tuple(large)), _regions_column(large, regions, model)]
        if model.reconstruction is not None:
            filled = (_reconstructed(model, square.image, i) for i, square in enumerate(squares))
            shown.append(Column("reconstruction", tuple(_enlarge(pixels, scale) for pixels in filled)))
        if class_names:
            found = _segmented(model, squares, names, threshold)
            labels: list[np.ndarray | None] = [_enlarge(part, scale) for part in found]
            shown.append(_labels_column("segmentation", large, labels, names))
    if masks:
        truth = [None if square.mask is None else _enlarge(square.mask, scale) for square in squares]
        shown.append(_labels_column("truth", large, truth, names, ignore=True))
    return shown


def write(run: Path, step: int, picture: np.ndarray) -> Path:
    """Write a picture as RUN/pictures/step-000100.png, whole or not at all.

    Args:
        run: the run folder.
        step: finished steps.
        picture: (height, width, 3) uint8.

    Returns:
        The file.

    Raises:
        ValueError: no picture, or a negative step.
    """
    from PIL import Image

    _check_picture(picture, "picture")
    require(step >= 0, "step", "a number of at least 0", step)
    path = run / FOLDER / f"step-{step:06d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(picture)
    write_whole(path, lambda temporary: image.save(temporary, format="PNG"))
    return path


# --- samples -----------------------------------------------------------------------------------------------


def _check_picture(image: np.ndarray, name: str) -> None:
    good = isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3
    good = good and image.shape[2] == 3 and image.size > 0
    got = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
    require(good, name, "a (H, W, 3) uint8 array", got)


def _square(sample: RawSample, number: int, size: int) -> _Square:
    """The central square at the training size, bicubic like a training crop; its mask by nearest pixels."""
    image, mask, name = sample.image, sample.mask, f"samples[{number}]"
    _check_picture(image, f"{name}.image")
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    if mask is not None:
        good = mask.shape == (height, width) and np.issubdtype(mask.dtype, np.integer) and mask.min() >= 0
        wanted = f"a mask of {(height, width)} integers of at least 0"
        require(bool(good), f"{name}.mask", wanted, f"{mask.dtype} {mask.shape}")
        mask = cut_segments(mask[top : top + side, left : left + side], (0, 0, side, side), size)
    return _Square(resized_crop(image, (top, left, side, side), size), mask)


def _labels_in(masks: Sequence[np.ndarray]) -> int:
    """One more than the largest label that counts."""
    return max((int(mask.max(initial=-1, where=mask != IGNORE_LABEL)) + 1 for mask in masks), default=0)


def _enlarge(values: np.ndarray, scale: int) -> np.ndarray:
    """Every pixel of (S, S) or (S, S, 3) `scale` times in both directions."""
    return values.repeat(scale, axis=0).repeat(scale, axis=1)


# --- the model's view --------------------------------------------------------------------------------------


def _input(model: SegCLIP, image: np.ndarray) -> Tensor:
    """(1, 3, S, S) normalised, in type and place of the weights."""
    return normalise(image)[None].to(model.logit_scale)


def _regions(model: SegCLIP, image: np.ndarray) -> np.ndarray:
    """The region of each pixel, (S, S) in 0..L-1, from the hard assignment of its patch."""
    patch, size = model.patch_size, model.image_size
    of_patch = model.encode_image(_input(model, image)).hard[0].argmax(dim=0).cpu().numpy()  # (N,)
    return _enlarge(of_patch.reshape(size // patch, size // patch), patch)


def _reconstructed(model: SegCLIP, image: np.ndarray, number: int) -> np.ndarray:
    """(S, S, 3) uint8: visible patches as they are, hidden ones as predicted from the visible."""
    assert model.reconstruction is not None
    patch, size = model.patch_size, model.image_size
    grid, pixels = size // patch, _input(model, image)
    # Drawn on the CPU: the same patches are hidden whatever the device.
    noise = model.draw_noise(pixels.cpu(), torch.Generator().manual_seed(SEED + number))
    masking = mask_patches(noise.mask.to(pixels.device), model.config.reconstruction.kept(grid * grid))
    with served_by(model.backend):
        visible = model.vision.encode_patches(masking.select(model.vision.embed(pixels)))
        grouping = model.vision.grouping(visible, noise.masked.to(pixels.device))
        predicted = model.reconstruction(grouping.regions, grouping.hard, masking)[0]  # (N, P)
    tiles = predicted.float().cpu().reshape(grid, grid, patch, patch, 3)
    values = tiles.permute(4, 0, 2, 1, 3).reshape(3, size, size)
    mean, deviation = pixel_statistics(values.device)
    colours = (values * deviation + mean).nan_to_num().clamp(0, 255).round().byte()
    hidden = masking.hidden[0].bool().cpu().numpy().reshape(grid, grid)
    return np.where(_enlarge(hidden, patch)[..., None], colours.permute(1, 2, 0).numpy(), image)


def _segmented(
    model: SegCLIP, squares: Sequence[_Square], names: tuple[str, ...], threshold: float | None
) -> list[np.ndarray]:
    """The label (S, S) of every pixel, an index into `names`."""
    background = names[0] == BACKGROUND
    images = [square.image for square in squares]
    labels = names[int(background) :]
    found = model.segment_batch(images, labels, background=background, threshold=threshold)
    return [result.labels for result in found]


# --- paint -------------------------------------------------------------------------------------------------


def _regions_column(pictures: list[np.ndarray], regions: list[np.ndarray], model: SegCLIP) -> Column:
    colours = distinct_colours(model.config.grouping.centers)
    opacity = np.full(len(colours), OPACITY)
    cells = [_paint(*parts, colours, opacity) for parts in zip(pictures, regions, strict=True)]
    return Column("regions", tuple(cells))


def _labels_column(
    title: str,
    pictures: list[np.ndarray],
    maps: list[np.ndarray | None],
    names: tuple[str, ...],
    ignore: bool = False,
) -> Column:
    """Painted labels with legends; pixels not counted are grey, the background stays as it is.

    A sample without a map has an empty cell.
    """
    first = int(names[:1] == (BACKGROUND,))
    colours = np.zeros((len(names) + 1, 3), dtype=np.uint8)
    colours[first:-1], colours[-1] = distinct_colours(len(names) - first), _NOT_COUNTED
    opacity = np.full(len(colours), OPACITY)
    opacity[:first] = 0.0
    cells: list[np.ndarray] = []
    legends: list[Legend] = []
    for picture, labels in zip(pictures, maps, strict=True):
        if labels is None:
            cells.append(np.full_like(picture, 240))
            legends.append(())
            continue
        known = np.where(labels == IGNORE_LABEL, len(names), labels) if ignore else labels
        cells.append(_paint(picture, known, colours, opacity))
        counts = np.bincount(known.ravel(), minlength=len(colours))[first:-1]
        order = first + np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
        legends.append(tuple((names[i], tuple(colours[i].tolist())) for i in order))
    return Column(title, tuple(cells), tuple(legends))


def _paint(picture: np.ndarray, labels: np.ndarray, colours: np.ndarray, opacity: np.ndarray) -> np.ndarray:
    """`picture` (D, D, 3) under the colours (C, 3) of its labels (D, D), with white lines between them."""
    share = opacity[labels][..., None]
    painted = np.round(picture * (1.0 - share) + colours[labels] * share).astype(np.uint8)
    painted[borders(labels)] = 255
    return painted


# --- composition -------------------------------------------------------------------------------------------


def _compose(shown: Sequence[Column], captions: Sequence[str]) -> np.ndarray:
    """Titles, rows of cells, and below each row its caption and legends."""
    from PIL import Image, ImageDraw, ImageFont

    side = shown[0].cells[0].shape[0]
    size = max(12, side // 15)
    font, line = ImageFont.load_default(size), round(1.4 * size)
    noted = any(captions) or any(any(column.legends) for column in shown)
    row = side + GAP + (line * NOTE_LINES + GAP if noted else 0)
    step = side + GAP
    canvas = Image.new("RGB", (GAP + step * len(shown), GAP + line + row * len(captions)), "white")
    ink = ImageDraw.Draw(canvas)
    plain = sum(not column.legends for column in shown)  # these come first
    for number, column in enumerate(shown):
        left = GAP + number * step
        ink.text((left, GAP // 2), column.title, fill=(60, 60, 60), font=font)
        for index, cell in enumerate(column.cells):
            top = GAP + line + index * row
            canvas.paste(Image.fromarray(cell), (left, top))
            if column.legends:
                _draw_legend(ink, (left, top + side + GAP // 2), side, column.legends[index], font, line)
    for index, caption in enumerate(captions):
        top = GAP + line + index * row + side + GAP // 2
        for number, text in enumerate(_wrapped(ink, caption, plain * step - GAP, font)):
            ink.text((GAP, top + number * line), text, fill="black", font=font)
    return np.array(canvas)


def _draw_legend(
    ink: ImageDraw, place: tuple[int, int], width: int, legend: Legend, font: Font, line: int
) -> None:
    """Coloured squares with their names, as many as fit; the rest is counted."""
    chip = line // 2
    names = [_cut(ink, name, width - 2 * chip, font) for name, _ in legend]
    for count in range(len(legend), -1, -1):
        rest = [f"+{len(legend) - count}"] if count < len(legend) else []
        entries = names[:count] + rest
        places = _flow([2 * chip + ink.textlength(text, font=font) for text in entries], width, chip)
        if len(places) == len(entries):
            break
    for number, (text, (x, row)) in enumerate(zip(entries, places, strict=True)):
        left, top = place[0] + round(x), place[1] + row * line
        if number < count:
            box = (left, top + chip // 2, left + chip - 1, top + chip // 2 + chip - 1)
            ink.rectangle(box, fill=legend[number][1])
            left += round(1.5 * chip)
        ink.text((left, top), text, fill="black", font=font)


def _flow(extents: Sequence[float], width: int, gap: int) -> list[tuple[float, int]]:
    """Offset and line of each entry, as many as fit into the lines."""
    places: list[tuple[float, int]] = []
    x, row = 0.0, 0
    for extent in extents:
        if x and x + extent > width:
            x, row = 0.0, row + 1
        if row == NOTE_LINES:
            break
        places.append((x, row))
        x += extent + gap
    return places


def _wrapped(ink: ImageDraw, text: str, width: int, font: Font) -> list[str]:
    """At most `NOTE_LINES` lines of `text`; what does not fit is cut."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        fits = lines and ink.textlength(longer, font=font) <= width
        if fits or len(lines) == NOTE_LINES:
            lines[-1] = longer
        else:
            lines.append(word)
    return [_cut(ink, entry, width, font) for entry in lines]


def _cut(ink: ImageDraw, text: str, width: int, font: Font) -> str:
    """`text`, or as much of its beginning as fits."""
    kept = text
    while len(kept) > 1 and ink.textlength(kept + "..." * (kept != text), font=font) > width:
        kept = kept[:-1]
    return kept if kept == text else kept.rstrip() + "..."
