"""Superpixels of stored pictures, kept on disk over epochs and runs.

    FOLDER/ab/cdef....png   label map of one picture under one setting, found by a hash of both

Shapes: H, W pixels.
"""

from __future__ import annotations

import hashlib
import io
import logging
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..interop.files import write_whole
from .images import _DECODE_ERRORS
from .sample import RawSample, Segmenter

_VERSION = 1  # of the files and of what the segmenters compute: a new one finds none of the old files
_MOST = 2**16  # different labels that 16 bits hold
_CHECK = "check"  # text chunk with the hash: Pillow checks none of PNG's own sums of the pixels
_warned: set[str] = set()  # what this process has warned of
_log = logging.getLogger("segclip_fast")


class CachedSegmenter:
    """A segmenter that looks for a picture's label map on disk before it makes one.

    A file is found by what the picture shows, not by its name, so that sources may be renamed, mixed and
    shared among runs. Files are written whole or not at all; processes may write to one folder at once. One
    that is damaged or of something else is made anew. Where nothing can be written, as on a full disk, and
    for a picture with a label above 65,535, labels are computed every time. The log says each of these once
    per process.

    Args:
        segmenter: makes the label maps; must give the same for the same picture.
        folder: of the files; made when needed. It may be deleted at any time.
        settings_key: everything besides the pixels that the label maps depend on.
    """

    def __init__(self, segmenter: Segmenter, folder: str | Path, settings_key: str) -> None:
        self.segmenter, self.settings_key = segmenter, settings_key
        self.folder = Path(folder).expanduser().absolute()

    def __call__(self, picture: RawSample) -> np.ndarray:
        """(H, W) int64, the integers that the segmenter gives for `picture.image` (H, W, 3) uint8."""
        key = self._key(picture.image)
        file = self.folder / key[:2] / f"{key[2:]}.png"
        labels = _read(file, key, picture.image.shape[:2])
        if labels is None:
            labels = np.asarray(self.segmenter(picture)).astype(np.int64)
            self._keep(file, key, labels)
        return labels

    def _key(self, image: np.ndarray) -> str:
        """40 hexadecimal digits of the pixels and the settings."""
        settings = f"{_VERSION} {image.dtype} {image.shape} {self.settings_key}\n"
        found = hashlib.blake2b(settings.encode(), digest_size=20)
        found.update(np.ascontiguousarray(image).data)
        return found.hexdigest()

    def _keep(self, file: Path, key: str, labels: np.ndarray) -> None:
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= _MOST:
            got = f"one with labels from {low} to {high}"
            _warn_once("labels", f"label maps with labels from 0 to {_MOST - 1} are kept, not {got}")
            return
        values = labels.astype(np.uint16)
        info = PngInfo()
        info.add_text(_CHECK, _check(key, values))
        picture = Image.fromarray(values)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, lambda path: picture.save(path, "PNG", pnginfo=info))
        except OSError as error:
            _warn_once("write", f"superpixels are computed again each time, {str(file)!r} failed: {error}")


def _read(file: Path, key: str, size: tuple[int, ...]) -> np.ndarray | None:
    """(H, W) int64, or None if there is no usable file."""
    try:
        data = file.read_bytes()
    except OSError:  # if it is more than a missing file, writing it will say so
        return None
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as picture:
            values = np.asarray(picture)
            found = picture.info.get(_CHECK)
    except (*_DECODE_ERRORS, Image.DecompressionBombError):
        values, found = np.empty(0), None
    if values.shape != size or found is None or found != _check(key, values.astype(np.uint16)):
        _warn_once("read", f"superpixels: expected a label map kept earlier, got {str(file)!r}, made anew")
        return None
    return values.astype(np.int64)


def _check(key: str, values: np.ndarray) -> str:
    """Hash of a label map (H, W) uint16 and of what it belongs to."""
    found = hashlib.blake2b(key.encode(), digest_size=16)
    found.update(values.astype("<u2", order="C").data)
    return found.hexdigest()


def _warn_once(kind: str, message: str) -> None:
    if kind not in _warned:
        _warned.add(kind)
        _log.warning("%s (said once)", message)
