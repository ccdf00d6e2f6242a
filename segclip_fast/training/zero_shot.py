"""Zero-shot evaluation while a run trains: on held-out generated pictures, or on a data set.

Every process of a run takes its share of the images and all get the same result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .._checks import require
from ..config import SegCLIPConfig, TrainConfig
from ..data.opening import make_held_out
from ..data.sample import ImageTextSource, RawSample
from ..data.tokenizer import tokenizer_for
from ..evaluation.datasets import DATASETS, SegmentationSet, open_dataset
from ..evaluation.harness import evaluate_set
from ..evaluation.options import Options
from ..evaluation.vocabularies import BACKGROUND, default_threshold
from ..evaluation.windows import evaluation_mode
from ..model.segclip import SegCLIP

IMAGES = 32  # in one step of an evaluation


@dataclass(frozen=True, eq=False)
class ZeroShot:
    """An evaluation that can be repeated; images are read in between, without further processes.

    Attributes:
        source: images with masks.
        prompts: the text for each class but the background.
        options: the official protocol; where there is a background, its threshold.
        images: how many of the first images count.
    """

    source: ImageTextSource
    prompts: tuple[str, ...]
    options: Options
    images: int

    def run(self, model: SegCLIP) -> dict[str, float | int]:
        """Quality of the model: "miou", "pixel_accuracy" and how many "images" that is over.

        Its training flag is left as it was. In a process group this must be called on every process, with
        the same weights.

        Raises:
            ValueError, OSError: an image or mask that cannot be used.
        """
        with evaluation_mode(model):
            found = evaluate_set(
                model, self.source, self.prompts, self.options, limit=self.images, images=IMAGES
            )
        metric = found.metric
        return {"miou": metric.miou, "pixel_accuracy": metric.pixel_accuracy, "images": found.images}

    def samples(self, count: int) -> list[RawSample]:
        """The first `count` images, fewer if there are no more; always the same."""
        return [self.source[index] for index in range(min(count, len(self.source)))]

    @property
    def class_names(self) -> tuple[str, ...]:
        """The text for each index of the masks; "background" comes first if it is found by threshold."""
        return (BACKGROUND, *self.prompts) if self.options.background else self.prompts

    @property
    def threshold(self) -> float | None:
        """Of the background; None without."""
        return self.options.threshold


def make_zero_shot(config: TrainConfig, model_config: SegCLIPConfig) -> ZeroShot | None:
    """What a run is evaluated on, opened and checked; None where it has nothing with masks.

    Args:
        config: the run; `eval_dataset` comes first, then held-out pictures of generated sources.
        model_config: of the model that will be evaluated.

    Raises:
        ValueError: no such data set, one that cannot be used, or class names the model has no words for.
        FileNotFoundError: no such folder, or files of the data set are missing.
    """
    if config.eval_dataset:
        data = _open(config.eval_dataset, config.eval_root)
        threshold = default_threshold(data.name, "official") if data.background else None
        options = Options(background=data.background, threshold=threshold)
        return _checked(data, data.prompts, options, config, model_config)
    held_out = make_held_out(config.data, model_config, config.eval_images)
    if held_out is None:
        return None
    background = tuple(held_out.class_names[:1]) == (BACKGROUND,)
    prompts = held_out.class_names[int(background) :]
    return _checked(held_out, prompts, Options(background=background), config, model_config)


def _open(name: str, root: str) -> SegmentationSet:
    """A data set or a part of it; errors name the settings of a run."""
    require(name in DATASETS, "eval_dataset", f"one of {', '.join(DATASETS)}", name)
    try:
        return open_dataset(name, root, partial=True)
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"eval_root: {str(error).removeprefix('root: ')}") from error


def _checked(
    source: ImageTextSource,
    prompts: Sequence[str],
    options: Options,
    config: TrainConfig,
    model_config: SegCLIPConfig,
) -> ZeroShot:
    """Refuse what the first evaluation would stumble over hours later: unknown words, an unreadable image."""
    texts = [template.replace("{}", name) for name in prompts for template in options.templates]
    try:
        tokenizer_for(model_config.text)(texts)
    except ValueError as error:
        setting = "eval_dataset" if config.eval_dataset else "data.dataset_type"
        raise ValueError(f"{setting}: {error}") from error
    source[0]
    return ZeroShot(source, tuple(prompts), options, min(config.eval_images, len(source)))
