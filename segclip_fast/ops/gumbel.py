"""Gumbel noise that is a function of a seed and a position, the same on every device and in every kernel.

The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): a
counter is encrypted with a key, so any element is found without the ones before it and a step can be replayed
from two integers.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def draw_seed(device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """A fresh (2,) int64 seed, (key, call), drawn on `device` without a host synchronisation."""
    return torch.randint(2**62, (2,), device=device, generator=generator)


def gumbel(seed: Tensor, B: int, L: int, N: int) -> Tensor:
    """Gumbel(0, 1) noise of an assignment.

    The noise of image b, center l, patch n is word l % 4 of the block with counter
    ((b N + n) ceil(L / 4) + l // 4, call, 0, 0); a word w becomes u = ((w >> 9) + 1/2) 2^-23, which is
    neither 0 nor 1, and -log(-log(u)).

    Args:
        seed: (2,) int64, key (64 bits) and call (the lower 32 bits count).
        B: images.
        L: centers.
        N: patches.

    Returns:
        (B, L, N) float32.

    Raises:
        ValueError: seed is not (2,) int64.
    """
    if seed.shape != (2,) or seed.dtype != torch.int64:
        raise ValueError(f"seed: expected (2,) int64, got {tuple(seed.shape)} {seed.dtype}")
    return torch.ops.segclip_fast.gumbel(seed, B, L, N)


def _gumbel(seed: Tensor, B: int, L: int, N: int) -> Tensor:
    quads = -(-L // 4)
    counter = torch.arange(B * N * quads, device=seed.device) & _WORD
    words = torch.stack(philox(seed[0], counter, seed[1] & _WORD), dim=-1)  # (B N quads, 4)
    words = words.view(B, N, 4 * quads)[:, :, :L]
    uniform = ((words >> 9).to(torch.float32) + 0.5) * 2.0**-23
    return -(-uniform.log()).log().mT


def philox(key: Tensor, first: Tensor, second: Tensor) -> list[Tensor]:
    """Philox4x32-10 of the counters (first, second, 0, 0), in int64 arithmetic.

    Args:
        key: () int64.
        first: (n,) int64 below 2^32.
        second: () int64 below 2^32.

    Returns:
        Four (n,) int64 tensors of 32-bit words.
    """
    keys = [key & _WORD, (key >> 32) & _WORD]
    c = [first, second.expand_as(first), torch.zeros_like(first), torch.zeros_like(first)]
    for _ in range(ROUNDS):
        # The low 64 bits of a product are right whatever the sign; the mask undoes the arithmetic shift.
        low, high = MULTIPLIERS[0] * c[0], MULTIPLIERS[1] * c[2]
        c = [
            ((high >> 32) & _WORD) ^ c[1] ^ keys[0],
            high & _WORD,
            ((low >> 32) & _WORD) ^ c[3] ^ keys[1],
            low & _WORD,
        ]
        keys = [(k + weyl) & _WORD for k, weyl in zip(keys, WEYL, strict=True)]
    return c


# An op of its own, so that no compiler rewrites the integer arithmetic: Inductor's vectorised code for it
# gave other numbers (PyTorch 2.10, CPU).
_library = torch.library.Library("segclip_fast", "FRAGMENT")
_library.define("gumbel(Tensor seed, int B, int L, int N) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.impl("gumbel", _gumbel, "CompositeExplicitAutograd")


@torch.library.register_fake("segclip_fast::gumbel", lib=_library)
def _gumbel_fake(seed: Tensor, B: int, L: int, N: int) -> Tensor:
    return seed.new_empty((B, N, L), dtype=torch.float32).mT
