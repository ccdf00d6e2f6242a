"""attention: equal to its twin, forward and backward, whichever kernel serves; every refusal speaks."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from segclip_fast.ops import _autotune, attention, attention_ref
from segclip_fast.ops._autotune import Candidate

module = sys.modules["segclip_fast.ops.attention"]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
MASKS = [(False, None), (True, None), (False, (50, 1)), (True, (9, 50))]

CASES = [  # B, T, S, H, d, causal, lengths
    (2, 7, 7, 3, 8, False, None),
    (2, 7, 7, 3, 8, True, None),
    (3, 4, 20, 2, 16, False, None),
    (3, 4, 20, 2, 16, False, (20, 1, 13)),
    (2, 9, 9, 1, 5, True, (9, 4)),
    (1, 1, 1, 1, 1, False, None),
]


@pytest.fixture(autouse=True)
def no_choices(monkeypatch):
    monkeypatch.delenv(_autotune.SWITCH, raising=False)
    _autotune.forget()
    yield
    _autotune.forget()


def inputs_of(case, dtype, device="cpu"):
    B, T, S, H, d, causal, lengths = case
    shapes = [(B, T, H, d), (B, S, H, d), (B, S, H, d)]
    qkv = [torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for shape in shapes]
    return qkv, causal, None if lengths is None else torch.tensor(lengths, device=device)


def compare(function, qkv, causal, lengths, tolerance):
    """`function` against the twin in float64: output and every gradient."""
    upstream = torch.randn_like(qkv[0])
    exact = [x.detach().double().requires_grad_() for x in qkv]
    results = []
    for run, tensors, gradient in ((function, qkv, upstream), (attention_ref, exact, upstream.double())):
        out = run(*tensors, causal=causal, lengths=lengths)
        results.append([out, *torch.autograd.grad(out, tensors, gradient)])
    assert results[0][0].dtype == qkv[0].dtype
    for name, actual, expected in zip(("out", "dq", "dk", "dv"), *results, strict=True):
        if float(expected.detach().abs().max()) > 1e-6:  # one key: dq and dk are rounding only
            assert_close(name, actual, expected, tolerance)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
@pytest.mark.parametrize("function", [attention, attention_ref])
def test_equals_twin(case, dtype, tolerance, function):
    qkv, causal, lengths = inputs_of(case, dtype)
    compare(function, qkv, causal, lengths, tolerance)


def test_hidden_keys_do_not_matter():
    q, k, v = (torch.randn(2, 5, 2, 4) for _ in range(3))
    lengths = torch.tensor([3, 5])
    expected = attention(q, k, v, lengths=lengths)
    k[0, 3:], v[0, 3:] = 1e3, -1e3
    torch.testing.assert_close(attention(q, k, v, lengths=lengths), expected)


@pytest.mark.parametrize("causal", [False, True])
def test_opcheck_and_compile(causal):
    q, k, v = (torch.randn(2, 5, 2, 8, requires_grad=True) for _ in range(3))
    expected = attention(q, k, v, causal=causal)
    torch.library.opcheck(torch.ops.segclip_fast.attention, (q, k, v, causal, None))
    compiled = torch.compile(lambda *x: attention(*x, causal=causal), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert compiled(q, k, v).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 5, 8)}, r"q: expected \(B, T, H, d\)"),
        ({"k": torch.zeros(2, 6, 2, 8)}, "k, v: expected"),
        ({"v": torch.zeros(2, 5, 2, 4)}, "k, v: expected"),
        ({"v": torch.zeros(2, 5, 2, 8).half()}, "q, k, v: expected one floating-point dtype"),
        (dict.fromkeys("qkv", torch.zeros(2, 5, 2, 8).int()), "q, k, v: expected one floating-point dtype"),
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


class Softmaxes(TorchDispatchMode):
    """Remembers the dtype of every softmax."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if "softmax" in str(func):
            self.dtypes.append(out.dtype)
        return out


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_softmax_is_never_in_half_precision(half, autocast):
    q, k, v = (torch.randn(2, 5, 2, 8).to(torch.float32 if autocast else half) for _ in range(3))
    for function in (attention, attention_ref):
        with torch.autocast("cpu", half, enabled=autocast), Softmaxes() as seen:
            out = function(q, k, v)
            with sdpa_kernel(SDPBackend.MATH):
                attention(q, k, v, lengths=torch.tensor([3, 5]))
        assert out.dtype == half
        assert seen.dtypes
        assert set(seen.dtypes) == {torch.float32}


# --- the candidates, as far as a CPU can tell


def fail(*_, **__):
    raise MemoryError("out of memory\nmore lines")


def timer(*milliseconds):
    """Times in the order of asking; asking once more is an error."""
    left = list(milliseconds)

    def time(call):
        call()
        return left.pop(0)

    return time


@pytest.fixture
def tuned(monkeypatch):
    """Makes attention choose, on the CPU, among the named candidates; returns the list of those that ran."""
    ran = []

    def install(**milliseconds):
        table = {c.name: c for c in module.CANDIDATES}

        def noting(c):
            return lambda **arguments: ran.append(c.name) or c.run(**arguments)

        chosen = [replace(table[n], run=noting(table[n]), refuse=lambda **_: None) for n in milliseconds]
        monkeypatch.setattr(module, "CANDIDATES", tuple(chosen))
        monkeypatch.setattr(_autotune, "applies", lambda _: True)
        monkeypatch.setattr(_autotune, "time_cuda", timer(*milliseconds.values()))
        return ran

    return install


@pytest.mark.parametrize("case", CASES, ids=str)
def test_tuned_attention_equals_twin(case, tuned):
    ran = tuned(flash=2.0, math=1.0, efficient=3.0)
    generator = torch.get_rng_state()
    qkv, causal, lengths = inputs_of(case, torch.float64)
    torch.set_rng_state(generator)
    attention(*qkv, causal, lengths)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(x.grad is None for x in qkv)
    ran.clear()
    compare(attention, qkv, causal, lengths, 1e-12)
    assert ran == ["math"]


def test_tuning_leaves_checkpoints_alone(tuned):
    ran = tuned(flash=2.0, math=1.0)
    q = torch.randn(2, 5, 1, 8, dtype=torch.float64, requires_grad=True)
    out = checkpoint(lambda x: attention(x, x, x) * 2, q, use_reentrant=False)
    (actual,) = torch.autograd.grad(out.sum(), q)
    (expected,) = torch.autograd.grad((attention_ref(q, q, q) * 2).sum(), q)
    torch.testing.assert_close(actual, expected)
    assert ran.count("flash") == 2  # one trial, one timed call


def test_tuning_inside_the_backward_of_a_reentrant_checkpoint(tuned, monkeypatch):
    ran = tuned(flash=2.0, math=1.0)
    monkeypatch.setattr(_autotune, "time_cuda", timer(2.0, 1.0, 2.0, 1.0))  # without gradient, then with
    q = torch.randn(2, 5, 1, 8, dtype=torch.float64, requires_grad=True)
    checkpoint(lambda x: attention(x, x, x), q, use_reentrant=True).sum().backward()
    (expected,) = torch.autograd.grad(attention_ref(q, q, q).sum(), q)
    torch.testing.assert_close(q.grad, expected)
    assert [" with gradient" in choice.inputs for choice in _autotune.chosen()] == [False, True]
    assert ran[-1] == "math"


def test_if_all_candidates_fail_pytorch_chooses(tuned, monkeypatch):
    tuned(flash=1.0)
    monkeypatch.setattr(module, "CANDIDATES", (Candidate("flash", fail, lambda **_: None),))
    qkv, causal, lengths = inputs_of(CASES[1], torch.float64)
    compare(attention, qkv, causal, lengths, 1e-12)


@pytest.mark.parametrize("name", ["flash", "cudnn", "efficient", "math"])
@pytest.mark.parametrize("first", [None, "math"])
def test_kernel_is_put_first_and_the_order_is_restored(name, first, monkeypatch):
    order = []

    def attend(*arguments):
        order.append(torch._C._get_sdp_priority_order()[0])
        return F.scaled_dot_product_attention(*arguments)

    codes = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    codes |= {"efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}
    before = torch._C._get_sdp_priority_order()
    own = None if first is None else codes[first].value
    monkeypatch.setattr(module, "_first_choice", lambda *_: own)
    monkeypatch.setattr(module, "F", type("F", (), {"scaled_dot_product_attention": staticmethod(attend)}))
    qkv, causal, lengths = inputs_of(CASES[0], torch.float64)
    candidate = next(c for c in module.CANDIDATES if c.name == name)
    compare(candidate.run, qkv, causal, lengths, 1e-12)
    assert order == [before[0] if name == first else codes[name].value]
    assert torch._C._get_sdp_priority_order() == before


def test_refusals_give_reasons(monkeypatch):
    refuse = {c.name: c.refuse for c in module.CANDIDATES}

    def reason(name, d=8, dtype=torch.bfloat16, lengths=None):
        q = torch.zeros(1, 2, 1, d, dtype=dtype)
        return refuse[name](q=q, k=q, v=q, causal=False, lengths=lengths) or ""

    assert all("runs on cuda, inputs are on cpu" in reason(name) for name in refuse)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    accepts = {kernel: lambda _: True for kernel in module._ACCEPTS}
    monkeypatch.setattr(module, "_ACCEPTS", accepts)
    lengths = torch.tensor([1])
    assert not any(reason(name) for name in refuse if name != "xformers")
    assert "takes float16 and bfloat16" in reason("flash", dtype=torch.float32)
    assert "takes float16 and bfloat16" in reason("cudnn", dtype=torch.float32)
    assert not reason("efficient", dtype=torch.float32, lengths=lengths)
    assert "no mask" in reason("flash", lengths=lengths)
    assert "up to 256, got 264" in reason("flash", d=264)
    assert "multiples of 8, got 12" in reason("cudnn", d=12)
    assert "takes float16, bfloat16 and float32" in reason("xformers", dtype=torch.float64)
    assert "multiples of 8 in torch.bfloat16, got 12" in reason("xformers", d=12)
    monkeypatch.setitem(accepts, SDPBackend.EFFICIENT_ATTENTION, module.kernels.can_use_efficient_attention)
    assert "PyTorch refuses" in reason("efficient")
    with sdpa_kernel(SDPBackend.MATH):
        assert "switched off in PyTorch" in reason("flash")
    caches = (module.xformers_ops, module.xformers_kernels)
    for cache in caches:
        cache.cache_clear()
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    assert "xformers is not installed" in reason("xformers")
    module.xformers_ops.cache_clear()
    module.xformers_kernels.cache_clear()
    monkeypatch.undo()
    ops = pytest.importorskip("xformers.ops")
    monkeypatch.setattr(ops.fmha.cutlass.BwOp, "is_available", lambda: False)
    assert "built for another torch" in module.xformers_kernels()
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize("case", CASES[:5], ids=str)
def test_xformers_gets_its_layout_and_masks(case, tuned, monkeypatch):
    ops = pytest.importorskip("xformers.ops")
    masks = []

    def attend(query, key, value, attn_bias=None):
        (B, T, H, _), S = query.shape, key.shape[1]
        masks.append(type(attn_bias))
        if not isinstance(attn_bias, torch.Tensor):
            return attention_ref(query, key, value, causal=attn_bias is not None)
        assert attn_bias.shape == (B, H, T, S)
        assert attn_bias.dtype == query.dtype
        assert all(stride % 8 == 0 for stride in attn_bias.stride()[:-1])
        heads_first = (x.transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(*heads_first, attn_mask=attn_bias).transpose(1, 2)

    monkeypatch.setattr(ops, "memory_efficient_attention", attend)
    tuned(xformers=1.0)
    qkv, causal, lengths = inputs_of(case, torch.float64)
    compare(attention, qkv, causal, lengths, 1e-12)
    assert _autotune.chosen()[0].winner.name == "xformers", _autotune.chosen()[0].reasons
    kind = ops.LowerTriangularMask if causal else type(None)
    assert set(masks) == {kind if lengths is None else torch.Tensor}


# --- on the device


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", ["flash", "cudnn", "efficient", "math", "xformers", None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", [(2, 50, 50, 3, 64, *rest) for rest in MASKS], ids=str)
def test_on_gpu_equals_twin(case, dtype, name):
    """Each kernel that accepts, and the measured choice (None)."""
    qkv, causal, lengths = inputs_of(case, dtype, "cuda")
    run = attention
    if name is not None:
        candidate = next(c for c in module.CANDIDATES if c.name == name)
        run = candidate.run
        reason = candidate.refuse(*qkv, causal, lengths)
        if reason is not None:
            pytest.skip(reason)
    compare(run, qkv, causal, lengths, 5e-3 if dtype is torch.float32 else 2e-2)
    if name is None:
        assert _autotune.chosen()[-1].winner is not None


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", ["flash", "cudnn", "efficient", "math", "xformers", None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_on_gpu_gradient_of_any_strides(dtype, name):
    """A dense gradient first, then the slice of a larger one: no kernel may remember the former's strides."""
    fused = torch.randn(2, 60, 3, 3, 64, dtype=dtype, device="cuda", requires_grad=True)
    q, k, v = (x[:, :50] for x in fused.unbind(2))  # (2, 50, 3, 64) with the strides of `fused`
    run = attention
    if name is not None:
        candidate = next(c for c in module.CANDIDATES if c.name == name)
        run = candidate.run
        if (reason := candidate.refuse(q, k, v, False, None)) is not None:
            pytest.skip(reason)
    wide = torch.randn(2, 60, 3, 64, dtype=dtype, device="cuda")
    twin = attention_ref(*(x.double() for x in (q, k, v)))
    exact = torch.autograd.grad(twin, fused, wide[:, :50].double())[0]
    for upstream in (wide[:, :50].contiguous(), wide[:, :50]):
        found = torch.autograd.grad(run(q, k, v, causal=False, lengths=None), fused, upstream)[0]
        assert_close("gradient", found, exact, 5e-3 if dtype is torch.float32 else 2e-2)


@pytest.mark.gpu
@needs_gpu
def test_on_gpu_nothing_is_timed_where_it_must_not_be():
    q = torch.randn(2, 50, 3, 64, device="cuda", dtype=torch.bfloat16)
    expected = attention_ref(q, q, q).float()
    out = [torch.compile(lambda x: attention(x, x, x), fullgraph=True)(q)]
    torch.use_deterministic_algorithms(True)
    try:
        out.append(attention(q, q, q))
    finally:
        torch.use_deterministic_algorithms(False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attention(q, q, q)
    graph.replay()
    assert not _autotune.chosen()
    for x in (*out, captured):
        assert_close("out", x.float(), expected, 2e-2)


@pytest.mark.gpu
@needs_gpu
def test_on_gpu_choice_names_the_usual_kernels():
    q = torch.randn(8, 197, 12, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    attention(q, q, q)
    (choice,) = _autotune.chosen()
    assert {"efficient", "math"} <= set(choice.milliseconds)
    assert choice.winner.name in choice.milliseconds
    assert not [reason for reason in choice.reasons.values() if reason.startswith("wrong")]


@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck(causal):
    inputs = [torch.randn(1, 4, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    for function in (attention, attention_ref):
        assert torch.autograd.gradcheck(lambda *x, f=function: f(*x, causal=causal), inputs)
