"""Counter-based Gumbel noise inside a kernel: the same numbers as `segclip_fast.ops.gumbel` in PyTorch.

Shapes: R rows, C columns.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gumbel_tile(key, call, rows, QUADS: tl.constexpr, WIDTH: tl.constexpr):
    """Gumbel(0, 1) noise of a tile, float32.

    The noise of column c in row r is word c % 4 of the Philox4x32-10 block with counter
    (r QUADS + c // 4, call, 0, 0).

    Args:
        key: scalar int64, the generator's key.
        call: scalar int64, of which 32 bits count.
        rows: (R,) int32 row numbers, over the whole tensor.
        QUADS: blocks of four words a row uses, ceil(C / 4).
        WIDTH: columns of the tile, a power of two of at least 4; those from C on are noise nobody reads.

    Returns:
        (R, WIDTH) float32.
    """
    quads = tl.arange(0, WIDTH // 4)
    counter = (rows[:, None] * QUADS + quads[None, :]).to(tl.uint32)  # (R, WIDTH / 4)
    zero = tl.zeros_like(counter)
    second = zero + (call & 0xFFFFFFFF).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(key, counter, second, zero, zero)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # (R, WIDTH / 4, 2, 2), word 2 i + j at (i, j)
    words = tl.reshape(words, (rows.shape[0], WIDTH))
    # 23 bits and a half: never 0 and never 1, both exact in float32.
    uniform = ((words >> 9).to(tl.float32) + 0.5) * (1.0 / 8388608.0)
    return -tl.log(-tl.log(uniform))
