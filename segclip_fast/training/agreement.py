"""Things that all processes must do alike: fail together, know the same, write once.

Everything here works without a process group as well, where there is one process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .distributed import Place, communication, own_rank, world

T = TypeVar("T")
E = TypeVar("E", bound=BaseException)

_KINDS: tuple[type[Exception], ...] = (
    ValueError,
    FileNotFoundError,
    FileExistsError,
    OSError,
    FloatingPointError,
    ImportError,
    NotImplementedError,
)


def gather_objects(value: T) -> list[T]:
    """The values of all ranks, in their order, on every rank."""
    if world() == 1:
        return [value]
    found: list[Any] = [None] * world()
    with communication.running():
        dist.all_gather_object(found, value)
    return found


def everywhere(error: E) -> E:
    """The error, marked as one that every rank raises alike: the first process need only print it."""
    error.on_every_rank = True  # type: ignore[attr-defined]
    return error


def agreed(action: Callable[[], T]) -> T:
    """Run `action` on every rank and return the own result; if it fails on one, all raise the first error."""
    result: T | None = None
    error: Exception | None = None
    try:
        result = action()
    except Exception as caught:
        error = caught
    first = next((found for found in gather_objects(_portable(error)) if found is not None), None)
    if first is None:
        return result  # type: ignore[return-value]
    raise everywhere(error or first)


def on_first(action: Callable[[], T]) -> T:
    """Run `action` on rank 0 only; every rank returns its result, or raises its error."""
    if world() == 1:
        return action()
    result = agreed(lambda: action() if own_rank() == 0 else None)
    return gather_objects(result)[0]  # type: ignore[return-value]


def in_turn(place: Place, action: Callable[[], T]) -> T:
    """Run `action` on the first process of each machine, then on the others, which find its files there."""
    first = agreed(lambda: action() if place.local_rank == 0 else None)
    others = agreed(lambda: action() if place.local_rank != 0 else None)
    return first if place.local_rank == 0 else others  # type: ignore[return-value]


def share_tensors(values: dict[str, Tensor] | None, device: torch.device) -> dict[str, Tensor]:
    """The tensors of rank 0 by name, in host memory, on every rank; they travel through `device`."""
    if world() == 1:
        assert values is not None
        return values
    kinds = None
    if values is not None:
        kinds = [(name, tuple(value.shape), value.dtype) for name, value in values.items()]
    known = gather_objects(kinds)[0]
    assert known is not None
    shared = {}
    for name, shape, dtype in known:
        value = torch.empty(shape, dtype=dtype, device=device) if values is None else values[name].to(device)
        dist.broadcast(value, 0)
        shared[name] = value.cpu()
    return shared


def _portable(error: Exception | None) -> Exception | None:
    """The error, as far as it can travel: with its type and text alone, no traceback or cause."""
    if error is None:
        return None
    kind = next((kind for kind in _KINDS if isinstance(error, kind)), RuntimeError)
    return kind(str(error))
