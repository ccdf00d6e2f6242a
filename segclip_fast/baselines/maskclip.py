"""MaskCLIP: dense features of plain CLIP, without training (Zhou, Loy, Dai, ECCV 2022).

CLIP's last block mixes the patches by attention. MaskCLIP drops its queries and keys: a patch keeps its own
value v = W_v ln_1(x), and W_o v takes the place of attention's output:

    y = x + W_o v,  z = y + MLP(ln_2(y)),  feature = ln_post(z) P    as released (residual=True)
    feature = ln_post(W_o v) P                                       the value path alone (residual=False)

Shapes: B images, H W pixels, N = rows x columns patches, row-major, D width, E joint embedding, T tokens.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ..data.transforms import CLIP_MEAN, CLIP_STD
from ..evaluation.segmenter import PatchFeatures
from . import patch_grid, renormalise


class MaskCLIP(nn.Module):
    """A CLIP model of open_clip whose patches are features of their own; its modules run as they are.

    Args:
        clip_model: an open_clip model with open_clip's `VisionTransformer` and [CLS] pooling as image tower.
        tokenizer: texts to token ids (B, T) int64, as long as the model's context.
        residual: keep the last block's residual connections and MLP around the value path, as the authors'
            released code for ViTs does; False takes the projected values alone, as many later works do.
        image_size: side in pixels of the windows of inference; default what CLIP was trained on.

    Raises:
        ValueError: another image tower (ResNet, timm, attentional or average pooling, attention with scales).
    """

    clip: Any

    def __init__(
        self,
        clip_model: nn.Module,
        tokenizer: Callable[[list[str]], Tensor],
        *,
        residual: bool = True,
        image_size: int | None = None,
    ) -> None:
        super().__init__()
        _check(getattr(clip_model, "visual", None))
        self.clip = clip_model
        self.tokenizer = tokenizer
        self.residual = residual
        self._image_size = image_size

    @classmethod
    def from_open_clip(
        cls,
        name: str,
        pretrained: str | None = None,
        *,
        device: str | torch.device = "cpu",
        residual: bool = True,
        image_size: int | None = None,
    ) -> MaskCLIP:
        """MaskCLIP of a model that open_clip knows, in evaluation mode.

        Args:
            name: an open_clip model name such as "ViT-B-16-quickgelu".
            pretrained: an open_clip tag ("openai", "laion2b_s34b_b88k", ...), a file of weights (or OpenAI's
                own archive), or None for random weights.
            device: where the model goes.
            residual: see the class.
            image_size: see the class.

        Raises:
            ImportError: open_clip_torch is not installed.
            ValueError: unknown name or tag, not a plain ViT, or a file that does not fit.
            FileNotFoundError: `pretrained` looks like a path and nothing is there.
            RuntimeError: the weights of a tag could not be downloaded.
        """
        import open_clip

        architecture = open_clip.get_model_config(name) if name in open_clip.list_models() else None
        if architecture is None:
            raise ValueError(f"name: expected one of open_clip.list_models(), got {name!r}")
        vision = architecture["vision_cfg"]
        if "timm_model_name" in vision or not isinstance(vision.get("layers"), int):
            raise ValueError(f"name: expected a CLIP model with open_clip's ViT as image tower, got {name!r}")
        if vision.get("attentional_pool") or vision.get("pool_type", "tok") != "tok":
            raise ValueError(f"name: expected a CLIP model with [CLS] pooling, got another with {name!r}")
        model = _create(name, pretrained)
        maskclip = cls(model, open_clip.get_tokenizer(name), residual=residual, image_size=image_size)
        return maskclip.to(device).eval()

    @property
    def image_size(self) -> int:
        """Side in pixels of the windows of inference."""
        return self.clip.visual.image_size[0] if self._image_size is None else self._image_size

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return self.clip.visual.patch_size[0]

    @property
    def logit_scale(self) -> Tensor:
        """Scalar, log of the inverse temperature."""
        return self.clip.logit_scale.reshape(())

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Token ids (B, T) int64."""
        return self.tokenizer(list(texts))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Text features (B, E), not normalised, of token ids (B, T) int64."""
        return self.clip.encode_text(tokens)

    def encode_image(self, images: Tensor) -> PatchFeatures:
        """CLIP's own image feature, and a feature for every patch.

        Args:
            images: (B, 3, H, W) floating point, CLIP-normalised (another normalisation that the weights were
                trained with is converted to); sides divisible by the patch. Positions of another grid than
                the training grid are resized bicubically.

        Raises:
            ValueError: wrong shape or dtype.
        """
        grid = patch_grid(images, self.patch_size)
        visual = self.clip.visual
        mean, std = getattr(visual, "image_mean", None), getattr(visual, "image_std", None)
        images = renormalise(images, mean or CLIP_MEAN, std or CLIP_STD)
        inputs: list[Tensor] = []  # of the last block
        hook = visual.transformer.resblocks[-1].register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
        try:
            found = functional_call(visual, {"positional_embedding": self.positions(*grid)}, (images,))
        finally:
            hook.remove()
        image = found[0] if isinstance(found, tuple) else found  # some towers return their tokens as well
        tokens = inputs[0] if visual.transformer.batch_first else inputs[0].transpose(0, 1)  # (B, 1 + N, D)
        if tokens.shape[1] != 1 + grid[0] * grid[1]:
            raise ValueError(
                "images: expected all patches in the last block; patch dropout needs model.eval()"
            )
        return PatchFeatures(image, self._dense(tokens[:, 1:]))

    def positions(self, rows: int, columns: int) -> Tensor:
        """Position embeddings (1 + N, D), [CLS] first, of a rows x columns grid."""
        table, grid = self.clip.visual.positional_embedding, self.clip.visual.grid_size
        if (rows, columns) == tuple(grid):
            return table
        square = table[1:].unflatten(0, grid).permute(2, 0, 1)[None]  # (1, D, *grid)
        resized = F.interpolate(square, (rows, columns), mode="bicubic", align_corners=False)
        return torch.cat([table[:1], resized[0].flatten(1).mT])

    def _dense(self, patches: Tensor) -> Tensor:
        """Patches (B, N, D) before the last block to their features (B, N, E)."""
        visual = self.clip.visual
        block = visual.transformer.resblocks[-1]
        weight, bias = block.attn.in_proj_weight.chunk(3)[2], block.attn.in_proj_bias.chunk(3)[2]
        values = F.linear(block.ln_1(patches), weight, bias)  # (B, N, D)
        found = block.ls_1(block.attn.out_proj(values))
        if self.residual:
            found = patches + found
            found = found + block.ls_2(block.mlp(block.ln_2(found)))
        return visual.ln_post(found) @ visual.proj


def _check(visual: Any) -> None:
    """Refuse image towers whose last block has no value path of the known form."""
    from open_clip.transformer import VisionTransformer

    def refuse(expected: str, got: object) -> None:
        raise ValueError(f"clip_model: expected {expected}, got {got}")

    if not isinstance(visual, VisionTransformer):
        refuse("an image tower of open_clip's class VisionTransformer", type(visual).__name__)
    if visual.attn_pool is not None or visual.pool_type != "tok":
        pooling = visual.pool_type if visual.attn_pool is None else "attentional"
        refuse("an image tower with [CLS] pooling ('tok')", repr(pooling))
    attention = visual.transformer.resblocks[-1].attn
    if not isinstance(attention, nn.MultiheadAttention) or attention.in_proj_weight is None:
        refuse("nn.MultiheadAttention with one projection in the last block", type(attention).__name__)
    for name in ("image_size", "patch_size"):
        sides = getattr(visual, name)
        if sides[0] != sides[1]:
            refuse(f"a square {name}", sides)


def _create(name: str, pretrained: str | None) -> nn.Module:
    """The open_clip model `name` with the weights of a tag or file, in float32."""
    import open_clip

    from ..interop.clip import SCALARS, is_archive

    if pretrained is None or open_clip.get_pretrained_cfg(name, pretrained):
        return open_clip.create_model(name, pretrained=pretrained)
    path = Path(pretrained)
    if not path.is_file():
        if path.suffix or "/" in pretrained:
            raise FileNotFoundError(f"pretrained: expected a tag or a file, found nothing at {pretrained}")
        tags = open_clip.list_pretrained_tags_by_model(name)
        raise ValueError(f"pretrained: expected one of {tags} or a file, got {pretrained!r}")
    try:
        if not is_archive(path):
            return open_clip.create_model(name, pretrained=pretrained)  # reads plain tensors only
        model = open_clip.create_model(name)
        values = dict(torch.jit.load(path, map_location="cpu").state_dict())
        model.load_state_dict({key: value for key, value in values.items() if key not in SCALARS})
    except Exception as error:  # a damaged file raises anything
        reason = textwrap.shorten(str(error) or type(error).__name__, 240)
        raise ValueError(f"pretrained: expected weights of {name}, got {pretrained!r}: {reason}") from error
    return model
