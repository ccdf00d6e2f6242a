"""The standard data sets of zero-shot segmentation, read from their folders (nothing is downloaded).

voc, voc20          1,449 images, 20 classes with and without background; 255 is not counted, in voc20 nor 0
    VOC2012: ImageSets/Segmentation/val.txt, JPEGImages, SegmentationClass
context, context59  5,105 images, 59 classes with and without background; in context59, 0 is not counted
    VOC2010: ImageSets/SegmentationContext/val.txt, JPEGImages, SegmentationClassContext
coco_object         5,000 images, 80 classes and background; every pixel counts
    images/val2017, annotations/val2017/*_instanceTrainIds.png, which `prepare` makes
coco_stuff          5,000 images, 171 classes; 255 is not counted
    images/val2017, annotations/val2017/*.png, the pixel maps (stuffthingmaps) as published
ade20k              2,000 images, 150 classes; 0 is not counted
    ADEChallengeData2016: images/validation, annotations/validation
cityscapes          500 images, 19 classes; 255 is not counted
    leftImg8bit/val, gtFine/val/*/*_gtFine_labelTrainIds.png
folder              your own: any number of images and classes; 255 is not counted
    images, masks (PNG, 0 is the first line of labels.txt), labels.txt (a first line "background" is found
    by threshold)

Shape legend: H W pixels of an image.
"""

from __future__ import annotations

import operator
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..data.images import load_image
from ..data.sample import IGNORE_LABEL, RawSample
from .class_names import (
    ADE20K_CLASSES,
    CITYSCAPES_CLASSES,
    COCO_OBJECT_CLASSES,
    COCO_STUFF_CLASSES,
    CONTEXT_CLASSES,
    VOC_CLASSES,
)
from .label_maps import coco_stuff_table, label_table, read_labels
from .prompts import check_labels
from .vocabularies import BACKGROUND, CONTEXT, VOC

FOLDER_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


# --- a data set --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LabelledImage(RawSample):
    """An image and its ground truth.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        mask: (H, W) int64, an index into the set's `class_names`, 255 = ignore.
        identifier: the file's name without folder of the set and ending.
        caption: always empty.
    """

    caption: str = ""
    identifier: str = ""


@dataclass(frozen=True)
class Entry:
    """One image of a set: its identifier, and both files as paths below the root."""

    identifier: str
    picture: str
    mask: str


class SegmentationSet:
    """Images with ground truth, in a fixed order (an `ImageTextSource`); files are read when asked for.

    Attributes:
        name: the data set's name.
        root: the folder that all paths start from.
        class_names: one for each label, as the data set calls them; "background" comes first if there is one.
        prompts: the text for each class but the background, as the authors' evaluation puts it.
        background: label 0 is the background, found by a threshold and not by a prompt.
        entries: the files.
        table: (256,) int64, see `label_maps`.
    """

    class_names: Sequence[str]

    def __init__(
        self,
        name: str,
        root: str | Path,
        entries: Sequence[Entry],
        class_names: Sequence[str],
        prompts: Sequence[str],
        background: bool,
        table: np.ndarray,
    ) -> None:
        if len(prompts) + int(background) != len(class_names):
            wanted = len(class_names) - int(background)
            raise ValueError(f"prompts: expected {wanted} of them, got {len(prompts)}")
        self.name, self.root, self.entries = name, Path(root).absolute(), tuple(entries)
        self.class_names, self.prompts = tuple(class_names), tuple(prompts)
        self.background, self.table = background, table

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> LabelledImage:
        """Image number `index` with its mask.

        Raises:
            IndexError: no such image.
            FileNotFoundError: a file has gone.
            ValueError: a broken file, a mask of another size than its image, or labels that the set has not.
        """
        index = operator.index(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"index: expected 0 to {len(self) - 1}, got {index}")
        entry = self.entries[index]
        image = load_image(self.root / entry.picture, name="image")
        path = self.root / entry.mask
        mask = read_labels(path, self.table)
        if mask.shape != image.shape[:2]:
            size = f"{image.shape[:2]}, the (height, width) of {entry.picture}"
            raise ValueError(f"mask: expected {size}, got {mask.shape} in {str(path)!r}")
        return LabelledImage(image, mask=mask, identifier=entry.identifier)


# --- the standard layouts ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Layout:
    """A standard data set on disk; `{}` in its paths is the identifier, listed or known by its pattern."""

    names: tuple[str, ...]
    prompts: tuple[str, ...]
    table: np.ndarray
    images: int
    picture: str
    mask: str
    identifier: str = ""
    listing: str = ""
    homes: tuple[str, ...] = ()  # the root may be this far above
    background: bool = False
    hint: str = ""


def _voc(background: bool) -> _Layout:
    return _Layout(
        names=(BACKGROUND, *VOC_CLASSES) if background else VOC_CLASSES,
        prompts=VOC.labels,
        table=label_table(len(VOC_CLASSES) + background, skip_zero=not background),
        images=1449,
        picture="JPEGImages/{}.jpg",
        mask="SegmentationClass/{}.png",
        listing="ImageSets/Segmentation/val.txt",
        homes=("VOC2012", "VOCdevkit/VOC2012"),
        background=background,
    )


def _context(background: bool) -> _Layout:
    return _Layout(
        names=(BACKGROUND, *CONTEXT_CLASSES) if background else CONTEXT_CLASSES,
        prompts=CONTEXT.labels,
        table=label_table(len(CONTEXT_CLASSES) + background, skip_zero=not background),
        images=5105,
        picture="JPEGImages/{}.jpg",
        mask="SegmentationClassContext/{}.png",
        listing="ImageSets/SegmentationContext/val.txt",
        homes=("VOC2010", "VOCdevkit/VOC2010"),
        background=background,
        hint="the maps of 60 labels and the list are made by mmsegmentation's pascal_context.py",
    )


def _coco(objects: bool) -> _Layout:
    names = (BACKGROUND, *COCO_OBJECT_CLASSES) if objects else COCO_STUFF_CLASSES
    return _Layout(
        names=names,
        prompts=names[int(objects) :],
        table=label_table(len(names), ignore=False) if objects else coco_stuff_table(),
        images=5000,
        picture="images/val2017/{}.jpg",
        mask="annotations/val2017/{}_instanceTrainIds.png" if objects else "annotations/val2017/{}.png",
        identifier=r"\d{12}",
        background=objects,
        hint="python -m segclip_fast.evaluation.prepare coco-object makes the maps" if objects else "",
    )


def _ade20k() -> _Layout:
    return _Layout(
        names=ADE20K_CLASSES,
        prompts=ADE20K_CLASSES,
        table=label_table(len(ADE20K_CLASSES), skip_zero=True),
        images=2000,
        picture="images/validation/{}.jpg",
        mask="annotations/validation/{}.png",
        identifier=r"ADE_val_\d{8}",
        homes=("ADEChallengeData2016",),
    )


def _cityscapes() -> _Layout:
    return _Layout(
        names=CITYSCAPES_CLASSES,
        prompts=CITYSCAPES_CLASSES,
        table=label_table(len(CITYSCAPES_CLASSES)),
        images=500,
        picture="leftImg8bit/val/{}_leftImg8bit.png",
        mask="gtFine/val/{}_gtFine_labelTrainIds.png",
        identifier=r"[^/]+/[^/]+_\d{6}_\d{6}",
        hint="cityscapesScripts' csCreateTrainIdLabelImgs makes the labelTrainIds maps",
    )


_LAYOUTS = {
    "voc": lambda: _voc(background=True),
    "voc20": lambda: _voc(background=False),
    "context": lambda: _context(background=True),
    "context59": lambda: _context(background=False),
    "coco_object": lambda: _coco(objects=True),
    "coco_stuff": lambda: _coco(objects=False),
    "ade20k": _ade20k,
    "cityscapes": _cityscapes,
}
DATASETS = (*_LAYOUTS, "folder")


def open_dataset(name: str, root: str | Path, *, partial: bool = False) -> SegmentationSet:
    """Open a data set of the table above; that all its files are there is checked at once.

    Args:
        name: one of `DATASETS`.
        root: the data set's folder.
        partial: accept another number of images than the data set has. Results on a part are not comparable
            with published ones. "folder" takes any number.

    Raises:
        FileNotFoundError: no such folder, or files of the data set are missing; the message names what was
            expected and the first file missing.
        ValueError: no such name, another number of images, a broken list of images or of classes.
    """
    if name not in DATASETS:
        raise ValueError(f"name: expected one of {', '.join(DATASETS)}, got {name!r}")
    base = Path(root).absolute()
    if not base.is_dir():
        raise FileNotFoundError(f"root: expected the folder of {name}, got {str(root)!r}")
    if name == "folder":
        return _open_folder(base)
    layout = _LAYOUTS[name]()
    start = layout.listing or layout.picture.split("/{}", maxsplit=1)[0]
    base = next((base / home for home in ("", *layout.homes) if (base / home / start).exists()), base)
    identifiers = _identifiers(name, base, layout)
    if len(identifiers) != layout.images and not partial:
        raise ValueError(
            f"root: expected the {layout.images} images of {name}, got {len(identifiers)} in {str(base)!r} "
            "(partial=True accepts a part of the data set)"
        )
    entries = [Entry(i, layout.picture.format(i), layout.mask.format(i)) for i in identifiers]
    return SegmentationSet(name, base, entries, layout.names, layout.prompts, layout.background, layout.table)


def _identifiers(name: str, base: Path, layout: _Layout) -> list[str]:
    """The images of the data set, all with both files there."""
    if layout.listing and not (base / layout.listing).is_file():
        raise _missing(name, base, layout, layout.listing)
    found = [_found(base, pattern, layout.identifier) for pattern in (layout.picture, layout.mask)]
    if layout.listing:
        identifiers = _lines(base / layout.listing, "list of images")
    else:
        identifiers = sorted(found[0] | found[1])
        if not identifiers:
            raise _missing(name, base, layout, layout.picture.format("*"))
    for identifier in identifiers:
        for pattern, there in zip((layout.picture, layout.mask), found, strict=True):
            if identifier not in there:
                raise _missing(name, base, layout, pattern.format(identifier))
    return identifiers


def _missing(name: str, base: Path, layout: _Layout, first: str) -> FileNotFoundError:
    parts = [part for part in (layout.listing, layout.picture, layout.mask) if part]
    wanted = ", ".join(part.format("*") for part in parts)
    hint = f" ({layout.hint})" if layout.hint else ""
    where = f"in {str(base)!r}, the first one missing is {first!r}"
    return FileNotFoundError(f"root: expected the files of {name}, {wanted}, {where}{hint}")


def _found(base: Path, pattern: str, identifier: str) -> set[str]:
    """Identifiers of the files that match `pattern`; any identifier if none is described."""
    folder, ending = pattern.split("/{}", maxsplit=1)
    rule = re.compile(identifier or ".+")
    names = (path.removesuffix(ending) for path in _files(base / folder) if path.endswith(ending))
    return {name for name in names if rule.fullmatch(name)}


def _files(folder: Path) -> list[str]:
    """Relative paths of all files below a folder but hidden ones; none if there is no such folder."""
    found = []
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inner = Path(place).relative_to(folder)
        found += [(inner / name).as_posix() for name in files if not name.startswith(".")]
    return found


def _lines(path: Path, what: str) -> list[str]:
    """The lines of a text file without outer blanks; blank lines may only be at the end.

    Raises:
        ValueError: not UTF-8, no line, a blank one, or one that occurs twice.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").rstrip().split("\n")]
    except UnicodeDecodeError as error:
        raise ValueError(f"{what}: expected UTF-8 text, got {str(path)!r} ({error})") from error
    seen: set[str] = set()
    for number, line in enumerate(lines, start=1):
        if not line or line in seen:
            kind = f"{line!r} twice" if line else "a blank line"
            raise ValueError(f"{what}: expected distinct lines, got {kind} in line {number} of {str(path)!r}")
        seen.add(line)
    return lines


# --- the user's own folder ---------------------------------------------------------------------------------


def _open_folder(base: Path) -> SegmentationSet:
    listing = base / "labels.txt"
    if not listing.is_file():
        wanted = "images/*, masks/*.png and labels.txt"
        raise FileNotFoundError(
            f"root: expected {wanted} in {str(base)!r}, the first one missing is 'labels.txt'"
        )
    names = _lines(listing, "labels.txt")
    background = names[0].casefold() == BACKGROUND
    if background:
        names[0] = BACKGROUND
    if not 1 + background <= len(names) <= IGNORE_LABEL:
        wanted = f"at least one class besides the background and at most {IGNORE_LABEL} lines"
        raise ValueError(f"labels.txt: expected {wanted}, got {len(names)} in {str(listing)!r}")
    try:
        check_labels(names, "labels.txt")
    except ValueError as error:
        raise ValueError(f"{error} in {str(listing)!r}") from error
    prompts = names[int(background) :]
    return SegmentationSet("folder", base, _pairs(base), names, prompts, background, label_table(len(names)))


def _pairs(base: Path) -> list[Entry]:
    """Every picture below images/ with the mask of the same name below masks/.

    Raises:
        FileNotFoundError: none, or one without the other.
        ValueError: two pictures for one mask.
    """
    pictures: dict[str, str] = {}
    for path in sorted(_files(base / "images")):
        stem, dot, ending = path.rpartition(".")
        if f"{dot}{ending}".lower() not in FOLDER_SUFFIXES:
            continue
        if stem in pictures:
            raise ValueError(f"root: expected one picture for a mask, got {pictures[stem]!r} and {path!r}")
        pictures[stem] = path
    masks = {path[: -len(".png")] for path in _files(base / "masks") if path.endswith(".png")}
    everything = sorted(pictures.keys() | masks)
    first = "" if everything else f"images/* ({', '.join(FOLDER_SUFFIXES)})"
    for stem in everything:
        if stem not in pictures or stem not in masks:
            first = f"masks/{stem}.png" if stem in pictures else f"images/{stem}.jpg"
            break
    if first:
        where = f"in {str(base)!r}, the first one missing is {first!r}"
        raise FileNotFoundError(f"root: expected a picture in images/ for each mask in masks/, {where}")
    return [Entry(stem, f"images/{pictures[stem]}", f"masks/{stem}.png") for stem in everything]
