"""What kernel launchers share: refusals speak, block sizes, uninitialised memory."""

from __future__ import annotations

import pytest
import torch
from segclip_fast.kernels import runtime


@pytest.mark.parametrize(
    ("n", "least", "expected"), [(1, 1, 1), (5, 1, 8), (8, 1, 8), (9, 16, 16), (17, 16, 32)]
)
def test_power_of_two(n, least, expected):
    assert runtime.power_of_two(n, least) == expected


def test_refusals(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert runtime.unavailable([torch.zeros(1)]) is None
    assert runtime.unavailable([torch.zeros(1), torch.zeros(1, dtype=torch.int64)]) is None
    assert "got torch.float64" in runtime.unavailable([torch.zeros(1), torch.zeros(1).double()])
    assert "inputs are on meta" in runtime.unavailable([torch.zeros(1, device="meta")])
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "TRITON_INTERPRET is not 1" in runtime.unavailable([torch.zeros(1)])
    monkeypatch.setattr(runtime, "_TRITON", False)
    assert runtime.unavailable([torch.zeros(1)]) == "triton is not installed"


def test_old_devices_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "T4")
    assert "8.0 or later, T4 has (7, 5)" in runtime._missing("cuda", 0)


def test_poison_reaches_the_launchers(poisoned):
    assert torch.isnan(runtime.empty((2, 3), torch.float32, torch.device("cpu"))).all()
