"""Which shards there are, and where the pairs of each lie: read once from the headers, kept in a file."""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import operator
import os
import re
import tarfile
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .._checks import require

INDEX_SUFFIX = ".index"
_VERSION = 1
_KINDS = {
    "jpg": "picture",
    "jpeg": "picture",
    "png": "picture",
    "webp": "picture",
    "txt": "txt",
    "json": "json",
}
_BLOCK = 512  # tar members begin at multiples of it, so that 32 bits hold where
_MEMBER = np.dtype(
    [
        ("picture", "<u4"),  # first block
        ("picture_bytes", "<u4"),
        ("caption", "<u4"),  # first block
        ("caption_bytes", "<u4"),
        ("json", "?"),  # the caption is KEY.json, not KEY.txt
    ]
)
_log = logging.getLogger("segclip_fast")


def checked_index(index: int, length: int) -> int:
    """`index` as 0 to length - 1, negative ones counted from the end; raises IndexError otherwise."""
    index = operator.index(index)
    if not -length <= index < length:
        raise IndexError(f"index: expected 0 to {length - 1}, got {index}")
    return index % length


class PackedStrings(Sequence[str]):
    """Many strings in two arrays, which loader workers share; a list of millions would be copied."""

    def __init__(self, data: np.ndarray, ends: np.ndarray) -> None:
        self.data, self.ends = data, ends  # (bytes,) uint8 UTF-8; (strings,) where each ends

    @classmethod
    def of(cls, strings: Iterable[str]) -> PackedStrings:
        """The strings one after the other."""
        data, ends = bytearray(), array("Q")
        for string in strings:
            data += string.encode("utf-8", "surrogatepass")
            ends.append(len(data))
        return cls(np.frombuffer(bytes(data), dtype=np.uint8), np.array(ends, dtype=np.uint64))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:  # type: ignore[override]
        index = checked_index(index, len(self))
        start = int(self.ends[index - 1]) if index else 0
        return self.data[start : int(self.ends[index])].tobytes().decode("utf-8", "surrogatepass")


def expand_braces(pattern: str) -> list[str]:
    """`x{08..10}` as x08, x09, x10 and `{a,b}` as a, b, as a shell does; other braces stay as they are.

    Raises:
        ValueError: a range that runs backwards, or more than a million names.
    """
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if not match:
        return [pattern]
    first, last, names = match.groups()
    choices = names.split(",") if names is not None else []
    if names is None:
        require(0 <= int(last) - int(first) < 10**6, "patterns", "a range {first..last}", match.group())
        padded = max(len(end) if end.startswith("0") else 0 for end in (first, last))
        choices = [f"{number:0{padded}d}" for number in range(int(first), int(last) + 1)]
    before, after = pattern[: match.start()], expand_braces(pattern[match.end() :])
    found = [f"{before}{choice}{rest}" for choice in choices for rest in after]
    return [name for one in found for name in expand_braces(one)] if "{" in before else found


def matching_shards(patterns: Sequence[str | Path]) -> list[str]:
    """Absolute paths of the shards, in the order of the patterns, wildcards sorted; each once.

    Raises:
        FileNotFoundError: nothing matches a pattern or one of the names that its braces stand for.
        ValueError: no patterns, or braces with an unusable range.
    """
    found: dict[str, None] = {}
    for pattern in patterns:
        text = str(Path(pattern).expanduser().absolute())
        names = [text] if Path(text).is_file() else expand_braces(text)
        missing = []
        for name in names:
            matches = [name] if Path(name).is_file() else sorted(glob.glob(name))  # noqa: PTH207 - absolute
            matches = [
                match for match in matches if not match.endswith(INDEX_SUFFIX) and Path(match).is_file()
            ]
            found |= dict.fromkeys(matches)
            missing += [] if matches else [name]
        if missing:
            got = f"none at {missing[0]!r}" + (f" and {len(missing) - 1} more" if missing[1:] else "")
            raise FileNotFoundError(f"patterns: expected {len(names)} shards by {str(pattern)!r}, got {got}")
    require(bool(found), "patterns", "at least one path", list(patterns))
    return list(found)


@dataclass(frozen=True)
class ShardIndex:
    """The complete pairs of one shard, as it was when it had this size and time.

    Attributes:
        size: of the shard in bytes.
        mtime_ns: when it was last changed.
        missing: how many keys have only a picture or only a caption.
        members: (pairs,) of _MEMBER, where picture and caption lie.
        keys: (pairs,) KEY of each.
    """

    size: int
    mtime_ns: int
    missing: int
    members: np.ndarray
    keys: PackedStrings


def load_or_make_index(shard: Path, folder: Path | None) -> ShardIndex:
    """From the index file, else from the shard's headers, and then kept in the file.

    Args:
        shard: absolute path.
        folder: of the index file; None puts it beside the shard.

    Raises:
        ValueError: the shard is no whole tar file, or a member is too large.
    """
    from ..interop.files import write_whole

    file = shard.with_name(shard.name + INDEX_SUFFIX)
    if folder is not None:
        file = folder / f"{shard.name}-{hashlib.sha256(os.fsencode(shard)).hexdigest()[:16]}{INDEX_SUFFIX}"
    status = shard.stat()
    index = _stored(file, shard)
    if index is not None and (index.size, index.mtime_ns) == (status.st_size, status.st_mtime_ns):
        return index
    index = _walk(shard, status)
    header = {"size": index.size, "mtime_ns": index.mtime_ns, "missing": index.missing}
    header |= {"version": _VERSION, "pairs": len(index.members)}
    parts = [json.dumps(header).encode(), b"\n", index.members.tobytes()]
    body = b"".join([*parts, index.keys.ends.tobytes(), index.keys.data.tobytes()])
    content = hashlib.sha256(body).digest() + body
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, lambda path: path.write_bytes(content))
    except OSError as error:
        _log.info("the index of %s stays in memory: %s", shard, error)
    return index


def _stored(file: Path, shard: Path) -> ShardIndex | None:
    """The index in a file; None if there is none, it is damaged, or another version wrote it."""
    try:
        data = file.read_bytes()
    except OSError:
        return None
    digest, body = data[:32], data[32:]
    if hashlib.sha256(body).digest() != digest:
        _log.warning("the index of %s is damaged and is made anew", shard)
        return None
    line, _, table = body.partition(b"\n")
    header = json.loads(line)
    if header["version"] != _VERSION:
        return None
    pairs, first = header["pairs"], header["pairs"] * _MEMBER.itemsize
    ends = np.frombuffer(table, np.uint64, pairs, first)
    keys = PackedStrings(np.frombuffer(table, np.uint8, offset=first + ends.nbytes), ends)
    members = np.frombuffer(table, _MEMBER, pairs)
    return ShardIndex(header["size"], header["mtime_ns"], header["missing"], members, keys)


def _walk(shard: Path, status: os.stat_result) -> ShardIndex:
    """Read all headers, jumping over the data."""
    found: dict[str, dict[str, tuple[int, int]]] = {}
    end = -1
    try:
        with tarfile.open(shard, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
                if tar.offset <= end:
                    raise tarfile.ReadError(f"header at byte {member.offset} leads backwards")
                end = tar.offset
                folder, _, base = member.name.rpartition("/")
                stem, _, ending = base.partition(".")
                kind = _KINDS.get(ending.lower())
                if kind and stem and member.isreg() and not member.issparse():
                    key = f"{folder}/{stem}" if folder else stem
                    found.setdefault(key, {})[kind] = (member.offset_data, member.size)
            end = tar.offset
        with shard.open("rb") as file:
            file.seek(end)
            mark = file.read(_BLOCK)
    except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
        raise ValueError(
            f"shard: expected a whole, uncompressed tar file, got {str(shard)!r} ({error})"
        ) from None
    if len(mark) < _BLOCK or any(mark):
        got = f"{str(shard)!r}, cut off or damaged at byte {end} of {status.st_size}"
        raise ValueError(f"shard: expected a whole tar file, got {got}")
    rows, keys = [], []
    for key, kinds in found.items():
        caption = kinds.get("txt") or kinds.get("json")
        if caption and "picture" in kinds:
            keys.append(key)
            rows.append(
                (*_in_blocks(kinds["picture"], shard), *_in_blocks(caption, shard), "txt" not in kinds)
            )
    missing = len(found) - len(rows)
    members = np.array(rows, dtype=_MEMBER)
    return ShardIndex(status.st_size, status.st_mtime_ns, missing, members, PackedStrings.of(keys))


def _in_blocks(place: tuple[int, int], shard: Path) -> tuple[int, int]:
    """Byte offset and size as block number and size."""
    require(place[1] < 2**32, "shard", f"members below 4 GiB in {str(shard)!r}", place[1])
    return place[0] // _BLOCK, place[1]
