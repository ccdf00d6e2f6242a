"""The layout of the authors' release: a torch file of named float32 tensors (415 for ViT-B/16)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..config import (
    GroupingConfig,
    ReconstructionConfig,
    SegCLIPConfig,
    TextConfig,
    VisionConfig,
)
from .files import check_names, write_whole

if TYPE_CHECKING:
    from ..model.segclip import SegCLIP

# our prefix -> theirs; the first that fits
_PREFIXES = (
    ("text.blocks.", "clip.transformer.resblocks."),
    ("text.norm.", "clip.ln_final."),
    ("text.token_embedding.", "clip.token_embedding."),
    ("text.position_embedding", "clip.positional_embedding"),
    ("text.projection", "clip.text_projection"),
    ("logit_scale", "clip.logit_scale"),
    ("vision.patch_embedding.", "clip.visual.conv1."),
    ("vision.class_embedding", "clip.visual.class_embedding"),
    ("vision.position_embedding", "clip.visual.positional_embedding"),
    ("vision.norm_in.", "clip.visual.ln_pre."),
    ("vision.norm_out.", "clip.visual.ln_post."),
    ("vision.projection", "clip.visual.proj"),
    ("vision.first_stage.", "clip.visual.transformer.layers0."),
    ("vision.third_stage.", "clip.visual.transformer.layers2."),
    ("vision.grouping.centers", "clip.visual.transformer.semantic_layer2.semantic_center"),
    ("vision.grouping.norm.", "clip.visual.transformer.semantic_layer2.norm."),
    ("vision.grouping.blocks.", "clip.visual.transformer.semantic_layer2.cross_att."),
    ("vision.grouping.center_norm.", "clip.visual.transformer.semantic_layer2.cross_ln."),
    ("vision.grouping.key_weight", "clip.visual.transformer.semantic_layer2.k_conv.weight"),
    ("vision.grouping.key_norm.", "clip.visual.transformer.semantic_layer2.k_ln."),
    ("vision.grouping.value_weight", "clip.visual.transformer.semantic_layer2.v_conv.weight"),
    ("vision.grouping.out_norm.", "clip.visual.transformer.semantic_layer2.proj_o.ln."),
    ("vision.grouping.out_mlp.", "clip.visual.transformer.semantic_layer2.proj_o.mlp."),
    ("reconstruction.mix.", "clip.visual.transformer.reconstruct_layer2.rec_proj_a.a_fc."),
    ("reconstruction.blocks.", "clip.visual.transformer.layers_mae2."),
    ("reconstruction.mask_token", "vis_mae_decoder.mask_token"),
    ("reconstruction.embed.", "vis_mae_decoder.decoder_embed."),
    ("reconstruction.decoder.", "vis_mae_decoder.decoder_blocks."),
    ("reconstruction.norm.", "vis_mae_decoder.decoder_norm."),
    ("reconstruction.predict.", "vis_mae_decoder.decoder_pred."),
)
# inside a CLIP-style block
_BLOCK = (
    ("attention.qkv.weight", "attn.in_proj_weight"),
    ("attention.qkv.bias", "attn.in_proj_bias"),
    ("attention.proj.", "attn.out_proj."),
    ("norm_keys.", "ln_k."),
    ("norm2.", "ln_2."),
    ("mlp.fc1.", "mlp.c_fc."),
    ("mlp.fc2.", "mlp.c_proj."),
)
_CLIP_BLOCK = re.compile(r"(resblocks|layers0|layers2|layers_mae2|cross_att)\.\d+\.")
_MAE_ONLY = ("clip.visual.transformer.layers_mae2.", "clip.visual.transformer.reconstruct_layer2.")
POSITIONS = "vis_mae_decoder.decoder_pos_embed"


def authors_name(name: str) -> str:
    """The release's name of our tensor `name`."""
    for ours, theirs in _PREFIXES:
        if name.startswith(ours):
            name = theirs + name[len(ours) :]
            break
    block = _CLIP_BLOCK.search(name)
    if block is None:
        return name.replace(".attention.", ".attn.")  # a decoder block, or no block
    head, part = name[: block.end()], name[block.end() :]
    norm1 = "ln_x." if block.group(1) == "cross_att" else "ln_1."
    for ours, theirs in (("norm1.", norm1), *_BLOCK):
        if part.startswith(ours):
            return head + theirs + part[len(ours) :]
    raise AssertionError(name)


def _shape(name: str, shape: torch.Size) -> torch.Size:
    """Shape of the release's tensor for ours of `shape`."""
    if name.endswith(("grouping.key_weight", "grouping.value_weight")):
        return torch.Size((*shape, 1))
    return torch.Size((1, 1, *shape)) if name == "reconstruction.mask_token" else shape


def to_authors(model: SegCLIP) -> dict[str, Tensor]:
    """All tensors of `model` under the release's names and shapes, float32 on the CPU."""
    values = {
        authors_name(name): value.detach().to("cpu", torch.float32).reshape(_shape(name, value.shape)).clone()
        for name, value in model.state_dict().items()
    }
    if model.reconstruction is not None:
        values[POSITIONS] = model.reconstruction.positions.detach().cpu()[None].clone()
    return values


def from_authors(model: SegCLIP, values: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The release's tensors under our names and shapes; raises ValueError where `model` needs others."""
    values = dict(values)
    expected = to_authors(model)
    if model.reconstruction is None:
        values = {k: v for k, v in values.items() if not k.startswith((*_MAE_ONLY, "vis_mae_decoder."))}
    check_names(expected, values, source)
    if POSITIONS in expected and not torch.allclose(values[POSITIONS], expected[POSITIONS], atol=1e-5):
        raise ValueError(f"checkpoint: expected the fixed sin-cos table as {POSITIONS}, got other values")
    return {
        name: values[authors_name(name)].reshape(value.shape) for name, value in model.state_dict().items()
    }


def infer_config(values: Mapping[str, Tensor], source: str) -> SegCLIPConfig:
    """The architecture of a release checkpoint from its shapes, with heads 64 wide as in the release.

    Raises:
        ValueError: it lacks the tensors that tell.
    """
    prefix = "clip.visual.transformer."

    def depth(stem: str) -> int:
        found = re.compile(re.escape(stem) + r"\.(\d+)\.")
        return max((int(m.group(1)) + 1 for m in map(found.match, values) if m), default=0)

    try:
        width, _, _, patch = values["clip.visual.conv1.weight"].shape
        grid = round((values["clip.visual.positional_embedding"].shape[0] - 1) ** 0.5)
        centers = values[prefix + "semantic_layer2.semantic_center"].shape[0]
        group_width = values[prefix + "semantic_layer2.k_conv.weight"].shape[1]
        vocab, text_width = values["clip.token_embedding.weight"].shape
        context = values["clip.positional_embedding"].shape[0]
        embed = values["clip.text_projection"].shape[1]
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(
            f"checkpoint: expected the release's 415 tensors, got {source} "
            f"with {len(values)} tensors such as {sorted(values)[:3]} and without {error}"
        ) from error
    first, third = depth(prefix + "layers0"), depth(prefix + "layers2")
    decoder = values.get("vis_mae_decoder.decoder_embed.weight")
    return SegCLIPConfig(
        embed_dim=embed,
        vision=VisionConfig(
            grid * patch, patch, width, first + third, width // group_width, group_after=first
        ),
        grouping=GroupingConfig(centers, depth(prefix + "semantic_layer2.cross_att")),
        text=TextConfig(vocab, context, text_width, depth("clip.transformer.resblocks"), text_width // 64),
        reconstruction=ReconstructionConfig(
            enabled=decoder is not None,
            decoder_width=384 if decoder is None else decoder.shape[0],
            decoder_layers=depth("vis_mae_decoder.decoder_blocks"),
        ),
    )


def export(model: SegCLIP, path: Path, *, overwrite: bool = False) -> None:
    """Write `model` as a torch file in the release's layout.

    Raises:
        FileExistsError: `path` exists and `overwrite` is False.
    """
    if path.exists() and not overwrite:
        raise FileExistsError(f"path: expected no file at {path}; pass overwrite=True to replace it")
    path.parent.mkdir(parents=True, exist_ok=True)
    values = to_authors(model)
    write_whole(path, lambda temporary: torch.save(values, temporary))
