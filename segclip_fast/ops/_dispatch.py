"""Which implementation serves a call, and why the others refused.

Each op keeps a table of `Backend`s in order of preference. One switch, the environment variable
SEGCLIP_FAST_BACKEND = auto | reference | fused | triton, or `force(...)` for a block of code; `auto` takes
the first backend that accepts the inputs and logs its choice once.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SWITCH = "SEGCLIP_FAST_BACKEND"
CHOICES = ("auto", "reference", "fused", "triton")
_log = logging.getLogger("segclip_fast")
_announced: set[tuple[str, str, str]] = set()
_forced: list[str] = []


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    Attributes:
        name: reference, fused or triton.
        run: the implementation; all backends of an op share one signature.
        refuse: takes the op's tensors, returns why this backend cannot serve them, or None if it can.
    """

    name: str
    run: Callable[..., Any]
    refuse: Callable[[Sequence[Tensor]], str | None]


def accept(_: Sequence[Tensor]) -> str | None:
    """The `refuse` of a backend that serves every input."""
    return None


def refuse_triton(tensors: Sequence[Tensor]) -> str | None:
    """Why no Triton kernel takes `tensors` here, or None; what one kernel cannot do is for it to say."""
    from ..kernels import runtime

    reason = runtime.unavailable(tensors)
    if reason is None and not tensors[0].is_cuda and requested() != "triton":
        return "on the CPU it is interpreted, far slower than fused: only by request"
    return reason


def requested() -> str:
    """The backend asked for: the innermost `force`, else the environment switch, else auto."""
    choice = _forced[-1] if _forced else os.environ.get(SWITCH, "auto")
    if choice not in CHOICES:
        raise ValueError(f"{SWITCH}: expected one of {CHOICES}, got {choice!r}")
    return choice


def known(name: str) -> str:
    """`name`, if it is a backend.

    Raises:
        ValueError: it is none.
    """
    if name not in CHOICES:
        raise ValueError(f"backend: expected one of {CHOICES}, got {name!r}")
    return name


def literal() -> bool:
    """Whether the paper's formulas are to be computed as they stand, without the algebra that saves work."""
    return requested() == "reference"


def served_by(name: str) -> contextlib.AbstractContextManager[None]:
    """`force(name)`, where "auto" leaves the choice to what is in force outside."""
    return contextlib.nullcontext() if name == "auto" else force(name)


@contextlib.contextmanager
def force(name: str) -> Iterator[None]:
    """Serve every op inside the block by the backend `name` (auto, reference, fused or triton)."""
    _forced.append(known(name))
    try:
        yield
    finally:
        _forced.pop()


def select(op: str, backends: Sequence[Backend], tensors: Sequence[Tensor]) -> Backend:
    """The backend that serves `tensors`.

    Raises:
        RuntimeError: no (or not the requested) backend takes them; lists shapes, dtypes and every reason.
    """
    wanted = requested()
    if wanted == "triton" and not any(backend.name == wanted for backend in backends):
        wanted = "fused"  # this op has no Triton kernel of ours
    reasons = []
    for backend in backends:
        if wanted not in ("auto", backend.name):
            continue
        reason = backend.refuse(tensors)
        if reason is None:
            _announce(op, backend.name, tensors)
            return backend
        reasons.append(f"{backend.name}: {reason}")
    if not reasons:
        reasons.append(f"{wanted}: {op} has only {[backend.name for backend in backends]}")
    inputs = ", ".join(f"{tuple(t.shape)} {t.dtype} on {t.device}" for t in tensors)
    raise RuntimeError(f"{op}: no backend for inputs {inputs} ({SWITCH}={wanted}); " + "; ".join(reasons))


def _announce(op: str, name: str, tensors: Sequence[Tensor]) -> None:
    key = (op, name, tensors[0].device.type)
    # A log call in a traced function would break its graph.
    if key not in _announced and not torch.compiler.is_compiling():
        _announced.add(key)
        _log.info("%s runs on backend %s (%s)", op, name, key[2])
