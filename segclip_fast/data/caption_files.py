"""Pictures whose captions lie in one file: COCO's annotations, Karpathy's splits, and tables (CSV, TSV)."""

from __future__ import annotations

import csv
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from .._checks import require
from .sample import RawSample
from .shard_index import PackedStrings, checked_index
from .shards import MAX_PIXELS, SampleError, clean_caption, decode_picture

_log = logging.getLogger("segclip_fast")


class _CaptionedFiles:
    """Samples that are one picture file and one or several captions each (an ImageTextSource).

    Attributes:
        pictures: path of each sample's picture.
    """

    class_names: Sequence[str] = ()

    def __init__(
        self, pairs: Iterator[tuple[Path, list[str]]], what: str, check: bool, max_pixels: int
    ) -> None:
        require(max_pixels > 0, "max_pixels", "a positive number", max_pixels)
        self.max_pixels = max_pixels
        captions: list[str] = []
        ends: list[int] = []

        def paths() -> Iterator[str]:
            checked = ""
            for path, texts in pairs:
                name = str(path)
                if check and name != checked and not os.path.isfile(name):  # noqa: PTH113 - millions of them
                    row = f"(sample {len(ends)}; check=False leaves this to reading)"
                    raise FileNotFoundError(f"{what}: expected the picture {name!r}, got no such file {row}")
                checked = name
                captions.extend(texts)
                ends.append(len(captions))
                yield name

        self.pictures: Sequence[str] = PackedStrings.of(paths())
        self._captions, self._ends = PackedStrings.of(captions), np.array(ends, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> RawSample:
        """Sample number `index`.

        Raises:
            IndexError: no such sample.
            SampleError: the picture is missing, broken or too large, or has no text; the key is its path.
        """
        index = checked_index(index, len(self))
        key = self.pictures[index]
        first = int(self._ends[index - 1]) if index else 0
        texts = [self._captions[number] for number in range(first, int(self._ends[index]))]
        texts = [text for text in texts if text.strip()] or [""]
        captions = tuple(clean_caption(text, key) for text in texts)
        try:
            data = Path(key).read_bytes()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise SampleError(key, "picture: expected an existing file, got none") from None
        image = decode_picture(data, key, self.max_pixels)
        return RawSample(image, captions[0], captions=captions if len(captions) > 1 else ())


class CocoCaptions(_CaptionedFiles):
    """Pictures with the captions of COCO: the official annotations, or Karpathy's `dataset_coco.json`.

    Which of the two a file is, its content says. Karpathy's pictures lie in `images`/filepath/filename, or
    all in `images`. The order is that of the pictures in the file; pictures without captions are left out.

    Args:
        images: folder of the pictures.
        annotations: captions_train2017.json or another of its kind, or dataset_coco.json (also of Flickr30k).
        split: Karpathy's "train" (the default there), "val", "test" or "restval"; None with official files.
        restval: take Karpathy's "restval" to "train", as usual: 113,287 pictures in place of 82,783.
        one_per_image: a sample per picture, with all its `captions`; else every caption is a sample.
        check: look for every picture at once, not only when it is read.
        max_pixels: a picture of more pixels raises SampleError before it is decoded.

    Raises:
        FileNotFoundError: no such file or folder, or a missing picture; names the first.
        ValueError: not JSON, not such a file, or an unknown split.
    """

    def __init__(
        self,
        images: str | Path,
        annotations: str | Path,
        *,
        split: str | None = None,
        restval: bool = False,
        one_per_image: bool = False,
        check: bool = True,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        folder, file = Path(images).absolute(), Path(annotations)
        if not folder.is_dir():
            raise FileNotFoundError(f"images: expected the folder of the pictures, got {str(images)!r}")
        with _reading(file, "annotations"):
            content = json.loads(file.read_text(encoding="utf-8-sig"))
        if not isinstance(content, dict) or not isinstance(content.get("images"), list):
            got = sorted(content)[:8] if isinstance(content, dict) else type(content).__name__
            expected = f"captions in COCO's or Karpathy's form in {str(file)!r}"
            raise ValueError(f"annotations: expected {expected}, got {got}")
        try:
            if "annotations" in content:
                official = "None with official annotations, which are of one split"
                require(split is None, "split", official, split)
                require(not restval, "restval", "False with official annotations", restval)
                found = _official(content)
            else:
                found = _karpathy(content, split or "train", restval)
        except (KeyError, TypeError, AttributeError) as error:
            expected = "captions in COCO's form (images with id and file_name, annotations with image_id and "
            expected += "caption) or Karpathy's (images with filename, split and sentences with raw)"
            got = f"{str(file)!r} with other entries ({type(error).__name__}: {error})"
            raise ValueError(f"annotations: expected {expected}, got {got}") from error
        bare = sum(not texts for _, texts in found)
        if bare:
            _log.warning("%d of %d pictures of %s have no caption: left out", bare, len(found), file)
        require(bare < len(found), "annotations", "captions", f"none in {str(file)!r}")
        super().__init__(_samples(folder, found, one_per_image), "images", check, max_pixels)


class TableSource(_CaptionedFiles):
    """One row of a table per pair, as in the file of open_clip's `--train-data` with `--dataset-type csv`.

    The first row names the columns. Fields may be quoted as in CSV, quotes inside doubled; UTF-8, with or
    without byte order mark. Empty lines are skipped.

    Args:
        path: the file.
        image_column: column of the picture's path; a relative one begins at the table's folder.
        caption_column: column of the caption.
        separator: one character; None takes a tab if the first row contains one, else a comma.
        check: look for every picture at once, not only when it is read.
        max_pixels: a picture of more pixels raises SampleError before it is decoded.

    Raises:
        FileNotFoundError: no such table, or a missing picture; names the first.
        ValueError: no such columns (the error lists those found), no rows, a row with another number of
            fields, a quote that is not closed, or not UTF-8.
    """

    def __init__(
        self,
        path: str | Path,
        image_column: str = "filepath",
        caption_column: str = "title",
        separator: str | None = None,
        *,
        check: bool = True,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        single = separator is None or (len(separator) == 1 and separator not in '"\r\n')
        require(single, "separator", "one character, no quote or line break", separator)
        rows = _rows(Path(path).absolute(), image_column, caption_column, separator)
        super().__init__(rows, "path", check, max_pixels)
        require(len(self) > 0, "path", "at least one row below the names of the columns", str(path))


@contextmanager
def _reading(file: Path, name: str) -> Iterator[None]:
    """Errors of reading a text file, in the house form."""
    if not file.is_file():
        raise FileNotFoundError(f"{name}: expected an existing file, got {str(file)!r}")
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: expected UTF-8 text, got {str(file)!r} ({error})") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{name}: expected a JSON file, got {str(file)!r} ({error})") from error


def _official(content: dict[str, Any]) -> list[tuple[list[str], list[str]]]:
    """(candidate path parts, captions) of each picture."""
    captions: dict[int, list[str]] = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        picture = annotation["image_id"]
        require(picture in captions, "annotations", "an image_id among the images", picture)
        captions[picture].append(_text(annotation["caption"]))
    return [([image["file_name"]], captions[image["id"]]) for image in content["images"]]


def _karpathy(content: dict[str, Any], split: str, restval: bool) -> list[tuple[list[str], list[str]]]:
    """(candidate path parts, captions) of each picture of the split."""
    known = {image["split"] for image in content["images"]}
    require(split in known, "split", f"one of {sorted(known)}", split)
    require(not restval or split == "train", "restval", "False with a split other than train", restval)
    wanted = {split, "restval"} if restval else {split}
    chosen = [image for image in content["images"] if image["split"] in wanted]
    return [
        ([image.get("filepath", ""), image["filename"]], [_text(each["raw"]) for each in image["sentences"]])
        for image in chosen
    ]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a caption of type {type(value).__name__}")
    return value


def _samples(
    folder: Path, found: list[tuple[list[str], list[str]]], one_per_image: bool
) -> Iterator[tuple[Path, list[str]]]:
    """Path and captions of each sample; a subfolder that does not exist is left out of the path."""
    exists: dict[str, bool] = {}
    for (*within, name), captions in found:
        below = within[0] if within else ""
        if below not in exists:
            exists[below] = (folder / below).is_dir()
        path = folder / (below if exists[below] else "") / name
        if one_per_image and captions:
            yield path, captions
        elif not one_per_image:
            yield from ((path, [caption]) for caption in captions)


def _rows(path: Path, image: str, caption: str, separator: str | None) -> Iterator[tuple[Path, list[str]]]:
    """Picture and caption of each row."""
    with _reading(path, "path"), path.open(encoding="utf-8-sig", newline="") as file:
        first = file.readline()
        file.seek(0)
        reader = csv.reader(file, delimiter=separator or ("\t" if "\t" in first else ","), strict=True)
        try:
            header = next(reader, [])
            absent = [name for name in (image, caption) if name not in header]
            require(not absent, "path", f"columns {absent} in the first row of {str(path)!r}", header)
            picture_at, caption_at = header.index(image), header.index(caption)
            for row in reader:
                if row and len(row) != len(header):
                    where = f"in line {reader.line_num} of {str(path)!r}"
                    raise ValueError(f"path: expected {len(header)} fields, got {len(row)} {where}")
                if row:
                    yield path.parent / row[picture_at], [row[caption_at]]
        except csv.Error as error:
            where = f"{str(path)!r}, line {reader.line_num}: {error}"
            raise ValueError(f"path: expected rows with closed quotes, got {where}") from error
