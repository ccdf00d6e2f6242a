"""Initial values: CLIP's own for the towers, the release's for everything it adds."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

from .layers import Attention, Block

if TYPE_CHECKING:
    from .segclip import SegCLIP


@torch.no_grad()
def initialise(model: SegCLIP) -> None:
    """Fill all parameters in place from torch's global generator."""
    _vision(model)
    _text(model)
    new_parts(model)


@torch.no_grad()
def new_parts(model: SegCLIP) -> None:
    """Initialise what CLIP does not bring: grouping module, reconstruction branch, decoder.

    Linear weights N(0, 0.02), biases 0, norms 1 and 0, the attention input projections of width-D blocks
    Xavier-uniform, grouped projections uniform within 1/sqrt(fan in), centers and mask token N(0, 0.02).
    """
    grouping = model.vision.grouping
    parts: list[nn.Module] = [grouping]
    if model.reconstruction is not None:
        parts.append(model.reconstruction)
        nn.init.normal_(model.reconstruction.mask_token, std=0.02)
    for part in parts:
        for module in part.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
    for block in (*grouping.blocks, *(model.reconstruction.blocks if model.reconstruction else ())):
        assert isinstance(block.attention, Attention)
        nn.init.xavier_uniform_(block.attention.qkv.weight)
    nn.init.normal_(grouping.centers, std=0.02)
    bound = 1 / math.sqrt(grouping.key_weight.shape[1])
    nn.init.uniform_(grouping.key_weight, -bound, bound)
    nn.init.uniform_(grouping.value_weight, -bound, bound)


def _vision(model: SegCLIP) -> None:
    vision = model.vision
    scale = vision.config.width**-0.5
    for table in (vision.class_embedding, vision.position_embedding, vision.projection):
        nn.init.normal_(table, std=scale)
    for stage in (vision.first_stage, vision.third_stage):
        for block in stage:
            assert isinstance(block, Block)
            _attention(block.attention)


def _attention(attention: Attention) -> None:
    nn.init.xavier_uniform_(attention.qkv.weight)
    nn.init.zeros_(attention.qkv.bias)
    nn.init.zeros_(attention.proj.bias)


def _text(model: SegCLIP) -> None:
    text = model.text
    width, layers = text.config.width, max(text.config.layers, 1)
    nn.init.normal_(text.token_embedding.weight, std=0.02)
    nn.init.normal_(text.position_embedding, std=0.01)
    nn.init.normal_(text.projection, std=width**-0.5)
    for block in text.blocks:
        assert isinstance(block, Block)
        _attention(block.attention)
        nn.init.normal_(block.attention.qkv.weight, std=width**-0.5)
        nn.init.normal_(block.attention.proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)
        nn.init.normal_(block.mlp.fc1.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(block.mlp.fc2.weight, std=width**-0.5 * (2 * layers) ** -0.5)
