"""Looking at a model while it trains: zero-shot evaluation, and pictures of fixed samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..config import TrainConfig
from ..data.sample import ImageTextSource, RawSample, SampleError
from ..model.segclip import SegCLIP
from . import pictures
from .zero_shot import make_zero_shot


class Evaluating:
    """What `config` asks for.

    Args:
        config: the run.
        source: training pairs, of which the first are drawn where nothing is held out.

    Attributes:
        wanted: there is something to evaluate on, or to draw.

    Raises:
        ValueError, FileNotFoundError: the data set to evaluate on cannot be used.
    """

    def __init__(self, config: TrainConfig, source: ImageTextSource) -> None:
        self.zero_shot = make_zero_shot(config, config.model)
        self.class_names: tuple[str, ...] = ()
        if self.zero_shot is not None:
            self.samples = self.zero_shot.samples(config.pictures)
            self.class_names = tuple(self.zero_shot.class_names)
        else:
            self.samples = _first(source, config.pictures)
        self.wanted = self.zero_shot is not None or bool(self.samples)

    def evaluate(self, model: SegCLIP) -> dict[str, float | int] | None:
        """Zero-shot quality ("miou", "pixel_accuracy", "images"); None without anything to evaluate on.

        Every rank must call it, with the same weights: they share the images.
        """
        return None if self.zero_shot is None else self.zero_shot.run(model)

    def draw(self, model: SegCLIP, run: Path, step: int) -> np.ndarray | None:
        """Draw the fixed samples into RUN/pictures; the picture (H, W, 3) uint8, or None without any."""
        if not self.samples:
            return None
        threshold = None if self.zero_shot is None else self.zero_shot.threshold
        picture = pictures.draw(model, self.samples, self.class_names, threshold=threshold)
        pictures.write(run, step, picture)
        return picture


def _first(source: ImageTextSource, count: int) -> list[RawSample]:
    """The first usable samples, among the first ten times as many."""
    found: list[RawSample] = []
    for index in range(min(10 * count, len(source))):
        if len(found) == count:
            break
        try:
            found.append(source[index])
        except SampleError:
            continue
    return found
