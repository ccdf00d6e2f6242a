"""linear: equal to its twin, forward and backward, on both branches, and which branch is taken."""

from __future__ import annotations

import sys

import pytest
import torch
from conftest import assert_close

from segclip_fast.ops import linear, linear_ref
from segclip_fast.ops._dispatch import force
from segclip_fast.ops.linear import LEAST, why_not_onednn

NAMES = ("out", "d x", "d weight", "d bias")
onednn = pytest.mark.skipif(
    why_not_onednn(torch.zeros(LEAST, 1), torch.zeros(1, 1)) is not None, reason="no oneDNN on this machine"
)


def inputs(*shape, O=48, bias=True, dtype=torch.float32):  # noqa: E741
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    weight = torch.randn(O, shape[-1], dtype=dtype, requires_grad=True)
    return [x, weight, *([torch.randn(O, dtype=dtype, requires_grad=True)] if bias else [])]


def results(function, tensors, upstream):
    out = function(*tensors)
    return [out, *torch.autograd.grad(out, tensors, upstream)]


@pytest.mark.parametrize("shape", [(700, 64), (5, 140, 64), (2, 3, 120, 64), (1, 64), (40000, 1)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "none"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.float64, 1e-14)], ids=str)
def test_equals_twin(shape, bias, dtype, tolerance):
    tensors = inputs(*shape, bias=bias, dtype=dtype)
    upstream = torch.randn(*shape[:-1], 48, dtype=dtype)
    expected = results(linear_ref, [t.detach().double().requires_grad_() for t in tensors], upstream.double())
    actual = results(linear, tensors, upstream)
    for name, a, e in zip(NAMES[: len(actual)], actual, expected, strict=True):
        assert_close(name, a, e.to(dtype), tolerance)


@onednn
def test_strided_inputs_and_gradients():
    base, weight, bias = inputs(64, 700)
    x = base.detach().t().requires_grad_()  # (700, 64), not contiguous
    weight = torch.randn(64, 48).t().requires_grad_()
    assert why_not_onednn(x, weight) is None
    upstream = torch.randn(48, 700).t()
    for name, a, e in zip(
        NAMES,
        results(linear, [x, weight, bias], upstream),
        results(linear_ref, [x, weight, bias], upstream),
        strict=True,
    ):
        assert_close(name, a, e, 1e-6)


@onednn
def test_frozen_operands_get_no_gradient():
    x, weight, bias = inputs(700, 64)
    for frozen in range(3):
        tensors = [t.detach().requires_grad_(i != frozen) for i, t in enumerate((x, weight, bias))]
        linear(*tensors).sum().backward()
        assert [t.grad is None for t in tensors] == [i == frozen for i in range(3)]


@onednn
def test_which_branch(monkeypatch):
    taken = []
    module = sys.modules["segclip_fast.ops.linear"]  # the package's attribute of this name is the function
    monkeypatch.setattr(module._OneDNN, "apply", lambda *x: taken.append(1) or linear_ref(*x))
    tensors = inputs(700, 64)
    linear(*tensors)
    assert len(taken) == 1
    with force("reference"):
        linear(*tensors)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(*tensors).dtype == torch.bfloat16
    linear(*inputs(3, 64))
    torch.compile(linear, fullgraph=True, backend="eager")(*tensors)
    assert len(taken) == 1


def test_reasons():
    x, weight = torch.zeros(LEAST, 1), torch.zeros(1, 1)
    assert "float64" in why_not_onednn(x.double(), weight.double())
    assert "at least" in why_not_onednn(x[:-1], weight)
    with torch.backends.mkldnn.flags(enabled=False):
        assert why_not_onednn(x, weight) is not None
    assert "on meta" in why_not_onednn(x.to("meta"), weight)
