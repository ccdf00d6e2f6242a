"""Image-text pairs in tar shards (webdataset's convention), read in any order.

    SHARD.tar: KEY.jpg (.jpeg, .png, .webp)   one picture
               KEY.txt                        its caption, UTF-8; or
               KEY.json                       with the caption in the field "caption"

KEY is a member's path up to the first dot of its base name; its members may lie anywhere in the shard.
"""

from __future__ import annotations

import functools
import io
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from .._checks import require
from .images import _DECODE_ERRORS, load_image
from .sample import RawSample
from .sample import SampleError as SampleError
from .shard_index import checked_index, load_or_make_index, matching_shards

MAX_PIXELS = 64_000_000
_FORMATS = ("JPEG", "PNG", "WEBP")
_OPEN_SHARDS = 128  # descriptors a process keeps; the usual limit is 1024
_log = logging.getLogger("segclip_fast")


class ShardSource:
    """The pairs of tar shards, in the order of the shards and of the members in them (an ImageTextSource).

    Where each pair lies is read once from the members' headers and kept in a small file, SHARD.tar.index,
    that is made anew when the shard's size or time differs, or the file is damaged. It is written whole or
    not at all, so several processes may do it at once; where it cannot be written, it stays in memory.

    A picture is what its content says, JPEG, PNG or WebP, whatever its ending. Of KEY.txt and KEY.json the
    first is taken; of members with the same name the last, as unpacking would. White space in a caption,
    line breaks too, becomes single spaces. Compressed shards (.tar.gz) are not read: they allow no jumps.

    Args:
        patterns: one or several paths with braces, `cc3m-{00000..00331}.tar` or `{cc3m,cc12m}/00000.tar`
            (every one of these must exist), and wildcards, `cc12m/*.tar`. A shard named twice counts once.
        count: how many shards there must be; None for any number.
        max_pixels: a picture of more pixels raises SampleError before it is decoded (Pillow's own limit,
            about 179 million, stays).
        index_folder: where the index files go instead of beside the shards.

    Attributes:
        shards: absolute paths of the shards.
        missing: keys with a picture but no caption or the reverse, by shard, where there are any; left out.

    Raises:
        FileNotFoundError: nothing matches a pattern, or a shard that the braces name is missing.
        ValueError: another number of shards than expected, a shard that is no whole tar file, no pairs.
    """

    class_names: Sequence[str] = ()

    def __init__(
        self,
        patterns: str | Path | Sequence[str | Path],
        *,
        count: int | None = None,
        max_pixels: int = MAX_PIXELS,
        index_folder: str | Path | None = None,
    ) -> None:
        require(max_pixels > 0, "max_pixels", "a positive number", max_pixels)
        self.max_pixels = max_pixels
        self.shards = matching_shards([patterns] if isinstance(patterns, (str, Path)) else patterns)
        require(count in (None, len(self.shards)), "patterns", f"{count} shards", len(self.shards))
        folder = None if index_folder is None else Path(index_folder).absolute()
        self._indexes = [load_or_make_index(Path(shard), folder) for shard in self.shards]
        self._ends = np.cumsum([len(index.members) for index in self._indexes], dtype=np.int64)
        self.missing = {
            shard: index.missing
            for shard, index in zip(self.shards, self._indexes, strict=True)
            if index.missing
        }
        if self.missing:
            total, most = sum(self.missing.values()), max(self.missing, key=self.missing.__getitem__)
            counted = (total, len(self.missing), self.missing[most], most)
            _log.warning("%d keys of %d shards lack caption or picture (%d in %s): left out", *counted)
        if not len(self):
            got = f"none in {len(self.shards)} shards, the first of them {self.shards[0]!r}"
            raise ValueError(f"patterns: expected pairs KEY.jpg and KEY.txt or KEY.json, got {got}")

    @property
    def keys(self) -> Sequence[str]:
        """The name of each sample, "shard/KEY"."""
        return _Keys(self)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> RawSample:
        """Pair number `index`.

        Raises:
            IndexError: no such pair.
            SampleError: the picture is broken or too large, the caption unreadable or empty.
            FileNotFoundError: the shard has gone.
            ValueError: the shard has changed since it was indexed.
        """
        shard, row = self._locate(index)
        table = self._indexes[shard]
        member = table.members[row]
        key = f"{self.shards[shard]}/{table.keys[row]}"
        file = _opened(self.shards[shard], table.size, table.mtime_ns)
        file.check(table.size, table.mtime_ns)
        text = file.read(512 * int(member["caption"]), int(member["caption_bytes"]))
        caption = _json_caption(text, key) if member["json"] else clean_caption(_utf8(text, key), key)
        data = file.read(512 * int(member["picture"]), int(member["picture_bytes"]))
        return RawSample(decode_picture(data, key, self.max_pixels), caption)

    def _locate(self, index: int) -> tuple[int, int]:
        """The number of the shard, and of the pair in it."""
        index = checked_index(index, len(self))
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - (int(self._ends[shard - 1]) if shard else 0)


class _Keys(Sequence[str]):
    """`ShardSource.keys`, put together when asked for: millions of strings would fill every worker."""

    def __init__(self, source: ShardSource) -> None:
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> str:  # type: ignore[override]
        shard, row = self._source._locate(index)
        return f"{self._source.shards[shard]}/{self._source._indexes[shard].keys[row]}"


def decode_picture(data: bytes, key: str, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The picture in `data` by the rules of `load_image`.

    Args:
        data: a JPEG, PNG or WebP file.
        key: names the sample in errors.
        max_pixels: the most pixels, compared with the header's sizes before anything is decoded.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        SampleError: another format, a broken or cut off file, or too many pixels.
    """
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as picture:
            width, height = picture.size
            if width * height <= max_pixels:
                return load_image(picture, name="picture")
    except UnidentifiedImageError:
        raise SampleError(key, f"picture: expected one of {_FORMATS}, got {data[:16]!r}...") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise SampleError(
            key, f"picture: expected at most {max_pixels} pixels, got more ({error})"
        ) from error
    except (*_DECODE_ERRORS, OverflowError, MemoryError) as error:
        cause = error.__cause__ or error
        raise SampleError(key, f"picture: expected a complete picture, not decodable ({cause})") from error
    raise SampleError(key, f"picture: expected at most {max_pixels} pixels, got {width} x {height}")


def clean_caption(text: str, key: str) -> str:
    """One line with single spaces and no halves of surrogate pairs; raises SampleError if nothing is left."""
    words = " ".join(text.split())
    if not words:
        raise SampleError(key, "caption: expected text, got none")
    return words.encode("utf-8", "replace").decode("utf-8")


def _utf8(data: bytes, key: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SampleError(key, f"caption: expected UTF-8 text ({error})") from error


def _json_caption(data: bytes, key: str) -> str:
    text = _utf8(data, key)
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SampleError(key, f"caption: expected a JSON file, not readable ({error})") from error
    caption = fields.get("caption") if isinstance(fields, dict) else None
    if not isinstance(caption, str):
        got = type(caption).__name__ if isinstance(fields, dict) else f"a JSON {type(fields).__name__}"
        raise SampleError(key, f'caption: expected a string in the JSON field "caption", got {got}')
    return clean_caption(caption, key)


class _Shard:
    """An open shard; reading moves no file position, so that threads and forked processes can share it."""

    def __init__(self, path: str) -> None:
        self.path, self.number = path, -1
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def check(self, size: int, mtime_ns: int) -> None:
        """Raise ValueError if the file is not as it was indexed."""
        status = os.fstat(self.number)
        if (status.st_size, status.st_mtime_ns) != (size, mtime_ns):
            got = "a changed file; make the source anew"
            raise ValueError(f"shard: expected {self.path!r} as it was indexed, got {got}")

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`; raises ValueError where the file ends before."""
        parts: list[bytes] = []
        while size and (part := os.pread(self.number, size, offset)):
            parts.append(part)
            offset, size = offset + len(part), size - len(part)
        if size:
            raise ValueError(f"shard: expected {size} more bytes at {offset}, got the end of {self.path!r}")
        return b"".join(parts)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


@functools.lru_cache(maxsize=_OPEN_SHARDS)
def _opened(path: str, size: int, mtime_ns: int) -> _Shard:
    """The open shard, by path and state; closed when it has left the cache and nobody reads from it."""
    return _Shard(path)
