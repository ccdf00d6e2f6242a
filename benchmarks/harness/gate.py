"""What must hold before anything is timed: a rival computes what the twin computes, gradients included."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

# Allowed relative RMS error. A rival may also be off by twice the twin's own error at that precision: what
# the twin itself loses by rounding is no fault of its rival.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
OWN_ERRORS = 2.0
CAP = 0.5  # whatever the twin's own error: half wrong is wrong
SMALL = 1e-3  # gradients are measured against at least this share of the RMS of all gradients together


@contextmanager
def full_precision() -> Iterator[None]:
    """float32 in full, where PyTorch would round the inputs of CUDA convolutions (TF32, on by default)."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


class GateError(AssertionError):
    """A rival computes something else than the twin."""


@dataclass(frozen=True)
class Gate:
    """How far a rival is from the twin.

    Attributes:
        error: the worst relative RMS error of all compared tensors.
        worst: the name of that tensor.
        allowed: what was allowed for it.
        flips: assignments that differ from the twin's (of patches to centers, or of pixels to labels).
        compared: number of tensors.
    """

    error: float
    worst: str
    allowed: float
    flips: int
    compared: int


def errors(actual: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, float]:
    """Relative RMS error by name; names that start with "d " are gradients, integers are left out.

    A gradient that is zero but for rounding has no scale of its own: its error is taken relative to at least
    `SMALL` of the RMS of all gradients.

    Raises:
        GateError: different names or shapes, or something is not finite.
    """
    if actual.keys() != exact.keys():
        raise GateError(f"expected {sorted(exact)}, got {sorted(actual)}")
    gradients = [value for name, value in exact.items() if name.startswith("d ")]
    elements = sum(value.numel() for value in gradients)
    least = SMALL * (sum(float(_squares(g)) for g in gradients) / max(elements, 1)) ** 0.5
    found = {}
    for name, expected in exact.items():
        value = actual[name]
        if value.shape != expected.shape:
            raise GateError(f"{name}: expected {tuple(expected.shape)}, got {tuple(value.shape)}")
        if not expected.is_floating_point():
            continue
        if not bool(torch.isfinite(value).all()):
            raise GateError(f"{name}: not finite")
        difference = _squares(value.to(torch.float64) - expected.to(torch.float64)) / expected.numel()
        scale = (_squares(expected) / expected.numel()) ** 0.5
        floor = least if name.startswith("d ") else 0.0
        found[name] = float(difference**0.5 / scale.clamp(min=max(floor, 1e-30)))
    return found


def passes(
    actual: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    own: Mapping[str, float],
    tolerance: float,
    flips_allowed: int = 0,
    cap: float = CAP,
) -> Gate:
    """The gate of one rival.

    Args:
        actual: what the rival computed.
        exact: what the twin computes at higher precision.
        own: the twin's `errors` at the rival's precision.
        tolerance: allowed for every tensor at least.
        flips_allowed: integer tensors may differ in so many places.
        cap: the twin's own error excuses no more than this.

    Raises:
        GateError: with the worst tensor's name.
    """
    found = errors(actual, exact)
    allowed = {name: max(tolerance, min(cap, OWN_ERRORS * own.get(name, 0.0))) for name in found}
    flips = sum(
        int((actual[name] != expected).sum())
        for name, expected in exact.items()
        if not expected.is_floating_point()
    )
    worst = max(found, key=lambda name: found[name] / max(allowed[name], 1e-30), default=None)
    if worst is not None and not found[worst] <= allowed[worst]:
        raise GateError(f"{worst}: relative RMS {found[worst]:.2e}, allowed {allowed[worst]:.2e}")
    if flips > flips_allowed:
        raise GateError(f"{flips} assignments differ, allowed {flips_allowed}")
    if worst is None:
        return Gate(0.0, "none", 0.0, flips, len(exact))
    return Gate(found[worst], worst, allowed[worst], flips, len(exact))


def _squares(x: Tensor) -> Tensor:
    """Sum of squares in float64."""
    return torch.linalg.vector_norm(x.detach(), dtype=torch.float64) ** 2
