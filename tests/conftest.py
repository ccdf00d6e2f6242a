"""Shared by all tests: strict comparison, seeded tensors, threads."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is imported: Triton reads it when it decorates


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _device(request):
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture
def poisoned(monkeypatch):
    """Results and scratch of every kernel start as NaN, so that whatever is left unwritten shows."""
    from segclip_fast.kernels import runtime

    def poison(shape, dtype, device):
        value = float("nan") if dtype.is_floating_point else -(2**30)
        return torch.full(tuple(shape), value, dtype=dtype, device=device)

    monkeypatch.setattr(runtime, "empty", poison)


@pytest.fixture(scope="session")
def stamp_root() -> Path:
    """The unpacked Tux Paint stamps; skips where there are none."""
    unpacked = Path(__file__).parents[1] / ".stamps"
    places = [os.environ.get("SEGCLIP_STAMPS", ""), unpacked / "usr/share/tuxpaint/stamps"]
    for place in [*filter(None, places), "/usr/share/tuxpaint/stamps"]:
        if Path(place).is_dir():
            return Path(place)
    pytest.skip("no Tux Paint stamps: run `make stamps` or set SEGCLIP_STAMPS to their folder")


def relative_rms(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Root-mean-square error over the root-mean-square of what is expected."""
    error = (actual.detach().double() - expected.detach().double()).square().mean().sqrt()
    return float(error / expected.detach().double().square().mean().sqrt().clamp(min=1e-30))


def assert_close(name: str, actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Fail with the tensor's name unless both are finite and agree in shape and relative RMS."""
    assert actual.shape == expected.shape, f"{name}: {tuple(actual.shape)} against {tuple(expected.shape)}"
    assert torch.isfinite(actual).all(), f"{name}: not finite"
    error = relative_rms(actual, expected)
    assert error <= tolerance, f"{name}: relative RMS {error:.3e} above {tolerance:.0e}"
