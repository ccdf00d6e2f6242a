"""Counted, not timed: multiplications and additions of products, and bytes that eager operations move."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import segclip_fast.ops  # noqa: F401, defines the operations named below

Size = Sequence[int]
aten = torch.ops.aten

# --- what PyTorch's counter does not know; a formula gets the shapes of the op's arguments by name


def _group_assign(centers: Size, patches: Size, key_weight: Size, **_: Any) -> int:
    """Keys projected, scores, sums over each center's patches, value projection of the L mean rows."""
    (B, L, D), N, W = centers, patches[1], key_weight[1]
    projection, product, rows = 2 * B * N * D * W, 2 * B * L * N * D, 2 * B * L * D * W
    return projection + 2 * product + rows


def _group_assign_backward(operands: Sequence[Size], **_: Any) -> int:
    """The value projection's two gradients, the assignment's, keys projected again, centers' and keys'
    gradients, the key projection's two, and the patches' share in the sums.
    """
    (B, L, D), (_, N, _), (_, W) = operands[:3]  # centers, patches, key_weight
    projection, product, rows = 2 * B * N * D * W, 2 * B * L * N * D, 2 * B * L * D * W
    return 2 * rows + product + projection + 2 * product + 2 * projection + product


def _superpixel_kl(assignment: Size, **_: Any) -> int:
    """Two segment sums, of softmax and assignment, for loss and gradient together."""
    B, N, L = assignment
    return 2 * B * N * L


def _onednn(X: Size, W: Size, **_: Any) -> int:
    """X (M, I) by W (O, I)."""
    return 2 * X[0] * X[1] * W[0]


def _sdpa(query: Size, key: Size, value: Size, **_: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _sdpa_backward(grad_out: Size, query: Size, key: Size, value: Size, **_: Any) -> int:
    """Five products: the scores are computed again instead of being kept."""
    return sdpa_backward_flop_count(grad_out, query, key, value)


FORMULAS: dict[str, Callable[..., int]] = {
    "aten::_scaled_dot_product_flash_attention_for_cpu": _sdpa,
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": _sdpa_backward,
    "mkldnn::_linear_pointwise": _onednn,  # `ops.linear` on the CPU
    "segclip_fast::gumbel": lambda **_: 0,  # no products
    "segclip_fast::group_assign": _group_assign,
    "segclip_fast::group_assign_backward": _group_assign_backward,
    "segclip_fast::superpixel_kl": _superpixel_kl,
}


def _registrations() -> dict[Any, Callable[..., int]]:
    """The formulas in the form that PyTorch's counter takes."""
    found: dict[Any, Callable[..., int]] = {}
    for qualified, formula in FORMULAS.items():
        namespace, name = qualified.split("::")
        operation = getattr(getattr(torch.ops, namespace), name)
        names = [argument.name for argument in operation.default._schema.arguments]

        def by_name(*shapes: Any, out_shape: Any = None, names=names, formula=formula, **named: Any) -> int:
            return formula(**dict(zip(names, shapes, strict=False)), **named)

        found[operation] = by_name
    return found


class UncountedError(LookupError):
    """One of the package's own operations has no formula: its work would silently count as none."""


@contextmanager
def counted() -> Iterator[FlopCounterMode]:
    """Count multiplications and additions inside; `.get_total_flops()` and `.get_flop_counts()` have them.

    Raises:
        UncountedError: an operation of the package ran that has no formula here.
    """
    with _Names() as names, FlopCounterMode(display=False, custom_mapping=_registrations()) as counter:
        yield counter
    unknown = sorted(names.seen - FORMULAS.keys())
    if unknown:
        raise UncountedError(f"{', '.join(unknown)}: no formula in benchmarks/harness/counts.py")


class _Names(TorchDispatchMode):
    """Remembers which operations of the package ran."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "segclip_fast":
            self.seen.add(func._overloadpacket._qualified_op_name)
        return func(*args, **(kwargs or {}))


# --- bytes moved


def moved_bytes(call: Callable[[], object]) -> int:
    """Bytes that an eager call reads and writes: each operation reads its inputs and writes its outputs.

    Views and allocations move nothing. An operation of the package counts as one, whatever happens inside.
    """
    with _Moved() as moved:
        call()
    return moved.bytes


class _Moved(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        returns = func._schema.returns
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if view or func._overloadpacket in _ALLOCATIONS:
            return out
        self.bytes += sum(map(_size, tree_leaves((args, kwargs)))) + sum(map(_size, tree_leaves(out)))
        return out


_ALLOCATIONS = {
    aten.empty,
    aten.empty_like,
    aten.empty_strided,
    aten.new_empty,
    aten.new_empty_strided,
    aten.detach,
    aten._unsafe_view,
}


def _size(x: Any) -> int:
    """Bytes of a tensor; what `expand` repeats is in memory once."""
    if not isinstance(x, Tensor):
        return 0
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())
