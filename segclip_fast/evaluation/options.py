"""What shapes a label map besides model, photo and labels, and what a vocabulary becomes under it.

Shape legend: C texts (labels, and names of the background), E joint embedding.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .._checks import require
from .prompts import TEMPLATES, check_labels, check_templates, encode_labels
from .scoring import Background
from .segmenter import Segmenter
from .vocabularies import BACKGROUND, VOC
from .windows import Sliding

_LOGGER = logging.getLogger("segclip_fast")


@dataclass(frozen=True)
class Options:
    """How photos are segmented; see `segmentation.segment_batch` for each.

    Attributes:
        background: False: every pixel gets a label. True: "background", index 0, where no label scores well
            enough (protocol step 5). Names, for instance ("wall", "floor"): these compete with the labels,
            and what they win is "background".
        threshold: with background=True, a region whose best score is lower is background; None takes .80
            (.75 in protocol "paper").
        templates: prompts with {} for the label; their text features are averaged.
        snap: give every superpixel of the photo one label, so that borders follow its edges.
        pamr: refine the scores by PAMR.
        sliding: protocol, resolution, batches, precision.

    Raises:
        ValueError: an option that cannot be used.
    """

    background: bool | tuple[str, ...] = False
    threshold: float | None = None
    templates: tuple[str, ...] = TEMPLATES
    snap: bool = False
    pamr: bool = False
    sliding: Sliding = dataclasses.field(default_factory=Sliding)

    def __post_init__(self) -> None:
        if not isinstance(self.background, bool):
            object.__setattr__(self, "background", check_labels(self.background, "background"))
        object.__setattr__(self, "templates", check_templates(self.templates))
        if self.background is not True:
            require(self.threshold is None, "threshold", "None unless background=True", self.threshold)
        elif self.threshold is None:
            paper = self.sliding.protocol == "paper"
            object.__setattr__(self, "threshold", VOC.paper_threshold if paper else VOC.threshold)
        else:
            require(0.0 <= self.threshold <= 1.0, "threshold", "a number from 0 to 1", self.threshold)

    @property
    def background_names(self) -> tuple[str, ...]:
        """Names of the background that compete with the labels."""
        return () if isinstance(self.background, bool) else self.background

    @property
    def refinement(self) -> str:
        """What is added to the protocol, in words; "none" for nothing."""
        parts = [name for name, on in (("pamr", self.pamr), ("snap", self.snap)) if on]
        if self.sliding.short_side is not None:
            parts.append(f"short side {self.sliding.short_side}")
        if self.sliding.stride is not None:
            parts.append(f"stride {self.sliding.stride}")
        if len(self.templates) > 1:
            parts.append(f"{len(self.templates)} templates")
        return " + ".join(parts) or "none"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self) | {"refinement": self.refinement}


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Labels ready to be looked for.

    Attributes:
        names: of the label map's indices; the background comes first where there is one.
        text: (C, E) normalised features of the labels, then of the background's names.
        background: how background is found.
    """

    names: tuple[str, ...]
    text: Tensor
    background: Background


def prepare_vocabulary(
    model: Segmenter,
    labels: Sequence[str],
    options: Options,
    synonyms: Mapping[str, Sequence[str]] | None = None,
) -> Vocabulary:
    """Check the labels and encode them (once per model and vocabulary).

    Args:
        model: encodes the texts.
        labels: what is looked for.
        options: templates and background.
        synonyms: for some labels the texts that stand for them in the prompts, in place of the label itself;
            their normalised features are averaged and normalised again.

    Raises:
        ValueError: labels or synonyms that are no vocabulary, synonyms of no label, or "background" among the
            labels where it is added.
    """
    labels = check_labels(labels)
    if options.background and BACKGROUND in (label.casefold() for label in labels):
        raise ValueError(f"labels: expected no {BACKGROUND!r} among them, `background` adds it")
    if options.threshold is not None and len(labels) == 1:
        _LOGGER.warning(
            "labels: the only label %r always scores 1, so no pixel can be background by threshold; "
            "name what else there is instead: background=[...]",
            labels[0],
        )
    rest = options.background_names
    text = encode_labels(model, (*labels, *rest), options.templates)
    if synonyms:
        text = _with_synonyms(model, text, labels, options.templates, synonyms)
    names = (BACKGROUND, *labels) if options.background else labels
    return Vocabulary(names, text, Background(options.threshold, len(rest)))


def _with_synonyms(
    model: Segmenter,
    text: Tensor,
    labels: tuple[str, ...],
    templates: tuple[str, ...],
    synonyms: Mapping[str, Sequence[str]],
) -> Tensor:
    """`text` with the features of the labels that have synonyms replaced by theirs."""
    text = text.clone()  # it belongs to the cache
    for label, names in synonyms.items():
        require(label in labels, "synonyms", f"one of the labels {', '.join(labels)}", label)
        found = encode_labels(model, check_labels(names, f"synonyms of {label!r}"), templates)
        text[labels.index(label)] = F.normalize(found.mean(dim=0), dim=0)
    return text
