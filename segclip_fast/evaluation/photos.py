"""Many photos, one after the other: decoded by threads while the model works, in bounded memory.

    for photo in segment_folder(model, "photos", ["cat", "sofa"]):
        print(photo.path, photo.error or photo.result.coverage)

Photos are put together in batches by the sizes in their headers: at most `batch_size` of them and at most 64
megapixels (a larger photo is a batch of its own). While the model segments one batch, the next `prefetch`
batches are decoded. So memory holds at most prefetch + 1 batches of pixels, 3 bytes each, and the results of
one batch, about 25 bytes per pixel, however many photos there are.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from PIL import Image

from ..data.images import load_image
from .prompts import check_labels
from .segmentation import Segmentation, segment_batch

if TYPE_CHECKING:
    from .segmenter import Segmenter

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
BATCH_SIZE = 8  # photos
BATCH_PIXELS = 64 * 10**6
THREADS = "segclip-photos"  # beginning of the decoding threads' names

_Decoded = np.ndarray | str  # a photo, or why there is none


@dataclass(frozen=True, eq=False)
class PhotoResult:
    """What became of one photo.

    Attributes:
        path: the file.
        result: its segmentation, or None if the file could not be read.
        error: None, or in one line why it could not be read.
    """

    path: Path
    result: Segmentation | None
    error: str | None


def find_photos(folder: str | Path) -> list[str]:
    """Photos below a folder, at any depth, known by their suffixes (`SUFFIXES`, in any case).

    Files and folders whose names begin with a dot are left out; links to folders are not followed.

    Returns:
        Paths relative to `folder`, with slashes, sorted.

    Raises:
        FileNotFoundError: no such folder, or no photo below it.
        OSError: a folder below it that cannot be read.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"folder: expected a folder of photos, got {str(folder)!r}")
    found = []
    for place, folders, files in os.walk(root, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = Path(place).relative_to(root)
        for name in files:
            if not name.startswith(".") and name.lower().endswith(SUFFIXES):
                found.append((inside / name).as_posix())
    if not found:
        raise FileNotFoundError(
            f"folder: expected photos ({', '.join(SUFFIXES)}), got none below {str(folder)!r}"
        )
    return sorted(found)


def segment_folder(
    model: Segmenter,
    folder: str | Path,
    labels: Sequence[str],
    *,
    batch_size: int = BATCH_SIZE,
    prefetch: int = 2,
    workers: int = 2,
    window_batch: int | None = None,
    **options: Any,
) -> Generator[PhotoResult, None, None]:
    """Segment every photo below a folder, see `find_photos`, in the order of their paths.

    Args:
        model: the segmenter.
        folder: where the photos are; the results' paths begin with it.
        labels: the names to look for.
        batch_size: see `segment_files`, as all the other arguments.
        prefetch: batches decoded ahead.
        workers: threads that decode.
        window_batch: windows per call of the image encoder.
        **options: of `segment_batch`.

    Raises:
        FileNotFoundError: no such folder, or no photo below it; at once, not with the first result.
        ValueError: as for `segment_files`.
    """
    paths = [Path(folder) / name for name in find_photos(folder)]
    return segment_files(
        model,
        paths,
        labels,
        batch_size=batch_size,
        prefetch=prefetch,
        workers=workers,
        window_batch=window_batch,
        **options,
    )


def segment_files(
    model: Segmenter,
    paths: Iterable[str | Path],
    labels: Sequence[str],
    *,
    batch_size: int = BATCH_SIZE,
    prefetch: int = 2,
    workers: int = 2,
    window_batch: int | None = None,
    **options: Any,
) -> Generator[PhotoResult, None, None]:
    """Segment photos, each with one result in the order of `paths`; a broken file has an error instead.

    The threads end with the iteration, also when it is closed early or the consumer raises.

    Args:
        model: the segmenter, on any device.
        paths: image files; may be an iterator without end.
        labels: the names to look for, the same in all photos.
        batch_size: most photos in a batch.
        prefetch: batches decoded ahead, at least 1.
        workers: threads that decode.
        window_batch: windows per call of the image encoder, the `batch_size` of `segment_batch`, which
            decides if None.
        **options: of `segment_batch`: background, threshold, templates, snap, ...

    Raises:
        ValueError: labels or numbers that cannot be used, at once; options of `segment_batch`, with the first
            result.
        RuntimeError: from the model, such as running out of memory; never taken for a broken file.
    """
    if isinstance(paths, (str, Path)):
        raise ValueError(f"paths: expected several paths, got one: {str(paths)!r}")
    labels = check_labels(labels)
    for name, number in (("batch_size", batch_size), ("prefetch", prefetch), ("workers", workers)):
        if not isinstance(number, int) or number < 1:
            raise ValueError(f"{name}: expected an integer of at least 1, got {number!r}")
    if window_batch is not None:
        options["batch_size"] = window_batch
    return _results(model, paths, labels, batch_size, prefetch, workers, options)


def _results(
    model: Segmenter,
    paths: Iterable[str | Path],
    labels: Sequence[str],
    batch_size: int,
    prefetch: int,
    workers: int,
    options: dict[str, Any],
) -> Generator[PhotoResult, None, None]:
    ahead: deque[list[tuple[Path, Future[_Decoded]]]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix=THREADS)
    try:
        for batch in _batches(paths, batch_size):
            ahead.append([(path, pool.submit(_decode, path)) for path in batch])
            if len(ahead) > prefetch:
                yield from _segment(model, ahead.popleft(), labels, options)
        while ahead:
            yield from _segment(model, ahead.popleft(), labels, options)
    finally:
        pool.shutdown(cancel_futures=True)  # waits for the files being decoded, at most one per thread


def _batches(paths: Iterable[str | Path], batch_size: int) -> Iterator[list[Path]]:
    """Photos that are decoded and segmented together."""
    batch: list[Path] = []
    total = 0
    for path in map(Path, paths):
        pixels = _pixels(path)
        if batch and (len(batch) == batch_size or total + pixels > BATCH_PIXELS):
            yield batch
            batch, total = [], 0
        batch.append(path)
        total += pixels
    if batch:
        yield batch


def _pixels(path: Path) -> int:
    """Pixels of a photo by its header; 0 if it has none that can be read, which decoding will report."""
    try:
        if not path.is_file():  # opening a pipe would wait for its writer
            return 0
        with Image.open(path) as picture:
            return picture.width * picture.height
    except Exception:  # a damaged file raises anything
        return 0


def _decode(path: Path) -> _Decoded:
    """The photo, or why it cannot be used, in one line."""
    try:
        return load_image(path, name="photo")
    except MemoryError:
        raise
    except Exception as error:  # a damaged file raises anything
        return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _segment(
    model: Segmenter,
    batch: list[tuple[Path, Future[_Decoded]]],
    labels: Sequence[str],
    options: dict[str, Any],
) -> Iterator[PhotoResult]:
    """The results of one batch; each is let go when it has been handed on."""
    decoded = [(path, future.result()) for path, future in batch]
    batch.clear()  # the futures hold the pixels
    errors = [(path, photo if isinstance(photo, str) else None) for path, photo in decoded]
    photos = [photo for _, photo in decoded if not isinstance(photo, str)]
    del decoded
    results = segment_batch(model, photos, labels, **options)[::-1] if photos else []
    del photos
    for path, error in errors:
        yield PhotoResult(path, None if error is not None else results.pop(), error)


def _raise(error: OSError) -> NoReturn:
    raise error
