"""attention_packed: equal to its twin, forward and backward, whichever kernel serves it; refusals speak."""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from conftest import assert_close
from test_attention import needs_gpu, no_choices, timer  # noqa: F401

from segclip_fast.ops import _autotune, attention_packed, attention_packed_ref, attention_ref
from segclip_fast.ops._dispatch import force

module = sys.modules["segclip_fast.ops.attention_packed"]

CASES = [  # lengths, longest, H, d
    ((3, 7, 1, 5), 7, 2, 8),
    ((4, 0, 2), 9, 1, 5),
    ((6,), 6, 3, 16),
    ((0, 0), 1, 1, 4),
]


def starts_of(lengths, device="cpu"):
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def qkv_of(lengths, H, d, dtype=torch.float64, device="cpu"):
    return [torch.randn(sum(lengths), H, d, dtype=dtype, device=device, requires_grad=True) for _ in "qkv"]


def compare(function, qkv, lengths, longest, causal, tolerance):
    """`function` against the twin in float64: output and every gradient."""
    starts = starts_of(lengths, qkv[0].device)
    upstream = torch.randn_like(qkv[0])
    exact = [x.detach().double().requires_grad_() for x in qkv]
    out = function(
        q=qkv[0], k=qkv[1], v=qkv[2], starts=starts, longest=longest, causal=causal, lengths=lengths
    )
    expected = attention_packed_ref(*exact, starts, longest, causal)
    assert out.dtype == qkv[0].dtype
    results = [out, *torch.autograd.grad(out, qkv, upstream)]
    expected = [expected, *torch.autograd.grad(expected, exact, upstream.double())]
    for name, x, y in zip(("out", "dq", "dk", "dv"), results, expected, strict=True):
        if x.numel():
            assert_close(name, x, y, tolerance)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_equals_twin(case, causal, dtype, tolerance):
    lengths, longest, H, d = case
    compare(attention_packed, qkv_of(lengths, H, d, dtype), lengths, longest, causal, tolerance)


@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_each_sequence_is_attention_on_its_own(backend):
    q, k, v = qkv_of((3, 4), 2, 8)
    with force(backend):
        out = attention_packed(q, k, v, starts_of((3, 4)), 5, causal=True)
    for rows in (slice(0, 3), slice(3, 7)):
        expected = attention_ref(q[None, rows], k[None, rows], v[None, rows], causal=True)[0]
        torch.testing.assert_close(out[rows], expected)


@pytest.mark.parametrize("causal", [False, True])
def test_sequences_do_not_see_each_other(causal):
    q, k, v = (x.detach() for x in qkv_of((3, 2, 4), 2, 8))
    expected = attention_packed(q, k, v, starts_of((3, 2, 4)), 4, causal)
    k[3:5], v[3:5] = 1e3, torch.nan
    out = attention_packed(q, k, v, starts_of((3, 2, 4)), 4, causal)
    assert out[3:5].isnan().all()
    assert torch.equal(out[:3], expected[:3])
    assert torch.equal(out[5:], expected[5:])


@pytest.mark.parametrize("causal", [False, True])
def test_opcheck_and_compile(causal):
    lengths = (3, 7, 1, 5)
    qkv, starts = qkv_of(lengths, 2, 8), starts_of(lengths)
    expected = attention_packed(*qkv, starts, 7, causal)
    torch.library.opcheck(torch.ops.segclip_fast.attention_packed, (*qkv, starts, 7, causal))
    compiled = torch.compile(
        lambda *x: attention_packed(*x, causal), fullgraph=True, backend="aot_eager", dynamic=True
    )
    torch.testing.assert_close(compiled(*qkv, starts, 7), expected)
    more = (2, 6, 8, 1, 9)
    qkv, starts = qkv_of(more, 2, 8), starts_of(more)
    torch.testing.assert_close(compiled(*qkv, starts, 9), attention_packed(*qkv, starts, 9, causal))


def test_autocast_gives_its_dtype():
    qkv = qkv_of((3, 4), 2, 8, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert attention_packed(*qkv, starts_of((3, 4)), 4).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 7, 2, 8)}, r"q: expected \(total, H, d\), got shape \(1, 7, 2, 8\)"),
        ({"k": torch.zeros(6, 2, 8)}, r"k, v: expected the shape of q \(7, 2, 8\), got \(6, 2, 8\)"),
        ({"v": torch.zeros(7, 2, 8).half()}, "q, k, v: expected one floating-point dtype"),
        (
            {"starts": torch.tensor([0, 3, 7])},
            r"starts: .* int32 on cpu, got \(3,\) torch.int64",
        ),
        ({"starts": starts_of(())}, r"starts: expected \(B \+ 1,\) int32"),
        ({"starts": starts_of((3, 3))}, r"starts: expected 0 to 7 in steps .* got \[0, 3, 6\]"),
        ({"starts": starts_of((9, -2))}, r"starts: expected 0 to 7 in steps"),
        ({"longest": 3}, r"starts: expected 0 to 7 in steps from 0 to longest = 3, got \[0, 3, 7\]"),
        ({"longest": 0}, "longest: expected an integer of at least 1, got 0"),
        ({"longest": 4.0}, "longest: expected an integer of at least 1, got 4.0"),
        ({"lengths": [3, 3]}, r"lengths: expected 2 numbers .* 7 in all, got \[3, 3\]"),
        ({"lengths": [7]}, "lengths: expected 2 numbers"),
        ({"lengths": [4, 3]}, r"lengths: expected those of starts, \[3, 4\], got \[4, 3\]"),
    ],
)
def test_bad_input(change, message):
    arguments = {name: torch.zeros(7, 2, 8) for name in "qkv"}
    arguments |= {"starts": starts_of((3, 4)), "longest": 4} | change
    with pytest.raises(ValueError, match=message):
        attention_packed(**arguments)


# --- the candidates, as far as a CPU can tell


@pytest.fixture
def tuned(monkeypatch):
    """Makes attention_packed choose, on the CPU, among the named candidates."""

    def install(**milliseconds):
        table = {c.name: c for c in module.CANDIDATES}
        chosen = tuple(replace(table[name], refuse=lambda **_: None) for name in milliseconds)
        monkeypatch.setattr(module, "CANDIDATES", chosen)
        monkeypatch.setattr(_autotune, "applies", lambda _: True)
        monkeypatch.setattr(_autotune, "time_cuda", timer(*milliseconds.values()))
        for cached in (module._varlen_attn, module._causal_by_flag, module._block_mask):
            cached.cache_clear()

    yield install
    for cached in (module._varlen_attn, module._causal_by_flag, module._block_mask):
        cached.cache_clear()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("version", ["2.10", "2.11"])
def test_varlen_of_both_versions(causal, version, tuned, monkeypatch):
    varlen = pytest.importorskip("torch.nn.attention.varlen")

    def twin(q, k, v, starts_q, starts_k, max_q, max_k, causal):
        assert starts_q is starts_k
        assert max_q == max_k == 7
        return attention_packed_ref(q, k, v, starts_q, max_q, causal)

    def old(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
        return twin(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, is_causal)

    def new(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        assert window_size in ((-1, -1), (-1, 0))
        return twin(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, window_size == (-1, 0))

    monkeypatch.setattr(varlen, "varlen_attn", {"2.10": old, "2.11": new}[version])
    tuned(varlen=1.0, padded=2.0)
    lengths, longest, H, d = CASES[0]
    compare(attention_packed, qkv_of(lengths, H, d), lengths, longest, causal, 1e-12)
    assert _autotune.chosen()[0].winner.name == "varlen"
    assert set(_autotune.chosen()[0].milliseconds) == {"varlen", "padded"}


@pytest.mark.parametrize("causal", [False, True])
def test_xformers_gets_its_layout_and_masks(causal, tuned, monkeypatch):
    ops = pytest.importorskip("xformers.ops")
    masks = []

    def attend(query, key, value, attn_bias=None):
        masks.append(attn_bias)
        assert query.shape == key.shape == value.shape == (1, 16, 2, 8)
        starts = attn_bias.q_seqinfo.seqstart
        assert torch.equal(starts, attn_bias.k_seqinfo.seqstart)
        assert attn_bias.q_seqinfo.max_seqlen == 7
        return attention_packed_ref(query[0], key[0], value[0], starts, 7, causal)[None]

    monkeypatch.setattr(ops, "memory_efficient_attention", attend)
    tuned(xformers=1.0, padded=2.0)
    lengths, longest, H, d = CASES[0]
    compare(attention_packed, qkv_of(lengths, H, d), lengths, longest, causal, 1e-12)
    kinds = ops.fmha.attn_bias
    assert {type(mask) for mask in masks} == {
        kinds.BlockDiagonalCausalMask if causal else kinds.BlockDiagonalMask
    }
    assert len({id(mask) for mask in masks}) == 1
    assert _autotune.chosen()[0].winner.name == "xformers"


def test_batches_of_about_the_same_size_share_a_choice(tuned):
    tuned(padded=1.0)
    _autotune.time_cuda = timer(1.0, 1.0)
    for lengths in ((5, 6, 7), (4, 8, 6), (8, 8, 8), (8, 8, 9)):
        attention_packed(*(x.detach() for x in qkv_of(lengths, 2, 8)), starts_of(lengths), max(lengths))
        # longest 5 to 8 and total 17 to 32 are one kind of input; longest 9 is another
        assert len(_autotune.chosen()) == (1 if max(lengths) < 9 else 2)


def test_refusals_give_reasons(monkeypatch):
    refuse = {c.name: c.refuse for c in module.CANDIDATES}

    def reason(name, d=8, dtype=torch.bfloat16, **change):
        q = torch.zeros(2, 1, d, dtype=dtype)
        arguments = {"starts": starts_of((2,)), "longest": 2, "causal": False, "lengths": [2]} | change
        return refuse[name](q=q, k=q, v=q, **arguments) or ""

    assert all("cuda, inputs are on cpu" in reason(name) for name in refuse)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert not reason("padded")
    assert not reason("varlen", lengths=None)
    assert "takes float16 and bfloat16, inputs are torch.float32" in reason("varlen", dtype=torch.float32)
    assert "multiples of 8 up to 256, got 12" in reason("varlen", d=12)
    assert "pass `lengths`" in reason("xformers", lengths=None)
    assert "takes float16, bfloat16 and float32" in reason("xformers", dtype=torch.float64)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert "needs compute capability 8.0, the device has 7.5" in reason("varlen")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    module._varlen_attn.cache_clear()
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    assert "no torch.nn.attention.varlen" in reason("varlen")
    module._varlen_attn.cache_clear()


# --- on the device


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", ["varlen", "xformers", "padded", None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_on_gpu_equals_twin(causal, dtype, name):
    """Each kernel that accepts, and the measured choice (None)."""
    lengths = (12, 1, 77, 30)
    qkv = qkv_of(lengths, 8, 64, dtype, "cuda")
    run = attention_packed
    if name is not None:
        candidate = next(c for c in module.CANDIDATES if c.name == name)
        run = candidate.run
        arguments = {
            "starts": starts_of(lengths, "cuda"),
            "longest": 77,
            "causal": causal,
            "lengths": lengths,
        }
        reason = candidate.refuse(q=qkv[0], k=qkv[1], v=qkv[2], **arguments)
        if reason is not None:
            pytest.skip(reason)
    compare(run, qkv, lengths, 77, causal, 5e-3 if dtype is torch.float32 else 2e-2)
    if name is None:
        assert _autotune.chosen()[-1].winner is not None


@pytest.mark.gpu
@needs_gpu
def test_on_gpu_does_not_wait_for_the_device():
    lengths = (12, 1, 77, 30)
    qkv = [x.detach() for x in qkv_of(lengths, 8, 64, torch.bfloat16, "cuda")]
    starts = starts_of(lengths, "cuda")
    attention_packed(*qkv, starts, 77, causal=True, lengths=lengths)  # times
    torch.cuda.set_sync_debug_mode("error")
    try:
        attention_packed(*qkv, starts, 77, causal=True, lengths=lengths)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_gradcheck():
    inputs = [torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    starts = torch.tensor([0, 2, 5], dtype=torch.int32)
    for function in (attention_packed, attention_packed_ref):
        assert torch.autograd.gradcheck(lambda *x, f=function: f(*x, starts, 3, causal=True), inputs)
