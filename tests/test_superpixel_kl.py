"""superpixel_kl: equal to the text-book form in value and gradient, and its limits."""

from __future__ import annotations

import pytest
import torch

from segclip_fast.ops import superpixel_kl, superpixel_kl_ref

SHAPES = [(2, 49, 8, 5), (1, 1, 3, 1), (3, 17, 1, 4), (2, 12, 64, 100), (4, 196, 8, 22)]  # B, N, L, labels


def one_hot(B, N, L, dtype=torch.float64):
    return torch.nn.functional.one_hot(torch.randint(L, (B, N)), L).to(dtype).requires_grad_()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", ["paper", "official"])
@pytest.mark.parametrize("soft", [False, True], ids=("one-hot", "soft"))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-5)])
def test_equals_twin(shape, form, soft, dtype, tolerance):
    B, N, L, count = shape
    labels = torch.randint(-3, count, (B, N)) * 7
    M = torch.randn(B, N, L, dtype=dtype, requires_grad=True) if soft else one_hot(B, N, L, dtype)
    results = []
    for function in (superpixel_kl, superpixel_kl_ref):
        loss = function(labels, M, form)
        results.append((loss.detach(), torch.autograd.grad(loss * 3.0, M)[0]))
    (loss, grad), (twin, twin_grad) = results
    assert loss.item() == pytest.approx(twin.item(), rel=max(tolerance, 1e-9), abs=1e-7)
    assert (grad - twin_grad).abs().max() <= tolerance * max(float(twin_grad.abs().max()), 1e-3)


def test_agreeing_superpixels_cost_nothing():
    labels = torch.tensor([[5, 5, 9, 9]])
    M = torch.eye(3)[torch.tensor([[0, 0, 2, 2]])]
    for form in ("paper", "official"):
        assert superpixel_kl(labels, M, form).item() == pytest.approx(0.0, abs=1e-7)


def test_known_value():
    # Two patches of one superpixel on different centers of two: P = (a, b), (b, a), Q = (1/2, 1/2).
    a = torch.tensor(1.0).sigmoid()
    b = 1 - a
    expected = (a - 0.5) * (a / b).log()  # of each patch: sum (P - Q)(log P - log Q)
    loss = superpixel_kl(torch.zeros(1, 2, dtype=torch.int64), torch.eye(2)[None], "paper")
    assert loss.item() == pytest.approx(expected.item() / 2, rel=1e-6)


def test_labels_of_other_images_do_not_mix():
    M = one_hot(2, 6, 4)
    labels = torch.zeros(2, 6, dtype=torch.int64)
    alone = [superpixel_kl(labels[:1], M[i : i + 1]) for i in range(2)]
    assert superpixel_kl(labels, M).item() == pytest.approx(sum(alone).item() / 2)


@pytest.mark.parametrize("official", [False, True])
def test_opcheck_and_compile(official):
    M = one_hot(2, 6, 4, torch.float32)
    labels = torch.randint(3, (2, 6))
    torch.library.opcheck(torch.ops.segclip_fast.superpixel_kl, (labels, M, official))
    form = "official" if official else "paper"
    compiled = torch.compile(lambda x: superpixel_kl(labels, x, form), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(M), superpixel_kl(labels, M, form))


def test_bad_input():
    labels, M = torch.zeros(2, 6, dtype=torch.int64), torch.zeros(2, 6, 4)
    with pytest.raises(ValueError, match=r"labels: expected \(B, N\) integers"):
        superpixel_kl(labels.float(), M)
    with pytest.raises(ValueError, match="assignment: expected"):
        superpixel_kl(labels, M[:, :5])
    with pytest.raises(ValueError, match="form: expected one of"):
        superpixel_kl(labels, M, "both")
