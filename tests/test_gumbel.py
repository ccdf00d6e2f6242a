"""gumbel: known answers of the generator, distribution, and independence of seed and position."""

from __future__ import annotations

import math

import pytest
import torch

from segclip_fast.ops.gumbel import draw_seed, gumbel, philox

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("key", "first", "second", "words"),
    [  # published with the generator for (0, 0, 0, 0) under key (0, 0)
        (0, 0, 0, ("6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8")),
    ],
)
def test_known_answer(key, first, second, words):
    found = philox(torch.tensor(key), torch.tensor([first]), torch.tensor(second))
    assert tuple(f"{int(word):08x}" for word in found) == words


def test_matches_the_kernel_generator():
    """Triton's own Philox, for counters and keys that use all 32 bits."""
    pytest.importorskip("triton")
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(out, key, SIZE: tl.constexpr):
        i = tl.arange(0, SIZE)
        counter = (i * 268435399).to(tl.uint32)
        zero = tl.zeros_like(counter)
        words = tl.philox(tl.load(key), counter, zero + 0xFFFFFFF1, zero, zero)
        for w in tl.static_range(4):
            tl.store(out + w * SIZE + i, words[w].to(tl.int64))

    if torch.cuda.is_available():
        pytest.skip(
            "runs under the interpreter; the compiled kernels are compared in test_group_assign_kernel"
        )
    key = torch.tensor([2**62 + 123456789])
    out = torch.empty(4, 16, dtype=torch.int64)
    kernel[(1,)](out, key, SIZE=16)
    counters = (torch.arange(16) * 268435399) & ONES
    assert torch.equal(out & ONES, torch.stack(philox(key[0], counters, torch.tensor(0xFFFFFFF1))))


def test_moments():
    noise = gumbel(torch.tensor([1, 2]), 4, 8, 5000).double()
    n = noise.numel()
    assert torch.isfinite(noise).all()
    assert abs(noise.mean() - 0.5772156649) < 4 * math.sqrt(math.pi**2 / 6 / n)
    assert abs(noise.var() - math.pi**2 / 6) < 4 * math.sqrt(math.pi**4 * (1 / 36 + 2.4 / 36) / n)


def test_choices_follow_softmax():
    """Chi-square of arg max(logits + noise) against softmax(logits)."""
    logits = torch.tensor([0.0, 0.5, -1.0, 1.2, 0.1, -0.4])
    draws = 60000
    chosen = (gumbel(torch.tensor([77, 0]), 1, 6, draws) + logits[:, None]).argmax(dim=1)
    expected = draws * logits.softmax(dim=0)
    counts = torch.bincount(chosen.flatten(), minlength=6)
    statistic = float(((counts - expected).square() / expected).sum())
    assert statistic < 20.5, statistic  # 5 degrees of freedom, p = 0.001


def test_seed_and_call_make_independent_noise_and_replay():
    base = gumbel(torch.tensor([9, 9]), 2, 8, 500)
    assert torch.equal(base, gumbel(torch.tensor([9, 9]), 2, 8, 500))
    for other in ([9, 10], [10, 9], [9 + 2**40, 9]):
        found = gumbel(torch.tensor(other), 2, 8, 500)
        correlation = torch.corrcoef(torch.stack([base.flatten(), found.flatten()]))[0, 1]
        assert abs(correlation) < 4 / math.sqrt(base.numel()), other
    assert base.unique().numel() > 0.99 * base.numel()


def test_drawn_seeds_follow_the_generator():
    first, again, other = (
        draw_seed(torch.device("cpu"), torch.Generator().manual_seed(n)) for n in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_opcheck():
    torch.library.opcheck(torch.ops.segclip_fast.gumbel, (torch.tensor([3, 4]), 2, 5, 7))


def test_a_compiler_changes_nothing():
    """Seen: Inductor's own code for the integer arithmetic gave other noise, at sizes that are vectorised."""
    seed = torch.tensor([2**62 - 5, 2**61 + 77])
    compiled = torch.compile(lambda s: gumbel(s, 3, 8, 49) + 1.0, fullgraph=True)
    assert torch.equal(compiled(seed), gumbel(seed, 3, 8, 49) + 1.0)


def test_bad_seed():
    with pytest.raises(ValueError, match=r"seed: expected \(2,\) int64, got \(3,\)"):
        gumbel(torch.zeros(3, dtype=torch.int64), 1, 1, 1)
