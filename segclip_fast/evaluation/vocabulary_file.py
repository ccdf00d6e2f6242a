"""Own prompts for a data set, from a small YAML file.

    templates: imagenet80            # a set of `prompts.TEMPLATE_SETS`, or a list of texts with {}
    prompts:                         # class name as the data set has it: what stands for it in the prompts
      aeroplane: airplane
      monitor: [monitor, television, computer screen]    # several: their features are averaged
    background: [wall, floor, sky]   # names that compete with the classes, in place of a threshold

Every part may be left out; classes that are not named keep their prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .prompts import check_labels, check_templates, template_set

PARTS = ("templates", "prompts", "background")


@dataclass(frozen=True)
class OwnPrompts:
    """What a vocabulary file says.

    Attributes:
        templates: prompts with {}, or None to leave them as they are.
        labels: the text of each class that gets a prompt, in the data set's order.
        synonyms: label -> the texts that stand for it, where there are several.
        background: names of the background, or None.
    """

    templates: tuple[str, ...] | None
    labels: tuple[str, ...]
    synonyms: dict[str, tuple[str, ...]] = field(default_factory=dict)
    background: tuple[str, ...] | None = None


def read_vocabulary(path: str | Path, classes: Sequence[str], prompts: Sequence[str]) -> OwnPrompts:
    """Read a vocabulary file.

    Args:
        path: the YAML file.
        classes: the data set's names of the classes that get a prompt.
        prompts: their texts where the file says nothing.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no YAML, or parts, classes or texts that cannot be used.
    """
    values = _load(Path(path))
    labels, synonyms = list(prompts), {}
    given = values.get("prompts") or {}
    if not isinstance(given, dict):
        raise ValueError(f"vocabulary: expected `prompts` as class: text, got {type(given).__name__}")
    for name, texts in given.items():
        if name not in classes:
            raise ValueError(f"vocabulary: expected classes of the data set in `prompts`, got {name!r}")
        texts = check_labels(texts if isinstance(texts, list) else [texts], f"prompts of {name!r}")
        labels[list(classes).index(name)] = texts[0]
        if len(texts) > 1:
            synonyms[texts[0]] = texts
    templates, background = values.get("templates"), values.get("background")
    if isinstance(templates, str):
        templates = template_set(templates)
    return OwnPrompts(
        None if templates is None else check_templates(templates),
        check_labels(labels, "prompts"),
        synonyms,
        None if background is None else check_labels(background, "background"),
    )


def _load(path: Path) -> dict[str, Any]:
    import yaml

    if not path.is_file():
        raise FileNotFoundError(f"vocabulary: expected an existing YAML file, got {str(path)!r}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"vocabulary: expected YAML, got {str(path)!r} ({reason})") from error
    if not isinstance(values, dict) or not set(values) <= set(PARTS):
        got = sorted(map(str, values)) if isinstance(values, dict) else type(values).__name__
        raise ValueError(f"vocabulary: expected some of {', '.join(PARTS)} in {str(path)!r}, got {got}")
    return values
