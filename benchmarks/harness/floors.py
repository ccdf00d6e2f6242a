"""The floor of each op: bytes that must cross the memory bus and operations that must be done.

Bytes: a call reads each of its inputs once and writes each of its outputs once. Forward and backward are two
calls with the rest of the network in between, so the backward call reads its inputs again. Operations: what
the best algebra known here needs; an addition, multiplication, division, exponential or logarithm counts one.

Shapes as in the ops: B batch, N patches, L centers, D width, W = D / groups, T queries, S keys, H heads, d
head width; a linear layer takes M rows from I to O channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

Shape = Mapping[str, int]
INDEX = 8  # bytes of an int64 label


@dataclass(frozen=True)
class Floor:
    """What no implementation can go below.

    Attributes:
        bytes: to and from memory.
        operations: arithmetic.
    """

    bytes: int
    operations: int

    def __add__(self, other: Floor) -> Floor:
        return Floor(self.bytes + other.bytes, self.operations + other.operations)


def attention(shape: Shape, size: int, backward: bool) -> Floor:
    """Two products forward (scores, weighted sum), four backward; under the causal mask half of each."""
    B, T, S, H, d = (shape[name] for name in "BTSHd")
    pairs = B * H * (T * (T + 1) // 2 if shape.get("causal") else T * S)
    return _attention(B * T * H * d, B * S * H * d, pairs, d, size, backward)


def attention_packed(shape: Shape, size: int, backward: bool) -> Floor:
    """As `attention`; `total` tokens, `pairs` of a query and a key that it sees."""
    total, pairs, H, d = (shape[name] for name in ("total", "pairs", "H", "d"))
    return _attention(total * H * d, total * H * d, pairs * H, d, size, backward)


def _attention(queries: int, keys: int, pairs: int, d: int, size: int, backward: bool) -> Floor:
    product = 2 * pairs * d
    forward = Floor((2 * queries + 2 * keys) * size, 2 * product + 4 * pairs)
    if not backward:
        return forward
    # Reads q, k, v and the output's gradient, writes three gradients.
    return forward + Floor((3 * queries + 4 * keys) * size, 4 * product + 4 * pairs)


def group_assign(shape: Shape, size: int, backward: bool) -> Floor:
    """Keys must be projected for their variance; values are averaged first, so only L rows are projected.

    `size` is that of the patches, the one large operand; everything else is float32.
    """
    B, N, L, D, W = (shape[name] for name in "BNLDW")
    rows, patches, scores = B * L * D, B * N * D, B * L * N
    weights = 2 * D * W + 2 * D  # two projections, gain and bias
    projection, product = 2 * patches * W, 2 * scores * D
    forward = Floor(
        # reads centers, patches, noise, weights; writes pooled, logits, hard
        patches * size + (2 * rows + 3 * scores + weights) * 4,
        # projection and its moments, scores, softmax, a sum over each center's patches, value projection
        projection + 3 * patches + product + 5 * scores + patches + 2 * rows * W,
    )
    if not backward:
        return forward
    return forward + Floor(
        # reads three gradients, centers, patches, noise (it gives soft), weights; writes four gradients
        2 * patches * size + (3 * rows + 3 * scores + 2 * weights) * 4,
        # value projection, gradients of scores, centers and keys, key norm, projection, patches' sums
        4 * rows * W + 3 * product + 8 * patches + 5 * scores + 2 * projection + patches,
    )


def superpixel_kl(shape: Shape, size: int, backward: bool) -> Floor:
    """Softmax, two segment means, the product of their gaps for every entry; no logarithm."""
    B, N, L = (shape[name] for name in "BNL")
    entries = B * N * L
    forward = Floor(entries * size + B * N * INDEX, 9 * entries)
    if not backward:
        return forward
    # Reads the assignment and the labels again, writes the gradient.
    return forward + Floor(2 * entries * size + B * N * INDEX, 12 * entries)


def linear(shape: Shape, size: int, backward: bool) -> Floor:
    """One product forward, two backward."""
    M, I, O = (shape[name] for name in "MIO")  # noqa: E741
    operands, product = M * I + I * O + O + M * O, 2 * M * I * O
    forward = Floor(operands * size, product)
    # Reads x, weight and the output's gradient, writes three gradients.
    return forward + Floor((2 * operands - M * O) * size, 2 * product) if backward else forward


FLOORS: dict[str, Callable[[Shape, int, bool], Floor]] = {
    "attention": attention,
    "attention_packed": attention_packed,
    "group_assign": group_assign,
    "linear": linear,
    "superpixel_kl": superpixel_kl,
}
