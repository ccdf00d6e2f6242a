"""group_assign: equal to its twin in value and in every gradient, straight-through and through the count."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_close

from segclip_fast.ops import group_assign, group_assign_ref
from segclip_fast.ops._dispatch import force

NAMES = ("centers", "patches", "key_weight", "key_gain", "key_bias", "value_weight")
CASES = [  # B, L, N, D, groups, noise, tau
    (2, 8, 49, 48, 12, True, 0.9),
    (2, 8, 49, 48, 12, False, 1.0),
    (1, 1, 5, 8, 2, True, 0.9),
    (3, 64, 7, 12, 3, True, 0.5),
    (2, 3, 1, 6, 1, True, 2.0),
]


def inputs(B, L, N, D, groups, noise, dtype=torch.float64):
    shapes = [(B, L, D), (B, N, D), (D, D // groups), (D,), (D,), (D, D // groups)]
    tensors = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    gumbel = -torch.empty(B, L, N, dtype=dtype).exponential_().log() if noise else None
    return tensors, gumbel


def run(function, tensors, noise, tau, upstream):
    found = function(*tensors, noise=noise, tau=tau)
    outputs = (found.pooled, found.logits, found.hard)
    return outputs, torch.autograd.grad(outputs, tensors, upstream)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_equals_twin(case, dtype, tolerance):
    B, L, N, D, groups, noise, tau = case
    tensors, gumbel = inputs(B, L, N, D, groups, noise, dtype)
    shapes = [(B, L, D), (B, L, N), (B, L, N)]
    upstream = [torch.randn(shape, dtype=dtype) for shape in shapes]
    outputs, grads = run(group_assign, tensors, gumbel, tau, upstream)
    expected, expected_grads = run(group_assign_ref, tensors, gumbel, tau, upstream)
    for name, actual, twin in zip(("pooled", "logits", "hard"), outputs, expected, strict=True):
        assert_close(name, actual, twin, tolerance)
    for name, actual, twin in zip(NAMES, grads, expected_grads, strict=True):
        if L == 1 and name in ("centers", "key_gain") and not twin.any():
            continue
        assert_close(f"d {name}", actual, twin, tolerance * 10)


@pytest.mark.parametrize("only", [0, 1, 2], ids=("pooled", "logits", "hard"))
def test_gradient_of_each_output_alone(only):
    tensors, gumbel = inputs(2, 4, 9, 12, 3, True)
    results = []
    for function in (group_assign, group_assign_ref):
        found = function(*tensors, noise=gumbel, tau=0.9)
        out = (found.pooled, found.logits, found.hard)[only]
        results.append(torch.autograd.grad(out.square().sum(), tensors, allow_unused=True))
    for name, actual, expected in zip(NAMES, *results, strict=True):
        if expected is None:
            assert actual is None or not actual.any(), name
        elif expected.abs().max() > 1e-12:
            assert_close(f"d {name}", actual, expected, 1e-10)


def test_assignment_is_one_hot_and_the_mean_of_values():
    tensors, gumbel = inputs(2, 4, 30, 12, 3, True)
    found = group_assign(*tensors, noise=gumbel, tau=0.9)
    assert torch.equal(found.hard.round().sum(dim=1), torch.ones(2, 30, dtype=torch.float64))
    assert torch.equal((found.logits + gumbel).argmax(dim=1), found.hard.argmax(dim=1))


def test_empty_center_pools_to_zero():
    tensors, _ = inputs(1, 8, 2, 12, 3, False)
    found = group_assign(*tensors)
    empty = found.hard.round().sum(dim=-1) == 0
    assert empty.any()
    assert (found.pooled[empty].abs() < 1e-12).all()


def test_gradcheck_of_the_scores():
    tensors, gumbel = inputs(1, 3, 5, 8, 2, True)
    for function in (group_assign, group_assign_ref):
        torch.autograd.gradcheck(lambda *x, f=function: f(*x, noise=gumbel, tau=0.9).logits, tensors)


def test_gradcheck_of_the_straight_through_surrogate():
    """One-hot - soft at the point + soft: smooth, with the value and by definition the gradient of `hard`."""
    tensors, gumbel = inputs(1, 2, 9, 8, 2, True)
    tensors[0].data /= 10  # scores below the noise: no center is left with one patch
    at = group_assign_ref(*tensors, noise=gumbel, tau=0.9)
    assert (at.hard.sum(dim=-1) > 1.5).all()  # off the clamp's kink
    offset = (at.hard - ((at.logits + gumbel) / 0.9).softmax(dim=1)).detach()

    def surrogate(*x):
        centers, patches, key_weight, gain, bias, value_weight = x
        logits = group_assign_ref(centers, patches, key_weight, gain, bias, value_weight).logits
        hard = offset + ((logits + gumbel) / 0.9).softmax(dim=1)
        values = torch.nn.functional.conv1d(patches.mT, value_weight[:, :, None], groups=2).mT
        return hard @ values / hard.sum(dim=-1, keepdim=True)

    assert torch.autograd.gradcheck(surrogate, tensors)
    upstream = torch.randn_like(at.pooled)
    expected = torch.autograd.grad(surrogate(*tensors), tensors, upstream)
    for function in (group_assign, group_assign_ref):
        found = torch.autograd.grad(function(*tensors, noise=gumbel, tau=0.9).pooled, tensors, upstream)
        for name, actual, twin in zip(NAMES, found, expected, strict=True):
            assert_close(f"d {name}", actual, twin, 1e-10)


@pytest.mark.parametrize("backend", ["fused", "triton"])
@pytest.mark.parametrize("noise", ["given", "seed", "none"])
def test_opcheck_and_compile(backend, noise):
    tensors, gumbel = inputs(2, 4, 9, 12, 3, True, torch.float32)
    gumbel = {"given": gumbel, "seed": torch.tensor([3, 4]), "none": None}[noise]
    torch.library.opcheck(torch.ops.segclip_fast.group_assign, (*tensors, gumbel, 0.9, backend == "triton"))
    compiled = torch.compile(
        lambda *x: group_assign(*x, noise=gumbel, tau=0.9).pooled, fullgraph=True, backend="aot_eager"
    )
    expected = torch.autograd.grad(group_assign(*tensors, noise=gumbel, tau=0.9).pooled.sum(), tensors)
    with force(backend):
        actual = torch.autograd.grad(compiled(*tensors).sum(), tensors)
    for name, a, b in zip(NAMES, actual, expected, strict=True):
        assert_close(name, a, b, 1e-5)


def test_switch_and_refusal(monkeypatch):
    tensors, _ = inputs(1, 2, 3, 4, 2, False)
    with force("reference"):
        forced = group_assign(*tensors)
    assert "Backward0" in forced.pooled.grad_fn.name()
    monkeypatch.setenv("SEGCLIP_FAST_BACKEND", "triton")
    with pytest.raises(RuntimeError, match=r"no backend for inputs .*triton: takes fp32, fp16 and bf16, got"):
        group_assign(*tensors)
    monkeypatch.setenv("SEGCLIP_FAST_BACKEND", "best")
    with pytest.raises(ValueError, match="SEGCLIP_FAST_BACKEND: expected one of"):
        group_assign(*tensors)
    monkeypatch.delenv("SEGCLIP_FAST_BACKEND")
    meta = [tensor.detach().to("meta") for tensor in tensors]
    with force("triton"), pytest.raises(RuntimeError, match="runs on cuda, inputs are on meta"):
        group_assign(*meta)


@pytest.mark.parametrize(
    ("position", "shape", "message"),
    [
        (0, (2, 4, 9), "centers: expected"),
        (1, (2, 12), "patches: expected"),
        (2, (12, 5), "key_weight: expected"),
        (3, (11,), "key_gain: expected"),
        (4, (1, 12), "key_bias: expected"),
        (5, (10, 4), "value_weight: expected"),
    ],
)
def test_bad_shapes(position, shape, message):
    tensors, _ = inputs(2, 4, 9, 12, 3, False)
    tensors[position] = torch.zeros(shape)
    with pytest.raises(ValueError, match=message):
        group_assign(*tensors)


def test_bad_noise_and_temperature():
    tensors, gumbel = inputs(2, 4, 9, 12, 3, True)
    with pytest.raises(ValueError, match=r"noise: expected \(2, 4, 9\)"):
        group_assign(*tensors, noise=gumbel[:1])
    with pytest.raises(ValueError, match=r"noise: expected .* a \(2,\) int64 seed, got \(3,\)"):
        group_assign(*tensors, noise=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="tau: expected a positive"):
        group_assign(*tensors, noise=gumbel, tau=0.0)
