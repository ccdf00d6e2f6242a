"""Masked loads shared by the kernels.

Shapes: R rows, C columns of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile(pointer, rows, columns, row_mask, column_mask, stride):
    """(R, C) of a row-major matrix whose rows are `stride` apart; 0 outside the masks."""
    offsets = rows[:, None] * stride + columns[None, :]
    return tl.load(pointer + offsets, mask=row_mask[:, None] & column_mask[None, :], other=0.0)


@triton.jit
def vector(pointer, columns, mask):
    """(C,) in float32, 0 outside the mask."""
    return tl.load(pointer + columns, mask=mask, other=0.0).to(tl.float32)
