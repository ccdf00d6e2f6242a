"""Training runs as YAML files: the prepared ones of `configs/` by name, and your own by path.

A file is a mapping with the names of `TrainConfig`, nested as there; what it leaves out has the dataclass's
default. Three things are more than that:

    base: paper          another run, by name or as a YAML file beside this one, which this one changes
    model: vit_b16       a named architecture; as a mapping, `preset: vit_b16` and what is changed of it
    epochs: 10           takes the place of the base's or the default `steps`, and `steps` that of `epochs`
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import re
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from .._checks import require
from ..config import PRESETS, SegCLIPConfig, TrainConfig, from_dict, preset, to_dict

SUFFIXES = (".yaml", ".yml")
BASE, PRESET = "base", "preset"
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def available() -> list[str]:
    """Names of the prepared runs, such as "paper" and "ablations/centers_4"; whole runs first."""
    folder = _folder()
    found = [file.relative_to(folder).with_suffix("") for file in folder.rglob("*.yaml")]
    return [path.as_posix() for path in sorted(found, key=lambda path: (len(path.parts), path))]


def summary(name: str) -> str:
    """What a prepared run is: the first line of its file, a comment."""
    with _find(name).open(encoding="utf-8") as file:
        return file.readline().removeprefix("#").strip()


def load_run(name_or_path: str | Path) -> TrainConfig:
    """The run called so, or that of a YAML file.

    Args:
        name_or_path: one of `available()`, or the path of a file that ends in .yaml or .yml.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no prepared run of that name; a file that is not YAML or no mapping; a key twice; unknown
            settings, values of the wrong type or out of range; files that are each other's base. The message
            names file, setting, what is expected and what was found.
        OSError: the file cannot be read.
    """
    file = _find(name_or_path)
    values = _with_bases(file)
    if "model" in values:
        values["model"] = _architecture(values["model"])
    if values.get("epochs"):
        values.setdefault("steps", 0)
    try:
        return from_dict(TrainConfig, values, "run")
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def dump(config: TrainConfig) -> str:
    """All settings as YAML, from which `load_run` makes an equal config."""
    return yaml.dump(to_dict(config), Dumper=_Dumper, sort_keys=False, width=100, allow_unicode=True)


# --- finding and reading files


def _folder() -> Path:
    """Where the prepared runs are: installed, or beside the package in the repository."""
    try:
        return Path(str(importlib.resources.files(f"{__package__.split('.')[0]}.configs")))
    except ModuleNotFoundError:  # an editable install from before there was this package
        return Path(__file__).resolve().parents[2] / "configs"


def _find(given: str | Path, asking: Path | None = None) -> Path:
    """The file of a prepared run, or of a path, which is relative to the file that asks for its base."""
    path, name = Path(given), "run" if asking is None else f"{asking}: {BASE}"
    if path.suffix not in SUFFIXES:
        known = available()
        what = f"a YAML file (.yaml) or one of the prepared runs {', '.join(known)}"
        require(path.as_posix() in known, name, what, str(given))
        return _folder() / f"{path.as_posix()}.yaml"
    path = path if asking is None else asking.parent / path
    if not path.exists():
        raise FileNotFoundError(f"{name}: expected an existing YAML file, got {str(path)!r}")
    return path


def _with_bases(file: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Checked values of a file over those of its bases; `above` are the files whose base it is."""
    values = _read(file)
    base = values.pop(BASE, None)
    changes = _checked(TrainConfig, values, file, "")
    if base is None:
        return changes
    _check(isinstance(base, str), file, BASE, "a prepared run or a YAML file", base)
    chain, found = (*above, file.resolve()), _find(base, file)
    if found.resolve() in chain:
        way = " -> ".join(str(path) for path in (*chain, found.resolve()))
        raise ValueError(f"{file}: {BASE}: expected no cycle, got {way}")
    return _changed(_with_bases(found, chain), changes)


class _Loader(yaml.SafeLoader):
    """YAML without repeated keys, and with 4e-3 as a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping; raises ConstructorError where a key comes twice."""
        seen = set()
        for name in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if name.value in seen:
                problem = f"the key {name.value!r} twice"
                raise yaml.constructor.ConstructorError(None, None, problem, name.start_mark)
            seen.add(name.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Lists of settings on one line."""


# YAML 1.1, which PyYAML reads, wants a dot before the exponent and a sign after it.
_FLOAT = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
for _each in (_Loader, _Dumper):
    _each.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
_Dumper.add_representer(
    tuple, lambda dumper, values: dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=True)
)


def _read(file: Path) -> dict[str, Any]:
    """The mapping of a YAML file."""
    try:
        values = yaml.load(file.read_text(encoding="utf-8-sig"), _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split()).replace('in "<unicode string>", ', "")
        raise ValueError(f"{file}: expected YAML, got {reason or type(error).__name__}") from error
    if not isinstance(values, dict):
        got = "an empty file" if values is None else repr(values)
        raise ValueError(f"{file}: expected a mapping of settings, got {got}")
    return values


# --- checking and merging


def _check(good: bool, file: Path, key: str, expected: str, got: Any) -> None:
    if not good:
        raise ValueError(f"{file}: {key}: expected {expected}, got {'nothing' if got is None else repr(got)}")


def _checked(kind: Any, value: Any, file: Path, key: str) -> Any:
    """`value` of the setting `key` as its type `kind` has it: mappings stay, lists become tuples."""
    if dataclasses.is_dataclass(kind):
        return _checked_fields(kind, value, file, key)
    options = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        _check(value in options, file, key, f"one of {', '.join(map(repr, options))}", value)
        return value
    if typing.get_origin(kind) is tuple:
        some = len(options) == 2 and options[1] is Ellipsis
        good = isinstance(value, list) and (some or len(value) == len(options))
        _check(good, file, key, "a list" if some else f"a list of {len(options)}", value)
        kinds = options[:1] * len(value) if some else options
        return tuple(
            _checked(one, part, file, f"{key}[{number}]")
            for number, (one, part) in enumerate(zip(kinds, value, strict=True))
        )
    if kind is float and type(value) is int and abs(value) < 2**1023:
        return float(value)
    _check(type(value) is kind, file, key, _WORDS[kind], value)  # not isinstance: True is an int
    return value


def _checked_fields(kind: Any, values: Any, file: Path, key: str) -> dict[str, Any]:
    if kind is SegCLIPConfig and isinstance(values, str):
        values = {PRESET: values}
    _check(isinstance(values, dict), file, key, "a mapping", values)
    hints = typing.get_type_hints(kind)
    found = {}
    for name, value in values.items():
        inner = f"{key}.{name}" if key else str(name)
        if kind is SegCLIPConfig and name == PRESET:
            _check(value in tuple(PRESETS), file, inner, f"one of {', '.join(sorted(PRESETS))}", value)
            found[name] = value
            continue
        if name not in hints:
            raise ValueError(f"{file}: {inner}: expected one of {', '.join(hints)}, got an unknown setting")
        found[name] = _checked(hints[name], value, file, inner)
    return found


def _changed(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The run `base` with `changes`."""
    gone = set()
    for one, other in (("steps", "epochs"), ("epochs", "steps")):
        if changes.get(one) and other not in changes:
            gone.add(other)
    if PRESET in changes.get("model", {}):
        gone.add("model")  # a named architecture begins anew
    return _merged({name: value for name, value in base.items() if name not in gone}, changes)


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`changes` over `base`, mappings within mappings alike."""
    found = dict(base)
    for name, value in changes.items():
        below = found.get(name)
        both = isinstance(below, Mapping) and isinstance(value, Mapping)
        found[name] = _merged(below, value) if both else value  # type: ignore[arg-type]
    return found


def _architecture(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of a model, a named architecture's among them."""
    changes = {name: value for name, value in values.items() if name != PRESET}
    return _merged(to_dict(preset(values[PRESET])), changes) if PRESET in values else changes
