"""The one form of an unusable setting's error."""

from __future__ import annotations


def require(condition: bool, argument: str, expected: str, got: object) -> None:
    """Raise ValueError "argument: expected ..., got ..." unless `condition` holds."""
    if not condition:
        raise ValueError(f"{argument}: expected {expected}, got {got!r}")
