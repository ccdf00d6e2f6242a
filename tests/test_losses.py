"""Losses against hand-computed values."""

from __future__ import annotations

import math

import pytest
import torch

from segclip_fast import losses


def test_contrastive_by_hand():
    image, text = torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    scale = torch.tensor(math.log(2.0))
    logits = 2 * torch.tensor([[1.0, 2**-0.5], [0.0, 2**-0.5]])
    rows = -logits.log_softmax(dim=1).diagonal().mean()
    columns = -logits.log_softmax(dim=0).diagonal().mean()
    actual = losses.contrastive(3 * image, text, scale)
    assert actual.item() == pytest.approx(((rows + columns) / 2).item())


def test_contrastive_without_a_false_negative():
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randn(3, 4, generator=generator) for _ in range(2))
    holds = torch.zeros(3, 3, dtype=torch.bool)
    holds[0, 2] = True  # the third caption also holds for the first image
    scale = torch.tensor(0.0)
    normal = [x / x.norm(dim=1, keepdim=True) for x in (image, text)]
    logits = normal[0] @ normal[1].T
    logits[0, 2] = -math.inf
    expected = -(logits.log_softmax(1).diagonal().mean() + logits.log_softmax(0).diagonal().mean()) / 2
    assert losses.contrastive(image, text, scale, holds).item() == pytest.approx(expected.item())
    holds.fill_(False)
    assert losses.contrastive(image, text, scale, holds) == losses.contrastive(image, text, scale)


def test_temperature_is_clamped_without_gradient():
    scale = torch.tensor(5.0, requires_grad=True)
    value = losses.inverse_temperature(scale)
    assert value.item() == 100.0
    value.backward()
    assert scale.grad.item() == 0.0


def test_reconstruction_counts_hidden_patches_only():
    predicted, pixels = torch.zeros(1, 3, 2), torch.tensor([[[1.0, 1.0], [2.0, 0.0], [9.0, 9.0]]])
    hidden = torch.tensor([[1.0, 1.0, 0.0]])
    assert losses.reconstruction(predicted, pixels, hidden).item() == pytest.approx((1 + 2) / 2)


def test_bad_input():
    good = torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"image, text: expected two equal \(B, E\)"):
        losses.contrastive(good, good[:1], torch.tensor(0.0))
    with pytest.raises(ValueError, match=r"holds: expected \(2, 2\) bool"):
        losses.contrastive(good, good, torch.tensor(0.0), torch.zeros(2, 2))


def test_contrastive_is_computed_in_float32_under_autocast():
    image, text = torch.randn(6, 16), torch.randn(6, 16)
    scale = torch.tensor(100.0).log()
    expected = losses.contrastive(image, text, scale)
    with torch.autocast("cpu", torch.bfloat16):
        found = losses.contrastive(image, text, scale)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
