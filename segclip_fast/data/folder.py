"""Your own pictures and captions: a folder, a text file beside every picture, label maps if you have them.

ROOT/any/depth/NAME.jpg            (.jpeg, .png, .webp)
ROOT/any/depth/NAME.txt            UTF-8, every non-empty line is a caption
ROOT/any/depth/NAME.segments.png   optional label map of the picture's size
"""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .._checks import require
from .images import load_segments
from .sample import RawSample, SampleError
from .shards import MAX_PIXELS, decode_picture

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
SEGMENTS = ".segments.png"
_GONE = (FileNotFoundError, IsADirectoryError, NotADirectoryError)


class FolderSource:
    """Every picture under a folder, sorted by path (an ImageTextSource without classes and masks).

    Hidden files and folders, whose names begin with a dot, are left out. Files are read when a sample is
    asked for; that every picture has its caption file, and its label map where those are used, is checked at
    once.

    Args:
        root: the folder.
        segments: read NAME.segments.png as `RawSample.segments`; every picture must have one.
        max_pixels: a picture of more pixels raises SampleError before it is decoded.

    Attributes:
        pictures: paths of the pictures relative to `root`.

    Raises:
        FileNotFoundError: no such folder, no pictures in it, or a picture without caption or label map.
        ValueError: `max_pixels` is not positive.
    """

    class_names: Sequence[str] = ()

    def __init__(self, root: str | Path, segments: bool = False, *, max_pixels: int = MAX_PIXELS) -> None:
        require(max_pixels > 0, "max_pixels", "a positive number", max_pixels)
        self.max_pixels = max_pixels
        self.root, self.segments = Path(root).absolute(), segments
        if not self.root.is_dir():
            raise FileNotFoundError(f"root: expected the folder of the pictures, got {str(root)!r}")
        self.pictures = _pictures(self.root, segments)
        if not self.pictures:
            endings = ", ".join(SUFFIXES)
            raise FileNotFoundError(f"root: expected pictures ({endings}), got none under {str(root)!r}")

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> RawSample:
        """Picture number `index` with its captions, the first of them as `caption`.

        Raises:
            IndexError: no such picture.
            SampleError: a file is gone or broken, the picture too large, no caption in the text file, or a
                label map of another size; the key is the picture's path.
        """
        index = operator.index(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"index: expected 0 to {len(self) - 1}, got {index}")
        path = self.root / self.pictures[index]
        key = str(path)
        try:
            image = decode_picture(path.read_bytes(), key, self.max_pixels)
        except _GONE:
            raise SampleError(key, "picture: expected an existing file, got none") from None
        captions = _captions(path.with_name(f"{path.stem}.txt"), key)
        segments = _segments(path, image) if self.segments else None
        several = captions if len(captions) > 1 else ()
        return RawSample(image, captions[0], segments=segments, captions=several)


def _pictures(root: Path, segments: bool) -> list[str]:
    """Relative paths, sorted; plain strings, since there may be millions and every worker holds them."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        names = set(files)
        for name in files:
            stem, suffix = os.path.splitext(name)  # noqa: PTH122 - a Path per file is slow and large
            if suffix.lower() not in SUFFIXES or name.startswith(".") or name.endswith(SEGMENTS):
                continue
            for wanted in (f"{stem}.txt", f"{stem}{SEGMENTS}")[: 1 + segments]:
                if wanted not in names:
                    missing = f"the file {wanted!r} beside {str(Path(folder) / name)!r}"
                    raise FileNotFoundError(f"root: expected {missing}, got none")
            found.append((Path(folder) / name).relative_to(root).as_posix())
    return sorted(found)


def _captions(path: Path, key: str) -> tuple[str, ...]:
    """The non-empty lines of a caption file; raises SampleError if there are none."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except _GONE:
        reason = f"captions: expected an existing text file, got {str(path)!r}"
        raise SampleError(key, reason) from None
    except UnicodeDecodeError as error:
        reason = f"captions: expected UTF-8 text, got {str(path)!r} ({error})"
        raise SampleError(key, reason) from error
    lines = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not lines:
        raise SampleError(key, f"captions: expected at least one non-empty line, got none in {str(path)!r}")
    return lines


def _segments(path: Path, image: np.ndarray) -> np.ndarray:
    """(H, W) int32 label map of the picture (H, W, 3) at `path`; raises SampleError if it has none."""
    file = path.with_name(f"{path.stem}{SEGMENTS}")
    try:
        segments = load_segments(file)
    except (FileNotFoundError, ValueError) as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno is not None:
            raise cause from None  # the disk or its rights, not this file's content
        raise SampleError(str(path), str(error)) from error
    if segments.shape != image.shape[:2]:
        size = f"{image.shape[:2]}, the (height, width) of {path.name}"
        raise SampleError(str(path), f"segments: expected {size}, got {segments.shape} in {str(file)!r}")
    return segments
