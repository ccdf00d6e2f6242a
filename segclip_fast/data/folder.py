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

from .images import load_image, load_segments
from .sample import RawSample

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
SEGMENTS = ".segments.png"


class FolderSource:
    """Every picture under a folder, sorted by path (an ImageTextSource without classes and masks).

    Hidden files and folders, whose names begin with a dot, are left out. Files are read when a sample is
    asked for; that every picture has its caption file, and its label map where those are used, is checked at
    once.

    Args:
        root: the folder.
        segments: read NAME.segments.png as `RawSample.segments`; every picture must have one.

    Attributes:
        pictures: paths of the pictures relative to `root`.

    Raises:
        FileNotFoundError: no such folder, no pictures in it, or a picture without caption or label map.
    """

    class_names: Sequence[str] = ()

    def __init__(self, root: str | Path, segments: bool = False) -> None:
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
            FileNotFoundError: a file has gone.
            ValueError: a broken file, no caption in it, or a label map of another size; names the file.
        """
        index = operator.index(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"index: expected 0 to {len(self) - 1}, got {index}")
        path = self.root / self.pictures[index]
        image = load_image(path, name="picture")
        captions = _captions(path.with_name(f"{path.stem}.txt"))
        segments = None
        if self.segments:
            file = path.with_name(f"{path.stem}{SEGMENTS}")
            segments = load_segments(file)
            if segments.shape != image.shape[:2]:
                size = f"{image.shape[:2]}, the (height, width) of {path.name}"
                raise ValueError(f"segments: expected {size}, got {segments.shape} in {str(file)!r}")
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


def _captions(path: Path) -> tuple[str, ...]:
    """The non-empty lines of a caption file."""
    if not path.is_file():
        raise FileNotFoundError(f"captions: expected an existing text file, got {str(path)!r}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"captions: expected UTF-8 text, got {str(path)!r} ({error})") from error
    lines = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not lines:
        raise ValueError(f"captions: expected at least one non-empty line, got none in {str(path)!r}")
    return lines
