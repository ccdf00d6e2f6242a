"""The Triton kernels of group_assign against the twin: under the interpreter on the CPU, compiled on CUDA."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_close, relative_rms

from segclip_fast.ops import group_assign, group_assign_ref
from segclip_fast.ops._dispatch import force
from segclip_fast.ops.gumbel import gumbel

NAMES = ("centers", "patches", "key_weight", "key_gain", "key_bias", "value_weight")
CASES = [  # B, N, L, D, group width
    (2, 1, 1, 64, 16),
    (1, 47, 6, 96, 24),
    (2, 48, 8, 768, 64),
    (2, 49, 8, 96, 32),
    (1, 196, 8, 768, 64),
    (1, 784, 10, 64, 64),
    (1, 49, 64, 64, 32),
    (7, 5, 3, 96, 96),
    (1, 33, 8, 128, 128),
]
pytestmark = pytest.mark.usefixtures("poisoned")


def inputs(B, N, L, D, W, dtype=torch.float32, device="cpu"):
    """Operands whose scores are about as large as the noise, so that assignments are not foregone."""
    centers = torch.randn(B, L, D) * 2 / D**0.5
    weights = [torch.randn(D, W) / W**0.5 for _ in range(2)]
    affine = [1 + 0.1 * torch.randn(D), 0.1 * torch.randn(D)]
    tensors = [centers, torch.randn(B, N, D) + 0.3, weights[0], *affine, weights[1]]
    halved = (1, 2, 5)  # as under autocast: patches and projections
    return [
        t.to(device, dtype if i in halved else torch.float32).requires_grad_() for i, t in enumerate(tensors)
    ]


def both(tensors, noise, tau):
    """Outputs and gradients of kernel and twin, by name; the twin runs in float64 from the same operands."""
    B, L, _ = tensors[0].shape
    shapes = [(B, L, tensors[0].shape[2]), *[(B, L, tensors[1].shape[1])] * 2]
    upstream = [torch.randn(shape, device=tensors[0].device) for shape in shapes]
    results = []
    for backend, operands in (("triton", tensors), ("reference", [t.detach().double() for t in tensors])):
        operands = [t.requires_grad_() for t in operands]
        with force(backend):
            found = group_assign(*operands, noise=noise, tau=tau)
            outputs = (found.pooled, found.logits, found.hard)
            grads = torch.autograd.grad(
                outputs, operands, [u.to(o.dtype) for u, o in zip(upstream, outputs, strict=True)]
            )
        named = dict(zip(("pooled", "logits", "hard"), outputs, strict=True))
        results.append(named | {f"d {n}": g for n, g in zip(NAMES, grads, strict=True)})
    return results


def compare(tensors, noise, tau, tolerance):
    actual, expected = both(tensors, noise, tau)
    for name, value in expected.items():
        if value.abs().max() < 1e-12:  # one center: its assignment is certain, no gradient
            assert actual[name].abs().max() < 1e-5, name
        else:
            assert_close(name, actual[name], value, tolerance)


@pytest.mark.parametrize("noise", ["given", "seed", "none"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_twin(case, noise):
    B, N, L, *_ = case
    seed = torch.tensor([2**40 + 7, 3])
    values = {"given": torch.randn(B, L, N), "seed": seed, "none": None}[noise]
    compare(inputs(*case), values, 1.0 if noise == "none" else 0.9, 2e-5)


def test_half_precision_patches():
    """The interpreter rounds operands, not products; its bfloat16 products are wrong, so float16 only."""
    tensors = inputs(2, 49, 8, 96, 32, torch.float16)
    actual, expected = both(tensors, torch.randn(2, 8, 49), 0.9)
    assert torch.equal(actual["hard"].argmax(dim=1), expected["hard"].argmax(dim=1))
    assert actual["d patches"].dtype == actual["d key_weight"].dtype == torch.float16
    assert actual["logits"].dtype == actual["pooled"].dtype == actual["d centers"].dtype == torch.float32
    for name, value in expected.items():
        assert relative_rms(actual[name], value) < 2e-3, name


def test_empty_centers_and_one_that_takes_all():
    tensors = inputs(2, 40, 8, 64, 16)
    bias = torch.zeros(2, 8, 40)
    bias[0, 2] = 1e4  # image 0: center 2 takes all
    bias[1, :5] = -1e4  # image 1: centers 0 to 4 are empty
    with force("triton"):
        found = group_assign(*tensors, noise=bias, tau=1.0)
    assert (found.hard[0, 2] == 1).all()
    assert not found.pooled[0, [0, 1, 3, 4, 5, 6, 7]].any()
    assert not found.pooled[1, :5].any()
    assert found.pooled[1, 5:].any()
    compare(tensors, bias, 1.0, 2e-5)


def test_ties_go_to_the_first():
    tensors = inputs(1, 20, 6, 64, 16)
    with torch.no_grad():
        tensors[0].zero_()  # every score is exactly 0
    for backend in ("triton", "fused", "reference"):
        with force(backend):
            found = group_assign(*tensors)
        assert torch.equal(found.hard[:, 0].round(), torch.ones(1, 20)), backend
        assert not found.hard[:, 1:].round().any(), backend


def test_offset_keys_lose_no_digits():
    """Keys far from zero: their spread must not drown in the square of their mean."""
    tensors = inputs(1, 20, 4, 64, 16)
    with torch.no_grad():
        tensors[1].add_(30.0)
    compare(tensors, None, 1.0, 2e-3)


def test_noise_is_the_same_on_every_backend_and_in_recomputation():
    tensors = inputs(2, 50, 8, 64, 16)
    seed = torch.tensor([2**62 - 3, 2**33 + 11])
    noise = gumbel(seed, 2, 8, 50)
    results, gradients = {}, {}
    for backend in ("triton", "fused", "reference"):
        with force(backend):
            results[backend] = group_assign(*tensors, noise=seed, tau=0.9).hard
            again = torch.utils.checkpoint.checkpoint(
                lambda *x: group_assign(*x, noise=seed, tau=0.9).hard, *tensors, use_reentrant=False
            )
            assert torch.equal(again, results[backend]), backend
            again.square().sum().backward()  # recomputes the forward pass
        gradients[backend] = tensors[0].grad.clone()
        tensors[0].grad = None
    given = group_assign_ref(*tensors, noise=noise, tau=0.9).hard
    for backend, hard in results.items():
        assert torch.equal(hard.argmax(dim=1), given.argmax(dim=1)), backend
        assert_close(f"d centers, {backend}", gradients[backend], gradients["reference"], 1e-4)


def test_sampling_follows_softmax():
    """Chi-square of the chosen centers against the softmax of the scores, at 20 patches of equal content."""
    tensors = inputs(1, 1, 5, 64, 16)
    with torch.no_grad():
        tensors[0] *= 0.3
    draws = 4000
    repeated = [tensors[0], tensors[1].expand(1, draws, 64), *tensors[2:]]
    with torch.no_grad(), force("triton"):
        found = group_assign(*repeated, noise=torch.tensor([5, 6]), tau=0.9)
    expected = draws * found.logits[0, :, 0].softmax(dim=0)
    chosen = found.hard[0].round().sum(dim=1)
    assert expected.min() > 20
    statistic = float(((chosen - expected).square() / expected).sum())
    assert statistic < 18.5, statistic  # 4 degrees of freedom, p = 0.001


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ((1, 4, 65, 64, 16), "at most 64 centers, got 65"),
        ((1, 4, 2, 256, 256), "groups of at most 128 channels, got 256"),
        ((1, 4, 17, 128, 128), "takes 17 centers with groups of at most 64 channels, got 128"),
    ],
    ids=str,
)
def test_refusals_name_the_limit(case, message):
    with force("triton"), pytest.raises(RuntimeError, match=message):
        group_assign(*inputs(*case))


def test_auto_does_not_interpret():
    tensors = inputs(1, 4, 2, 16, 4)
    assert group_assign(*tensors).pooled.grad_fn.name().startswith("GeneratedBackward")
    from segclip_fast.ops.group_assign import BACKENDS

    assert "only by request" in BACKENDS[0].refuse(tensors)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [*CASES, (96, 196, 8, 768, 64)], ids=str)
def test_on_cuda(case, dtype):
    tensors = inputs(*case, dtype, "cuda")
    actual, expected = both(tensors, torch.tensor([1, 2], device="cuda"), 0.9)
    same = actual["hard"].argmax(dim=1) == expected["hard"].argmax(dim=1)
    # tf32 and bf16 scores decide near ties otherwise; a flipped patch changes its region's gradient.
    assert (~same).float().mean() <= (0 if dtype == torch.float32 else 0.01)
    if same.all():
        for name, value in expected.items():
            if value.abs().max() > 1e-12:
                assert_close(name, actual[name], value, 3e-5 if dtype == torch.float32 else 3e-2)
