"""Labels in, text features out: validation, prompt templates, and a cache that encodes a vocabulary once.

Shape legend: C labels, T tokens of a prompt, E joint embedding.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F

from .windows import evaluation_mode

if TYPE_CHECKING:
    from .segmenter import Segmenter

TEMPLATES = ("a photo of a {}.",)  # protocol step 7
TEMPLATE_SETS = ("release", "simple7", "imagenet80")
TEXT_BATCH = 256  # prompts per call of the text encoder
VOCABULARIES_KEPT = 16  # per model; the oldest leaves first


def check_labels(labels: Sequence[str], name: str = "labels") -> tuple[str, ...]:
    """Strip the labels and refuse what cannot be a vocabulary.

    Args:
        labels: list or tuple of strings; the prompts use them as written, without outer blanks.
        name: what error messages call the argument.

    Raises:
        ValueError: not a list or tuple of strings, no label, an empty one, or two with the same prompt
            (the tokenizer ignores case and repeated blanks).
    """
    if not isinstance(labels, (list, tuple)):
        hint = f"; did you mean {name}=[{labels!r}]?" if isinstance(labels, str) else ""
        raise ValueError(f"{name}: expected a list or tuple of strings, got {type(labels).__name__}{hint}")
    if not labels:
        raise ValueError(f"{name}: expected at least one non-empty string, got {labels!r}")
    seen: dict[str, str] = {}
    for i, label in enumerate(labels):
        if not isinstance(label, str):
            raise ValueError(f"{name}: expected strings, got {type(label).__name__} at position {i}")
        key = " ".join(label.casefold().split())
        if not key:
            raise ValueError(f"{name}: expected non-empty strings, got {label!r} at position {i}")
        if key in seen:
            raise ValueError(f"{name}: expected distinct labels, got {seen[key]!r} and {label!r}")
        seen[key] = label
    return tuple(label.strip() for label in labels)


def split_labels(text: str, name: str = "labels") -> tuple[str, ...]:
    """Comma-separated labels of a command line, checked by `check_labels`: "cat, sofa" -> ("cat", "sofa").

    A comma at the end is forgiven.
    """
    parts = text.strip().removesuffix(",").split(",") if text.strip() else []
    return check_labels([part.strip() for part in parts], name)


def check_templates(templates: Sequence[str]) -> tuple[str, ...]:
    """Refuse prompt templates without a place for the label.

    Raises:
        ValueError: not a list or tuple of strings, none given, or one without "{}".
    """
    if not isinstance(templates, (list, tuple)) or not templates:
        raise ValueError(f"templates: expected a list or tuple of at least one string, got {templates!r}")
    for template in templates:
        if not isinstance(template, str) or "{}" not in template:
            raise ValueError(f"templates: expected strings with {{}} where the label goes, got {template!r}")
    return tuple(templates)


def template_set(name: str) -> tuple[str, ...]:
    """The prompts of a set by its name.

    Args:
        name: "release", the one of the protocol; "imagenet80" and "simple7", CLIP's prompts for ImageNet and
            the seven best of them, as open_clip has them.

    Raises:
        ValueError: no such set.
        ImportError: open_clip is missing.
    """
    if name not in TEMPLATE_SETS:
        raise ValueError(f"templates: expected one of {', '.join(TEMPLATE_SETS)}, got {name!r}")
    if name == "release":
        return TEMPLATES
    try:
        from open_clip import zero_shot_metadata as sets
    except ImportError as error:
        raise ImportError(
            f"templates: {name} comes from open_clip: pip install open_clip_torch ({error})"
        ) from error
    chosen = sets.OPENAI_IMAGENET_TEMPLATES if name == "imagenet80" else sets.SIMPLE_IMAGENET_TEMPLATES
    return tuple(template("{}") for template in chosen)


class PromptBank:
    """Label features by model and vocabulary.

    An entry is used only while the model's parameters are the very tensors, unchanged, that made it: an
    optimizer step, a loaded checkpoint, a move to another device or precision encodes anew. (Writing through
    `parameter.data` escapes PyTorch's bookkeeping: call `clear` after that.)
    """

    def __init__(self) -> None:
        self._models: WeakKeyDictionary[Segmenter, OrderedDict[tuple, tuple[int, torch.Tensor]]]
        self._models = WeakKeyDictionary()

    def clear(self) -> None:
        """Forget everything."""
        self._models.clear()

    def encode(
        self, model: Segmenter, labels: Sequence[str], templates: Sequence[str] = TEMPLATES
    ) -> torch.Tensor:
        """Normalised features of the labels, (C, E) float32 on the model's device; see `encode_labels`."""
        key = (check_labels(labels), check_templates(templates))
        entries = self._models.setdefault(model, OrderedDict())
        state = _state_of(model)
        if key in entries and entries[key][0] == state:
            entries.move_to_end(key)
            return entries[key][1]
        features = _encode(model, *key)
        entries[key] = (state, features)
        entries.move_to_end(key)
        while len(entries) > VOCABULARIES_KEPT:
            entries.popitem(last=False)
        return features


def _state_of(model: Segmenter) -> int:
    """A number that changes when any parameter is replaced or written to."""
    return hash(
        tuple((p.data_ptr(), p.dtype, 0 if p.is_inference() else p._version) for p in model.parameters())
    )


def _encode(model: Segmenter, labels: tuple[str, ...], templates: tuple[str, ...]) -> torch.Tensor:
    prompts = [template.replace("{}", label) for label in labels for template in templates]
    with evaluation_mode(model):
        parts = [
            model.encode_text(model.tokenize(prompts[i : i + TEXT_BATCH])).float()
            for i in range(0, len(prompts), TEXT_BATCH)
        ]
    features = torch.cat(parts).unflatten(0, (len(labels), len(templates)))  # (C, templates, E)
    return F.normalize(features.mean(dim=1), dim=-1)  # averaged first, as the release does


_BANK = PromptBank()


def encode_labels(
    model: Segmenter, labels: Sequence[str], templates: Sequence[str] = TEMPLATES
) -> torch.Tensor:
    """Text features of the labels (protocol step 7), encoded once per model and vocabulary.

    Args:
        model: gives `tokenize` and `encode_text`.
        labels: C strings.
        templates: prompts with {} for the label; their features are averaged before the normalisation.

    Returns:
        (C, E) float32 of unit length, on the model's device. Shared with the cache: do not write to it.

    Raises:
        ValueError: labels or templates are no vocabulary, see `check_labels` and `check_templates`.
    """
    return _BANK.encode(model, labels, templates)
