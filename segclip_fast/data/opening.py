"""The settings' sources, opened: `train_data` tells which, by its form or as `dataset_type` says."""

from __future__ import annotations

import dataclasses
import os
import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from .._checks import require
from ..config import DataConfig, SegCLIPConfig
from .caption_files import CocoCaptions, TableSource
from .folder import SUFFIXES, FolderSource
from .mixture import Mixture, Synthetic
from .sample import ImageTextSource
from .shard_index import expand_braces
from .shards import ShardSource

GENERATED_SAMPLES = 8192
_TABLES = (".csv", ".tsv", ".txt")
_FORMS = (
    "a folder of pictures, uncompressed tar shards ('/data/cc3m/{00000..00331}.tar', '/data/cc12m/*.tar'), "
    "a table (.csv, .tsv, .txt) or COCO's annotations (.json); several with :: between them"
)
# What the classes call their arguments, and the settings that these come from.
_SETTINGS = {
    "path": "data.train_data",
    "patterns": "data.train_data",
    "root": "data.train_data",
    "annotations": "data.train_data",
    "images": "data.images",
    "split": "data.split",
    "restval": "data.restval",
    "separator": "data.csv_separator",
    "length": "data.train_num_samples",
    "size": "model.vision.image_size",
}
# What `describe` says of an opened source: "captions of dataset_coco.json".
_described: weakref.WeakKeyDictionary[ImageTextSource, str] = weakref.WeakKeyDictionary()


def make_source(config: DataConfig, model: SegCLIPConfig, split: str = "train") -> ImageTextSource:
    """The pairs that `config` names; generated ones at the model's image size.

    One source of files comes as it is. Several, or one with an upsampling factor or a number of samples,
    come as a `Mixture`, whose epochs go on through a source that one epoch does not show whole.

    Args:
        config: the data.
        model: its image size, and its vocabulary for synthetic captions.
        split: "train", or another split of generated pairs.

    Raises:
        ValueError: settings that do not fit what is there, files in another form, more samples asked for than
            there are, or another split of files; names the setting.
        FileNotFoundError: something that `config` names does not exist.
    """
    if config.generated or config.dataset_type == "synthetic":
        return _generated(config, model, split)
    require(split == "train", "split", f"train with dataset_type {config.dataset_type!r}", split)
    entries = config.paths()
    require(bool(entries), "data.train_data", _FORMS, config.train_data)
    kinds = [_kind(entry, config) for entry in entries]
    _check_settings(config, entries, kinds)
    sources = []
    for entry, kind in zip(entries, kinds, strict=True):
        with _naming_settings(entry):
            source, what = _OPENERS[kind](entry, config)
        _described[source] = what
        sources.append(source)
    return _mixed(sources, config)


def make_held_out(config: DataConfig, model: SegCLIPConfig, samples: int) -> ImageTextSource | None:
    """The `samples` pictures that a run is evaluated on; None for sources without masks.

    Raises:
        ValueError: see `make_source`.
        FileNotFoundError: see `make_source`.
    """
    if not config.generated:
        return None
    return make_source(dataclasses.replace(config, train_num_samples=samples), model, "val")


# --- where a sample comes from


def sample_name(source: ImageTextSource, index: int) -> str:
    """Where sample number `index` comes from: the picture's path, or SHARD.tar/KEY; "SceneSource[3]" if made.

    The same as `SampleError.key` of a sample that cannot be used.

    Raises:
        IndexError: no such sample.
    """
    if isinstance(source, Mixture):
        number, within = source.locate(index)
        return sample_name(source.sources[number], within)
    if isinstance(source, ShardSource):
        return source.keys[index]
    if isinstance(source, FolderSource):
        return str(source.root / source.pictures[index])
    if isinstance(source, (CocoCaptions, TableSource)):
        return source.pictures[index]
    return f"{type(source).__name__}[{index}]"


def container(key: str) -> str:
    """What a `sample_name` is counted under: its shard up to ".tar", else the picture's folder, or ""."""
    shard = re.match(r".*?\.tar(?=/)", key)
    if shard:
        return shard.group()
    return str(PurePosixPath(key).parent) if "/" in key else ""


def describe(source: ImageTextSource) -> str:
    """One line on what there is: "3,381,125 pairs: 2,967,012 in 332 shards, 414,113 captions of coco.json".

    Where an epoch of a mixture shows a source in part or more than once, the line says how often.
    """
    if not isinstance(source, Mixture):
        return f"{_pairs(len(source))}: {_part(source)}"
    parts, shown = [], False
    for part, count in zip(source.sources, source.counts, strict=True):
        times = f" x {count / len(part):.3g}" if count != len(part) else ""
        shown |= bool(times)
        parts.append(_part(part) + times)
    return f"{_pairs(len(source))}{' per epoch' if shown else ''}: {', '.join(parts)}"


def _pairs(count: int) -> str:
    return f"{count:,} pair{'s' if count != 1 else ''}"


def _part(source: ImageTextSource) -> str:
    what = _described.get(source)
    if what is None:
        what = f"of {type(source).__name__}"
    return f"{len(source):,} {what}"


# --- opening


def _generated(config: DataConfig, model: SegCLIPConfig, split: str) -> ImageTextSource:
    """Pairs that are made here."""
    factors = config.train_data_upsampling_factors
    none = f"none with dataset_type {config.dataset_type!r}"
    require(not factors, "data.train_data_upsampling_factors", none, factors)
    length, size, seed = config.train_num_samples or GENERATED_SAMPLES, model.vision.image_size, config.seed
    source: ImageTextSource
    with _naming_settings(config.train_data):
        if config.dataset_type == "synthetic":
            source, what = Synthetic(length, size, _captions(model.text.vocabulary), seed=seed), "synthetic"
        elif config.dataset_type == "scenes":
            from .scenes import SceneSource

            split = "val" if split != "train" else split
            source, what = SceneSource(length, seed=seed, size=size, split=split), "scenes"
        else:
            from .stamps import StampSource

            root = config.train_data
            require(bool(root), "data.train_data", "the folder of the stamps", root)
            source = StampSource(Path(root).expanduser(), length, seed=seed, size=size, split=split)
            what = "scenes of stamps"
    _described[source] = what
    return source


def _captions(vocabulary: Sequence[str]) -> list[str]:
    """Synthetic captions of the words of a closed vocabulary; none for CLIP's, which reads all."""
    words = [*vocabulary, *vocabulary[:5]]
    return [" ".join(words[first : first + 6]) for first in range(len(vocabulary))]


def _kind(entry: str, config: DataConfig) -> str:
    """The dataset_type of an entry, by its form where the settings leave it open."""
    if config.dataset_type != "auto":
        return config.dataset_type
    path, ending = Path(entry).expanduser(), PurePosixPath(entry).suffix.lower()
    if path.is_dir():
        return "folder"
    if ending in _TABLES:
        return "csv"
    if ending == ".json":
        return "coco"
    with _naming_settings(entry):
        names = [entry] if entry.endswith(".tar") else expand_braces(entry)
    if all(name.endswith(".tar") for name in names):
        return "webdataset"
    local = not re.match(r"[a-z0-9]+://|pipe:", entry)
    if local and not path.exists() and not ending:
        raise FileNotFoundError(f"data.train_data: expected {_FORMS}, got {entry!r}, which does not exist")
    raise ValueError(f"data.train_data: expected {_FORMS}, got {entry!r}; dataset_type says what it is")


def _check_settings(config: DataConfig, entries: Sequence[str], kinds: Sequence[str]) -> None:
    """Refuse settings that no entry, or one of them, can follow."""
    if "coco" not in kinds:
        for name in ("split", "restval", "one_per_image"):
            value, expected = getattr(config, name), "its default without COCO's annotations in train_data"
            require(not value, f"data.{name}", expected, value)
    elif not config.images:
        file = entries[kinds.index("coco")]
        require(False, "data.images", f"the folder of the pictures of {file!r}", config.images)
    for entry, kind in zip(entries, kinds, strict=True):
        without = f"felzenszwalb or slic with {entry!r}, where no segments are stored"
        good = kind == "folder" or config.superpixels.kind != "stored"
        require(good, "data.superpixels.kind", without, config.superpixels.kind)


def _open_folder(entry: str, config: DataConfig) -> tuple[ImageTextSource, str]:
    root = Path(entry).expanduser()
    _refuse_folder_of_shards(root)
    stored = config.superpixels.kind == "stored"
    return FolderSource(root, stored, max_pixels=config.max_pixels), f"pictures in {root.name or root}"


def _open_shards(entry: str, config: DataConfig) -> tuple[ImageTextSource, str]:
    _refuse_folder_of_shards(Path(entry).expanduser())
    folder = Path(config.index_folder).expanduser() if config.index_folder else None
    source = ShardSource(entry, max_pixels=config.max_pixels, index_folder=folder)
    return source, f"in {len(source.shards):,} shard{'s' if len(source.shards) != 1 else ''}"


def _open_table(entry: str, config: DataConfig) -> tuple[ImageTextSource, str]:
    path = Path(entry).expanduser()
    separator = config.csv_separator.replace("\\t", "\t") or None  # as it is typed in a shell
    source = TableSource(
        path,
        config.csv_img_key,
        config.csv_caption_key,
        separator,
        check=config.check_files,
        max_pixels=config.max_pixels,
    )
    return source, f"rows of {path.name}"


def _open_coco(entry: str, config: DataConfig) -> tuple[ImageTextSource, str]:
    path = Path(entry).expanduser()
    source = CocoCaptions(
        Path(config.images).expanduser(),
        path,
        split=config.split or None,
        restval=config.restval,
        one_per_image=config.one_per_image,
        check=config.check_files,
        max_pixels=config.max_pixels,
    )
    return source, f"{'pictures' if config.one_per_image else 'captions'} of {path.name}"


_OPENERS: dict[str, Callable[[str, DataConfig], tuple[ImageTextSource, str]]] = {
    "folder": _open_folder,
    "webdataset": _open_shards,
    "csv": _open_table,
    "coco": _open_coco,
}


def _refuse_folder_of_shards(root: Path) -> None:
    """A folder with shards and without pictures or subfolders was meant as its shards."""
    if not root.is_dir():
        return
    shards = False
    with os.scandir(root) as entries:  # plain names: there may be millions
        for each in entries:
            if each.name.startswith("."):
                continue
            if each.name.lower().endswith(SUFFIXES) or each.is_dir():
                return
            shards |= each.name.endswith(".tar")
    if shards:
        raise ValueError(f"root: expected {str(root / '*.tar')!r} for the shards in it, got {str(root)!r}")


def _mixed(sources: Sequence[ImageTextSource], config: DataConfig) -> ImageTextSource:
    """The one source, or the mixture that the factors and the number of samples make."""
    factors = config.factors()
    weights = [factor * len(source) for factor, source in zip(factors, sources, strict=True)]
    there, wanted = round(sum(weights)), config.train_num_samples
    found = ", ".join(_part(source) for source in sources)
    if config.train_data_upsampling_factors:
        found += f", times {config.train_data_upsampling_factors}"
        at_least = f"factors that leave a pair of {found}"
        name, given = "data.train_data_upsampling_factors", config.train_data_upsampling_factors
        require(there > 0, name, at_least, given)
    if wanted > there:
        hint = f"{wanted}; leave it 0 to count them, or look for missing files"
        raise ValueError(
            f"data.train_num_samples: expected at most {there}, the pairs found ({found}), got {hint}"
        )
    if len(sources) == 1 and not config.train_data_upsampling_factors and wanted in (0, there):
        return sources[0]
    return Mixture(list(zip(sources, weights, strict=True)), wanted or there, seed=config.seed)


@contextmanager
def _naming_settings(entry: str) -> Iterator[None]:
    """Errors of the classes, with the setting in place of their argument, and the entry."""
    try:
        yield
    except (FileNotFoundError, ValueError) as error:
        argument, _, rest = str(error).partition(": ")
        setting = _SETTINGS.get(argument, "" if argument.startswith("data.") else "data.train_data")
        message = f"{setting}: {rest if argument in _SETTINGS else error}" if setting else str(error)
        message = message.replace("check=False", "data.check_files False")
        if entry and entry not in message:
            message += f" (in {entry!r})"
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(message) from error
