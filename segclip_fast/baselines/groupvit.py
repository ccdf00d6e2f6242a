"""GroupViT: patches grouped in stages by group tokens (Xu et al., CVPR 2022), as Hugging Face stores it.

Shapes: B images, H W pixels, N = rows x columns patches, row-major, L groups of the last grouping stage, D
width, E joint embedding, T tokens.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..model.segclip import ImageFeatures
from . import patch_grid, renormalise

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CLIP_VOCABULARY = 49408  # ids of CLIP's byte-pair encoding


class GroupViT(nn.Module):
    """A `GroupViTModel` of transformers as a model of the evaluation; its modules run as they are.

    Evaluation mode gives clean features; in training mode groups are drawn with noise and the projections
    normalise over the batch.

    Args:
        hf_model: the model.
        tokenizer: texts to token ids (B, T) int64, T at most the model's positions; default CLIP's.
        image_size: side in pixels of the windows of inference; default twice the training side, 448 for the
            published weights, as their release evaluates them (with a stride of half a window).

    Attributes:
        thresholds: background thresholds of the release, by data set.

    Raises:
        ImportError: transformers is not installed.
        ValueError: not a `GroupViTModel`, without grouping, or sides that are not one number of pixels.
    """

    thresholds: dict[str, float]
    model: Any

    def __init__(
        self,
        hf_model: nn.Module,
        tokenizer: Callable[[list[str]], Tensor] | None = None,
        *,
        image_size: int | None = None,
    ) -> None:
        super().__init__()
        _check(hf_model)
        self.model = hf_model
        self.tokenizer = tokenizer
        self.thresholds = {"voc": 0.95, "context": 0.35, "coco_object": 0.95}
        self._image_size = image_size

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | os.PathLike[str],
        *,
        device: str | torch.device = "cpu",
        image_size: int | None = None,
    ) -> GroupViT:
        """Load a folder (config.json and weights) or a model of the hub, in evaluation mode and float32.

        Args:
            path_or_id: folder, read without network; or a name such as "nvidia/groupvit-gcc-yfcc".
            device: where the model goes.
            image_size: see the class.

        Raises:
            ImportError: transformers is not installed.
            FileNotFoundError: `path_or_id` looks like a path and no model is there.
            OSError: no such model on the hub, or no network.
            ValueError: the checkpoint of another model, or an incomplete one.
        """
        transformers = _transformers()
        source = os.fspath(path_or_id)
        local = Path(source).is_dir()
        if not local and (Path(source).is_absolute() or source.startswith(".") or source.count("/") != 1):
            raise FileNotFoundError(f"path_or_id: expected a folder or OWNER/NAME, found nothing at {source}")
        if local and not (Path(source) / "config.json").is_file():
            raise FileNotFoundError(f"path_or_id: expected a folder with config.json, got {source}")
        config = transformers.AutoConfig.from_pretrained(source, local_files_only=local)
        if config.model_type != "groupvit":
            raise ValueError(f"path_or_id: expected a model of type groupvit, got {config.model_type!r}")
        model, info = transformers.GroupViTModel.from_pretrained(
            source, config=config, local_files_only=local, output_loading_info=True
        )
        if info["missing_keys"]:
            names = sorted(info["missing_keys"])
            raise ValueError(
                f"path_or_id: expected all weights, {source} lacks {len(names)}: {names[:4]} ..."
            )
        return cls(model.float(), image_size=image_size).to(device).eval()

    @property
    def image_size(self) -> int:
        """Side in pixels of the windows of inference."""
        trained = self.model.config.vision_config.image_size
        return 2 * trained if self._image_size is None else self._image_size

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return self.model.config.vision_config.patch_size

    @property
    def logit_scale(self) -> Tensor:
        """Scalar, log of the inverse temperature."""
        return self.model.logit_scale

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Token ids (B, T) int64; too long texts keep their end token.

        Raises:
            ValueError: no tokenizer was given and the model's vocabulary is not CLIP's.
        """
        if self.tokenizer is None:
            from ..data.tokenizer import CLIPTokenizer

            text = self.model.config.text_config
            if text.vocab_size != CLIP_VOCABULARY:
                raise ValueError(
                    f"tokenizer: expected one for the model's {text.vocab_size} ids, got none (CLIP's has "
                    f"{CLIP_VOCABULARY})"
                )
            self.tokenizer = CLIPTokenizer(text.max_position_embeddings)
        return self.tokenizer(list(texts))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Text features (B, E), not normalised, of token ids (B, T) int64."""
        return self.model.text_projection(self.model.text_model(input_ids=tokens).pooler_output)

    def encode_image(self, images: Tensor) -> ImageFeatures:
        """Features of the image and its groups, and which group every patch belongs to.

        `soft` is the product of the soft assignments of all grouping stages, which sums to 1 over the groups;
        `logits` is its logarithm.

        Args:
            images: (B, 3, H, W) floating point, CLIP-normalised; GroupViT was trained with ImageNet's mean
                and deviation, to which they are converted here. Sides divisible by the patch; positions of
                another grid than the training grid are resized bicubically.

        Raises:
            ValueError: wrong shape or dtype.
        """
        patch_grid(images, self.patch_size)
        vision = self.model.vision_model
        pixels = renormalise(images, IMAGENET_MEAN, IMAGENET_STD)
        # The model's own forward takes the training size only; its parts take any.
        tokens = vision.embeddings(pixels, interpolate_pos_encoding=True)  # (B, N, D)
        encoded = vision.encoder(tokens, output_attentions=True, return_dict=True)
        groups = vision.layernorm(encoded.last_hidden_state)  # (B, L, D)
        image = self.model.visual_projection(groups.mean(dim=1))  # (B, E)
        regions = self.model.visual_projection(groups.flatten(0, 1)).unflatten(
            0, groups.shape[:2]
        )  # (B, L, E)
        soft = _assignment(encoded.attentions)
        hard = torch.zeros_like(soft).scatter_(1, soft.argmax(dim=1, keepdim=True), 1.0)
        logits = soft.clamp_min(torch.finfo(soft.dtype).tiny).log()
        return ImageFeatures(image, regions, logits, soft, hard)


def _assignment(stages: Sequence[Tensor]) -> Tensor:
    """Soft assignment (B, L, N) of patches to the last groups, from every stage's (B, groups, members).

    Each stage's sums to 1 over its groups, so their product does; it is divided by its sum against rounding.
    """
    with torch.autocast(stages[0].device.type, enabled=False):
        exact = [stage.to(torch.promote_types(stage.dtype, torch.float32)) for stage in stages]
        soft = functools.reduce(lambda members, stage: stage @ members, exact)
        return soft / soft.sum(dim=1, keepdim=True)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError("GroupViT needs the package transformers: pip install transformers") from error
    return transformers


def _check(hf_model: Any) -> None:
    if not isinstance(hf_model, _transformers().GroupViTModel):
        raise ValueError(f"hf_model: expected a transformers.GroupViTModel, got {type(hf_model).__name__}")
    vision = hf_model.config.vision_config
    if not any(vision.num_group_tokens):
        raise ValueError(f"hf_model: expected a stage with group tokens, got {list(vision.num_group_tokens)}")
    for name in ("image_size", "patch_size"):
        if not isinstance(getattr(vision, name), int):
            raise ValueError(
                f"hf_model: expected one number of pixels as {name}, got {getattr(vision, name)}"
            )
