"""attention: equal to its twin, forward and backward, and every refusal speaks."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_close

from segclip_fast.ops import attention, attention_ref

CASES = [  # B, T, S, H, d, causal, lengths
    (2, 7, 7, 3, 8, False, None),
    (2, 7, 7, 3, 8, True, None),
    (3, 4, 20, 2, 16, False, None),
    (3, 4, 20, 2, 16, False, (20, 1, 13)),
    (2, 9, 9, 1, 5, True, (9, 4)),
    (1, 1, 1, 1, 1, False, None),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_equals_twin(case, dtype, tolerance):
    B, T, S, H, d, causal, lengths = case
    shapes = [(B, T, H, d), (B, S, H, d), (B, S, H, d)]
    inputs = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    lengths = None if lengths is None else torch.tensor(lengths)
    upstream = torch.randn(B, T, H, d, dtype=dtype)
    results = []
    for function in (attention, attention_ref):
        out = function(*inputs, causal=causal, lengths=lengths)
        results.append([out, *torch.autograd.grad(out, inputs, upstream)])
    for name, actual, expected in zip(("out", "dq", "dk", "dv"), *results, strict=True):
        assert_close(name, actual, expected, tolerance)


def test_hidden_keys_do_not_matter():
    q, k, v = (torch.randn(2, 5, 2, 4) for _ in range(3))
    lengths = torch.tensor([3, 5])
    expected = attention(q, k, v, lengths=lengths)
    k[0, 3:], v[0, 3:] = 1e3, -1e3
    torch.testing.assert_close(attention(q, k, v, lengths=lengths), expected)


@pytest.mark.parametrize("causal", [False, True])
def test_opcheck_and_compile(causal):
    q, k, v = (torch.randn(2, 5, 2, 8, requires_grad=True) for _ in range(3))
    torch.library.opcheck(torch.ops.segclip_fast.attention, (q, k, v, causal, None))
    compiled = torch.compile(lambda *x: attention(*x, causal=causal), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), attention(q, k, v, causal=causal))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 5, 8)}, r"q: expected \(B, T, H, d\)"),
        ({"k": torch.zeros(2, 6, 2, 8)}, "k, v: expected"),
        ({"v": torch.zeros(2, 5, 2, 4)}, "k, v: expected"),
        (
            {"k": torch.zeros(2, 6, 2, 8), "v": torch.zeros(2, 6, 2, 8), "causal": True},
            "causal: expected as many",
        ),
        ({"lengths": torch.zeros(2)}, r"lengths: expected \(2,\) integers"),
        ({"lengths": torch.tensor([1])}, r"lengths: expected \(2,\) integers"),
    ],
)
def test_bad_input(change, message):
    arguments = {name: torch.zeros(2, 5, 2, 8) for name in "qkv"} | change
    with pytest.raises(ValueError, match=message):
        attention(**arguments)
