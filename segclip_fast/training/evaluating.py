"""Looking at a model while it trains: zero-shot evaluation, and pictures of fixed samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..config import SegCLIPConfig, TrainConfig
from ..data.sample import ImageTextSource, RawSample, SampleError
from ..model.segclip import SegCLIP
from . import pictures
from .parallel import plain
from .zero_shot import make_zero_shot


class Evaluating:
    """What `config` asks for; every rank calls the methods, since a sharded model is put together for them.

    Args:
        config: the run.
        model: the architecture.
        source: training pairs, of which the first are drawn where nothing is held out.

    Raises:
        ValueError, FileNotFoundError: the data set to evaluate on cannot be used.
    """

    def __init__(self, config: TrainConfig, model: SegCLIPConfig, source: ImageTextSource) -> None:
        self.zero_shot = make_zero_shot(config, model)
        self.class_names: tuple[str, ...] = ()
        if self.zero_shot is not None:
            self.samples = self.zero_shot.samples(config.pictures)
            self.class_names = tuple(self.zero_shot.class_names)
        else:
            self.samples = _first(source, config.pictures)

    def evaluate(self, model: SegCLIP) -> dict[str, float | int] | None:
        """Zero-shot quality ("miou", "pixel_accuracy", "images"); None without anything to evaluate on."""
        if self.zero_shot is None:
            return None
        with plain(model) as whole:
            return self.zero_shot.run(whole)

    def draw(self, model: SegCLIP, run: Path, step: int, first: bool) -> np.ndarray | None:
        """On the first rank: draw the fixed samples into RUN/pictures; the picture (H, W, 3) uint8."""
        if not self.samples:
            return None
        with plain(model) as whole:
            if not first:
                return None
            threshold = None if self.zero_shot is None else self.zero_shot.threshold
            picture = pictures.draw(whole, self.samples, self.class_names, threshold=threshold)
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
