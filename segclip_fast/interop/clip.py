"""Starting from CLIP: any open_clip ViT, or an OpenAI CLIP file; all tensors of both towers are mapped."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import (
    GroupingConfig,
    LossConfig,
    ReconstructionConfig,
    SegCLIPConfig,
    TextConfig,
    VisionConfig,
)
from .authors import authors_name
from .files import check_names, read_torch

if TYPE_CHECKING:
    from ..model.segclip import SegCLIP

SCALARS = ("input_resolution", "context_length", "vocab_size")
_ADDED = ("vision.grouping.", "reconstruction.")


def from_clip(
    cls: type[SegCLIP],
    name: str,
    pretrained: str | None = None,
    *,
    image_size: int | None = None,
    group_after: int | None = None,
    grouping: GroupingConfig | None = None,
    reconstruction: ReconstructionConfig | None = None,
    loss: LossConfig | None = None,
) -> SegCLIP:
    """A SegCLIP model whose towers are CLIP's; the grouping module and decoder are freshly initialised.

    What the release freezes when it starts from CLIP is frozen here too: patch and token embedding, position
    embeddings and the norm before the first block.

    Args:
        cls: the model class.
        name: an open_clip model name such as "ViT-B-16-quickgelu"; it gives the architecture.
        pretrained: an open_clip tag ("openai", "laion2b_s34b_b88k", ...), a file of weights (a state dict, or
            OpenAI's own archive), or None for random towers.
        image_size: image side in pixels; another than CLIP's resizes the position embedding (bicubic).
        group_after: blocks before the grouping module; default two less than all.
        grouping: settings of the grouping module.
        reconstruction: settings of the reconstruction branch.
        loss: loss weights.

    Raises:
        ImportError: open_clip_torch is not installed.
        ValueError: unknown name or tag, not a ViT, or a file that does not fit the architecture.
        FileNotFoundError: `pretrained` looks like a path and nothing is there.
        OSError: the weights cannot be downloaded.
    """
    architecture = _architecture(name)
    vision, text = architecture["vision_cfg"], architecture["text_cfg"]
    if not isinstance(vision.get("layers"), int) or "patch_size" not in vision:
        raise ValueError(f"name: expected a CLIP model with a ViT image tower, got {name!r}")
    activation = "quick_gelu" if architecture.get("quick_gelu") else "gelu"
    config = SegCLIPConfig(
        embed_dim=architecture["embed_dim"],
        vision=VisionConfig(
            image_size=image_size or vision["image_size"],
            patch_size=vision["patch_size"],
            width=vision["width"],
            layers=vision["layers"],
            heads=vision["width"] // vision.get("head_width", 64),
            group_after=vision["layers"] - 2 if group_after is None else group_after,
            mlp_ratio=vision.get("mlp_ratio", 4.0),
            activation=activation,  # type: ignore[arg-type]
        ),
        grouping=grouping or GroupingConfig(),
        text=TextConfig(
            text["vocab_size"],
            text["context_length"],
            text["width"],
            text["layers"],
            text["heads"],
            activation,  # type: ignore[arg-type]
        ),
        reconstruction=reconstruction or ReconstructionConfig(),
    )
    model = cls(config, loss)
    if pretrained is not None:
        load_clip(model, _weights(name, pretrained), f"{name} {pretrained}")
        freeze_embeddings(model)
    return model


def load_clip(model: SegCLIP, values: Mapping[str, Tensor], source: str) -> None:
    """Copy CLIP's tensors (OpenAI's names) into both towers of `model`, resizing the position embedding.

    Raises:
        ValueError: a tensor is missing, unknown or of another shape.
    """
    found = {name: value.float() for name, value in values.items() if name not in SCALARS}
    positions = "visual.positional_embedding"
    if positions in found:
        found[positions] = _resize(found[positions], model.vision.config.grid)
    targets = {
        clip_name(name, model.vision.config.group_after): value
        for name, value in model.state_dict().items()
        if not name.startswith(_ADDED)
    }
    check_names(targets, found, source)
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(found[name])


def clip_name(name: str, group_after: int) -> str:
    """OpenAI's name of our tower tensor `name`; blocks of both stages are numbered through."""
    theirs = authors_name(name).removeprefix("clip.")
    theirs = theirs.replace("transformer.layers0.", "transformer.resblocks.")
    head, stage, tail = theirs.partition("transformer.layers2.")
    if stage:
        number, _, rest = tail.partition(".")
        theirs = f"{head}transformer.resblocks.{int(number) + group_after}.{rest}"
    return theirs


def freeze_embeddings(model: SegCLIP) -> None:
    """Freeze what the release freezes when it starts from CLIP."""
    vision, text = model.vision, model.text
    frozen = [vision.position_embedding, text.position_embedding, text.token_embedding.weight]
    frozen += [vision.patch_embedding.weight, vision.norm_in.weight, vision.norm_in.bias]
    for parameter in frozen:
        parameter.requires_grad_(False)


def _resize(table: Tensor, grid: int) -> Tensor:
    """Position embedding (1 + g^2, D) bicubically resized to (1 + grid^2, D)."""
    old = round((table.shape[0] - 1) ** 0.5)
    if old == grid:
        return table
    square = table[1:].unflatten(0, (old, old)).permute(2, 0, 1)[None]
    square = F.interpolate(square, (grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([table[:1], square[0].flatten(1).mT])


def _open_clip() -> Any:
    try:
        import open_clip
    except ImportError as error:
        raise ImportError(
            "from_clip needs the package open_clip_torch: pip install open_clip_torch"
        ) from error
    return open_clip


def _architecture(name: str) -> dict[str, Any]:
    found = _open_clip().get_model_config(name)
    if found is None:
        raise ValueError(f"name: expected one of open_clip.list_models(), got {name!r}")
    return found


def _weights(name: str, pretrained: str) -> dict[str, Tensor]:
    path = Path(pretrained)
    if path.is_file():
        if is_archive(path):
            return dict(torch.jit.load(path, map_location="cpu").state_dict())
        return read_torch(path)
    if path.suffix or "/" in pretrained:
        raise FileNotFoundError(f"pretrained: expected a tag or a file, found nothing at {pretrained}")
    open_clip = _open_clip()
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained not in tags:
        raise ValueError(f"pretrained: expected one of {tags} or a file, got {pretrained!r}")
    try:
        return dict(open_clip.create_model(name, pretrained=pretrained).state_dict())
    except (RuntimeError, OSError) as error:
        expected = f"to download {name} {pretrained!r}, or the path of a file in its place"
        raise OSError(f"pretrained: expected {expected}, got: {error}") from error


def is_archive(path: Path) -> bool:
    """Whether `path` is a TorchScript archive, as OpenAI distributes CLIP."""
    import zipfile

    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(entry.endswith("constants.pkl") for entry in archive.namelist())
