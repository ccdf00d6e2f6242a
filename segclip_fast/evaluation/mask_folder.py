"""A folder of masks for a folder of photos: what `python -m segclip_fast.segment photos/` writes.

    masks/sub/name.png           indexed, pixel value = position in `names` of labels.json
    masks/sub/name.overlay.png   where asked for: photo, labels and legend
    masks/labels.json            names, colours, settings, and for each photo its size and coverage
    results.json                 where asked for, anywhere: COCO-style masks with compressed run lengths

Every file is written whole or not at all, and a run can be killed anywhere and resumed:
1. before the first mask, labels.json is written: the settings, `"complete": false`, and the photos that a
   resumed run keeps;
2. after each photo's pictures, one line about it, with its COCO entries, is added to masks/.progress.jsonl;
3. at the end the lines are folded into the COCO file, then labels.json (`"complete": true`), and removed.
So a photo counts as done if labels.json or a line tells of it and its files are there. Anything else is done
again: a mask whose line was not written, or a line that was cut short. Folding lines twice changes nothing.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from .coco_rle import encode_label_map
from .segmentation import PALETTE_SIZE, Segmentation
from .vocabularies import BACKGROUND

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

LABELS = "labels.json"
PROGRESS = ".progress.jsonl"
WAITING = 8  # results that wait to be written
WAITING_PIXELS = 32 * 10**6
_DIGITS = 6  # of coverage and scores


class MaskFolder:
    """The output of one run; nothing is written before the first `add`.

    Args:
        folder: the output folder; made where it does not exist, its parent must exist.
        root: the photos' folder.
        photos: paths of the photos below it, with slashes.
        settings: all that shapes the result, as JSON can hold it. A run is resumed with the same ones only,
            and with the same `overlay` and `rle`.
        labels: how many labels there are, with the background.
        overlay: write overlays too.
        rle: the COCO file to write, or None.

    Attributes:
        kept: photos of the earlier run, done already.
        added: photos done by this run.
        skipped: why photos were left out.

    Raises:
        ValueError: too many labels for a PNG, two photos for one mask, or output that cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        root: Path,
        photos: Sequence[str],
        settings: Mapping[str, Any],
        *,
        labels: int,
        overlay: bool = False,
        rle: Path | None = None,
    ) -> None:
        if labels > PALETTE_SIZE:
            raise ValueError(f"labels: expected at most {PALETTE_SIZE}, as a PNG can hold, got {labels}")
        self.folder, self.photos, self.overlay, self.rle = folder, tuple(photos), overlay, rle
        outputs = {"overlay": overlay, "rle": None if rle is None else str(rle)}
        self.settings = json.loads(json.dumps({**settings, **outputs}))  # as labels.json gives them back
        self.head: dict[str, Any] = {}  # what labels.json says of names and colours
        self.kept: list[str] = []
        self.added: list[str] = []
        self.skipped: dict[str, str] = {}
        self._records: dict[str, dict[str, Any]] = {}
        self._rle_entries: dict[str, list[dict[str, Any]]] = {}  # of the earlier run's COCO file
        self._check_clashes()
        self._check_places(root)

    # --- before the run ------------------------------------------------------------------------------------

    def begin(self, *, overwrite: bool = False, resume: bool = False) -> list[str]:
        """Look at what there is, and name the photos to do. Nothing is written.

        Args:
            overwrite: replace files that are in the way.
            resume: keep the photos of an earlier run; where there was none, begin.

        Raises:
            ValueError: files in the way, or an earlier run with other settings.
        """
        path = self.folder / LABELS
        if resume and path.is_file():
            self._load(path)
        elif not overwrite:
            if path.exists():
                raise ValueError(
                    f"--output: {str(path)!r} exists; --resume continues that run, --overwrite replaces it"
                )
            for file in self._all_files():
                if file.exists():
                    raise ValueError(f"--output: {str(file)!r} exists; --overwrite replaces it")
        kept = set(self.kept)
        return [name for name in self.photos if name not in kept]

    def _check_clashes(self) -> None:
        owners: dict[str, str] = {}
        for name in self.photos:
            for file in self._files(name):
                if file in owners:
                    both = f"{owners[file]!r} and {name!r}"
                    raise ValueError(f"photos: expected names that differ, got {both}, both for {file!r}")
                owners[file] = name

    def _check_places(self, root: Path) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"--output: expected a folder for a folder of photos, got {str(self.folder)!r}")
        if not self.folder.absolute().parent.is_dir():
            raise ValueError(f"--output: expected an existing folder above, got {str(self.folder)!r}")
        output, source = self.folder.resolve(), root.resolve()
        if output == source or source in output.parents or output in source.parents:
            raise ValueError(f"--output: expected a folder apart from the photos, got {str(self.folder)!r}")
        for file in self._all_files():
            if file.is_dir():
                raise ValueError(f"--output: expected a file, {str(file)!r} is a folder")
        if self.rle is None:
            return
        place = self.rle.resolve()
        if place.suffix.lower() != ".json" or place == output / LABELS:
            raise ValueError(f"--rle: expected another file ending in .json, got {str(self.rle)!r}")
        if not place.parent.is_dir() and place.parent != output:
            raise ValueError(f"--rle: expected an existing folder, got {str(self.rle.parent)!r}")

    def _files(self, name: str) -> list[str]:
        """The pictures made of a photo, below the output folder."""
        mask = PurePosixPath(name).with_suffix(".png")
        return [str(mask), *([str(mask.with_suffix(".overlay.png"))] if self.overlay else [])]

    def _all_files(self) -> Iterator[Path]:
        for name in self.photos:
            yield from (self.folder / file for file in self._files(name))
        if self.rle is not None:
            yield self.rle

    # --- an earlier run ------------------------------------------------------------------------------------

    def _load(self, path: Path) -> None:
        """What an earlier run left, if its settings are those of this one."""
        try:
            earlier = json.loads(path.read_text(encoding="utf-8"))
            settings, files = dict(earlier["settings"]), {entry["path"]: entry for entry in earlier["files"]}
            self.head = {key: earlier[key] for key in ("names", "colours", "background")}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"--resume: expected the {LABELS} of an earlier run, got a broken {str(path)!r} ({error!r})"
            ) from error
        for key in sorted(self.settings):
            self._compare(key, settings.pop(key, None), self.settings[key])
        self.settings |= settings  # those known with the model only, see `confirm`
        if self.rle is not None and self.rle.is_file():
            self._rle_entries = _read_rle(self.rle)
        with_rle = set(self._rle_entries)
        for line in self._progress():
            with_rle.add(line["path"])
            files[line["path"]] = {key: value for key, value in line.items() if key != "rle"}
        self.kept = [
            name
            for name in self.photos
            if name in files
            and all((self.folder / file).is_file() for file in self._files(name))
            and (self.rle is None or name in with_rle)
        ]
        self._records = {name: files[name] for name in self.kept}

    @staticmethod
    def _compare(key: str, old: Any, new: Any) -> None:
        if old != new:
            raise ValueError(
                f"--resume: expected the settings of the earlier run, {key} = {json.dumps(old)}, "
                f"got {json.dumps(new)} (--overwrite begins anew)"
            )

    def _progress(self) -> Iterator[dict[str, Any]]:
        """The lines about finished photos; those cut short are left out."""
        path = self.folder / PROGRESS
        if not path.is_file():
            return
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                try:
                    entry = json.loads(line)
                except ValueError:
                    continue
                if isinstance(entry, dict) and "path" in entry:
                    yield entry

    # --- the run -------------------------------------------------------------------------------------------

    def confirm(self, key: str, value: str) -> None:
        """Add a setting that is known with the model only.

        Raises:
            ValueError: the run that is resumed had another.
        """
        self._compare(key, self.settings.setdefault(key, value), value)

    def add_all(self, results: Iterable[tuple[str, Segmentation]]) -> None:
        """`add` in a thread of its own while the next results are made, a bounded number of them behind."""
        waiting: deque[tuple[int, Future[None]]] = deque()
        with ThreadPoolExecutor(1, thread_name_prefix="segclip-masks") as writer:
            for name, result in results:
                waiting.append((result.labels.size, writer.submit(self.add, name, result)))
                while len(waiting) > WAITING or sum(pixels for pixels, _ in waiting) > WAITING_PIXELS:
                    waiting.popleft()[1].result()
            for _, future in waiting:
                future.result()

    def add(self, name: str, result: Segmentation) -> None:
        """Write a photo's pictures, then the line about it."""
        if not self.added:
            self._start(result)
        files = [self.folder / file for file in self._files(name)]
        files[0].parent.mkdir(parents=True, exist_ok=True)
        save_png(result.label_image(), files[0])
        if self.overlay:
            save_png(result.overlay(), files[1])
        coverage = {label: round(share, _DIGITS) for label, share in result.coverage.items() if share > 0}
        record: dict[str, Any] = {"path": name, "mask": self._files(name)[0]}
        record |= {"size": [*result.labels.shape], "coverage": coverage}
        self._records[name] = record
        line = record if self.rle is None else {**record, "rle": _coco_entries(name, result)}
        with (self.folder / PROGRESS).open("a", encoding="utf-8") as progress:
            progress.write(json.dumps(line) + "\n")
        self.added.append(name)

    def skip(self, name: str, error: str) -> None:
        """Remember that a photo could not be read."""
        self.skipped[name] = error

    def finish(self) -> None:
        """Fold the lines into the COCO file and labels.json; remove them, and what a kill left half done."""
        if self.rle is not None:
            entries = dict(self._rle_entries)
            entries.update((line["path"], line["rle"]) for line in self._progress())
            done = [name for name in self.photos if name in self._records]
            rows = [json.dumps(entry) for name in done for entry in entries[name]]
            _write_text(self.rle, "[\n" + ",\n".join(rows) + "\n]\n")
        self._write_labels(complete=True)
        (self.folder / PROGRESS).unlink(missing_ok=True)
        for half in self.folder.rglob(".*.[0-9]*.tmp"):  # of `write_whole`
            half.unlink()

    def _start(self, result: Segmentation) -> None:
        """The first mask is about to be written."""
        self.folder.mkdir(exist_ok=True)
        if self.head:  # an earlier run is resumed, whose last line may have been cut short
            with (self.folder / PROGRESS).open("a", encoding="utf-8") as progress:
                progress.write("\n")
        else:
            (self.folder / PROGRESS).unlink(missing_ok=True)
        background = 0 if result.names[0] == BACKGROUND else None
        self.head = {"names": result.names, "colours": result.colours.tolist(), "background": background}
        self._write_labels(complete=False)

    def _write_labels(self, *, complete: bool) -> None:
        head = {**self.head, "settings": self.settings, "complete": complete}
        rows = [json.dumps(self._records[name]) for name in self.photos if name in self._records]
        skipped = [json.dumps({"path": name, "error": error}) for name, error in self.skipped.items()]
        parts = [f'"{key}": {json.dumps(value)}' for key, value in head.items()]
        for key, lines in (("files", rows), ("skipped", skipped)):
            parts.append(f'"{key}": [' + ",".join(f"\n  {line}" for line in lines) + "]")
        _write_text(self.folder / LABELS, "{\n " + ",\n ".join(parts) + "\n}\n")


# --- files -------------------------------------------------------------------------------------------------


def save_png(picture: PILImage, path: Path) -> None:
    """Write a picture as PNG, whole or not at all."""
    from ..interop.files import write_whole

    write_whole(path, lambda temporary: picture.save(temporary, format="PNG"))


def _write_text(path: Path, text: str) -> None:
    from ..interop.files import write_whole

    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _coco_entries(name: str, result: Segmentation) -> list[dict[str, Any]]:
    """One COCO-style result per label present, the background too."""
    return [
        {
            "image": name,
            "size": [*result.labels.shape],
            "category_id": mask.label,
            "category": result.names[mask.label],
            "score": round(mask.score, _DIGITS),
            "segmentation": mask.segmentation,
            "area": mask.area,
            "bbox": mask.bbox,
        }
        for mask in encode_label_map(result.labels, result.scores)
    ]


def _read_rle(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The entries of an earlier run's COCO file by photo."""
    found: dict[str, list[dict[str, Any]]] = {}
    try:
        for entry in json.loads(path.read_text(encoding="utf-8")):
            found.setdefault(entry["image"], []).append(entry)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--rle: expected the COCO file of the run to resume, got a broken {str(path)!r} ({error!r})"
        ) from error
    return found
