"""superpixel_kl: equal to the text-book form in value and gradient, on every back end, and its limits.

The kernel runs compiled where there is CUDA, else under the interpreter. The twin it is compared with runs in
float64 on the same numbers.
"""

from __future__ import annotations

import sys

import pytest
import torch
from conftest import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from segclip_fast.ops import superpixel_kl, superpixel_kl_ref
from segclip_fast.ops._dispatch import force

OPS = sys.modules[superpixel_kl.__module__]
FORMS = ("paper", "official")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
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


@pytest.mark.parametrize("backend", ["fused", "triton"])
@pytest.mark.parametrize("transposed", [False, True], ids=("contiguous", "transposed"))
@pytest.mark.parametrize("official", [False, True])
def test_opcheck_and_compile(official, transposed, backend):
    M = torch.randn((2, 4, 6) if transposed else (2, 6, 4), device=DEVICE, requires_grad=True)
    x = M.mT if transposed else M
    labels = torch.randint(3, (2, 6), device=DEVICE)
    op = torch.ops.segclip_fast.superpixel_kl
    torch.library.opcheck(op, (labels, x.detach().requires_grad_(), official, backend == "triton"))
    form = "official" if official else "paper"
    with force(backend):
        compiled = torch.compile(
            lambda x: superpixel_kl(labels, x, form), fullgraph=True, backend="aot_eager"
        )
        actual, expected = compiled(x), superpixel_kl(labels, x, form)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, M)[0] for loss in (actual, expected)))


def test_bad_input():
    labels, M = torch.zeros(2, 6, dtype=torch.int64), torch.zeros(2, 6, 4)
    with pytest.raises(ValueError, match=r"labels: expected \(B, N\) integers"):
        superpixel_kl(labels.float(), M)
    with pytest.raises(ValueError, match="assignment: expected"):
        superpixel_kl(labels, M[:, :5])
    with pytest.raises(ValueError, match=r"assignment: expected \(0, 6, L\)"):
        superpixel_kl(labels[:0], M[:0])
    with pytest.raises(ValueError, match="form: expected one of"):
        superpixel_kl(labels, M, "both")


def test_forms_differ_in_their_divisor_alone():
    labels, M = torch.randint(7, (3, 30)), torch.randn(3, 30, 5, dtype=torch.float64)
    paper, official = (superpixel_kl_ref(labels, M, form) for form in FORMS)
    assert paper.item() == pytest.approx(5 * official.item(), rel=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_gradcheck(backend, form):
    labels = torch.randint(4, (2, 9))
    M = torch.randn(2, 9, 3, dtype=torch.float64, requires_grad=True)
    with force(backend):
        assert torch.autograd.gradcheck(lambda x: superpixel_kl(labels, x, form), M)


class Sizes(TorchDispatchMode):
    """Elements of every tensor made inside the block."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, torch.Tensor):
                self.found.append(value.numel())
        return result


def test_fused_makes_nothing_larger_than_the_assignment():
    B, N, L = 2, 64, 4
    labels, M = torch.randint(9, (B, N)), torch.randn(B, N, L)
    with Sizes() as fused:
        OPS._kl(labels, M, False, False)
    with Sizes() as twin:
        superpixel_kl_ref(labels, M)
    assert max(fused.found) == B * N * L
    assert max(twin.found) >= B * N * N  # the recorder sees what it should


def rounding(dtype):
    """Relative RMS error that rounding the result alone could leave, twice."""
    return 2.0 * torch.finfo(dtype).eps / 12**0.5


@pytest.mark.parametrize("backend", ["fused", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_counts_in_fp32(dtype, backend, poisoned):
    labels = torch.randint(6, (2, 49), device=DEVICE)
    M = torch.randn(2, 49, 8, device=DEVICE).to(dtype).requires_grad_()
    exact = M.detach().double().requires_grad_()
    twin = superpixel_kl_ref(labels, exact)
    scale = 65536.0  # of the loss, as fp16 training has it
    with force(backend):
        loss = superpixel_kl(labels, M)
        with torch.autocast(DEVICE, torch.bfloat16):
            mixed = superpixel_kl(labels, M)
        (grad,) = torch.autograd.grad(loss * scale, M)
    assert loss.dtype == mixed.dtype == torch.float32
    assert grad.dtype == dtype
    assert torch.equal(loss, mixed)
    assert_close("loss", loss, twin, 2e-6)
    assert_close("grad", grad, torch.autograd.grad(twin * scale, exact)[0], rounding(dtype))


# --- the kernel

KINDS = {
    "int32": lambda B, N: torch.randint(9, (B, N), dtype=torch.int32),
    "int64": lambda B, N: torch.randint(9, (B, N)),
    "negative": lambda B, N: torch.randint(-4, 5, (B, N), dtype=torch.int32),
    "extreme": lambda B, N: torch.tensor([-(2**31), -1, 0, 2**31 - 1])[torch.randint(4, (B, N))].int(),
    "hashes": lambda B, N: torch.tensor([-(2**63), -1, 2**32 - 1, 2**31, 2**40, 2**63 - 1])[
        torch.randint(6, (B, N))
    ],
    "uint8": lambda B, N: torch.randint(250, 256, (B, N)).to(torch.uint8),
    "int16": lambda B, N: torch.randint(-9, 9, (B, N), dtype=torch.int16),
    "bool": lambda B, N: torch.randint(2, (B, N)) > 0,
    "uint16": lambda B, N: torch.randint(-2, 2, (B, N), dtype=torch.int16).view(torch.uint16),
    "uint32": lambda B, N: torch.randint(-2, 2, (B, N), dtype=torch.int32).view(torch.uint32),
    "uint64": lambda B, N: torch.randint(-2, 2, (B, N)).view(torch.uint64),
    "one": lambda B, N: torch.full((B, N), 7, dtype=torch.int32),
    "own": lambda B, N: torch.stack([torch.randperm(N) for _ in range(B)]).int() - 3,
}
CASES = [  # B, N, L, kind of labels; the last of L 64 and that of N 784 and L 10 are done by parts
    (2, 1, 1, "int64"),
    (1, 1, 8, "int32"),
    (2, 47, 6, "hashes"),
    (2, 48, 8, "own"),
    (2, 48, 8, "one"),
    (2, 49, 10, "negative"),
    (2, 49, 1, "int32"),
    (1, 50, 8, "extreme"),
    (1, 196, 8, "int64"),
    (1, 196, 6, "uint8"),
    (1, 48, 64, "int32"),
    (1, 196, 64, "hashes"),
    *[(2, 47, 8, kind) for kind in ("int16", "bool", "uint16", "uint32", "uint64")],
]
LARGE = [(1, 784, 8, "int32"), (1, 784, 10, "one")]


def compare(labels, M, form):
    """Kernel against twin, loss and gradient, scaled so that fp16 holds it."""
    # The twin compares labels of all dtypes but some unsigned ones.
    same = labels.view(OPS._SORTABLE.get(labels.dtype, labels.dtype))
    exact = M.detach().double().requires_grad_()
    twin = superpixel_kl_ref(same, exact, form)
    with force("triton"):
        loss = superpixel_kl(labels, M, form)
    found = {"loss": loss, "grad": torch.autograd.grad(4096.0 * loss, M)[0]}
    expected = {"loss": twin, "grad": torch.autograd.grad(4096.0 * twin, exact)[0]}
    tolerance = {"loss": 2e-6, "grad": 2e-6 if M.dtype == torch.float32 else rounding(M.dtype)}
    for name, value in expected.items():
        if value.abs().max() < 1e-12:  # nothing to agree on: one center, or every patch its own superpixel
            assert found[name].abs().max() == 0, name
        else:
            assert_close(name, found[name], value, tolerance[name])


def example(B, N, L, kind, dtype=torch.float32, device=DEVICE):
    """Labels, and an assignment as the model makes it: a transposed (B, L, N), larger than one-hot."""
    return KINDS[kind](B, N).to(device), (2 * torch.randn(B, L, N)).to(device, dtype).requires_grad_().mT


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_equals_twin(case, form, poisoned):
    compare(*example(*case), form)


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_kernel_on_many_patches(case, poisoned):
    compare(*example(*case), "paper")


@pytest.mark.parametrize("kind", KINDS)
def test_fused_takes_every_kind_of_label(kind):
    labels, M = KINDS[kind](2, 30), torch.randn(2, 30, 4, dtype=torch.float64)
    twin = superpixel_kl_ref(labels.view(OPS._SORTABLE.get(labels.dtype, labels.dtype)), M)
    with force("fused"):
        assert superpixel_kl(labels, M).item() == pytest.approx(twin.item(), rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("L", [5, 40])
def test_kernel_takes_any_strides(L, poisoned, monkeypatch):
    from segclip_fast.kernels import superpixel_kl as kernels

    monkeypatch.setattr(kernels, "TILE", 1024)  # L 40 by parts at a small N
    wide = torch.randn(2, 33, 2 * L, device=DEVICE)
    whole = torch.randn(33, 2, L, device=DEVICE)
    labels = torch.randint(5, (33, 4), device=DEVICE, dtype=torch.int32)[:, ::2].mT
    for M in (wide[..., ::2], whole.transpose(0, 1), wide[:1, :, :L].expand(2, 33, L)):
        compare(labels, M.requires_grad_(), "paper")
        _, grad = torch.ops.segclip_fast.superpixel_kl(labels, M.detach(), False, True)
        assert grad.stride() == torch.empty_like(M).stride()


@pytest.mark.parametrize("backend", ["fused", "triton"])
def test_certain_assignments(backend, poisoned):
    # P of 1e-40 and less: the text-book form takes its logarithm.
    labels = torch.randint(4, (2, 20), device=DEVICE)
    M = (120 * torch.nn.functional.one_hot(torch.randint(5, (2, 20)), 5) + 1000.0).to(DEVICE)
    twin = superpixel_kl_ref(labels, M.double())
    with force(backend):
        assert_close("loss", superpixel_kl(labels, M), twin, 2e-6)


def test_kernel_memory(monkeypatch):
    from segclip_fast.kernels import runtime

    asked, empty = [], runtime.empty
    monkeypatch.setattr(runtime, "empty", lambda shape, *rest: asked.append(shape) or empty(shape, *rest))
    labels, M = example(2, 16, 3, "int64")
    torch.ops.segclip_fast.superpixel_kl(labels, M.detach(), False, True)
    assert asked == [(2 * 16 * 3,), (2,)]  # the gradient and a loss an image


def test_kernel_refuses():
    labels = torch.zeros(1, 2049, dtype=torch.int32, device=DEVICE)
    M = torch.zeros(1, 2049, 65, device=DEVICE)
    with force("triton"):
        with pytest.raises(RuntimeError, match="up to 2048 patches and 64 centers, got 2049 and 3"):
            superpixel_kl(labels, M[..., :3])
        with pytest.raises(RuntimeError, match="got 7 and 65"):
            superpixel_kl(labels[:, :7], M[:, :7])
        with pytest.raises(RuntimeError, match="takes fp32, fp16 and bf16, got torch.float64"):
            superpixel_kl(labels[:, :7], M[:, :7].double())
        with pytest.raises(RuntimeError, match=r"assignment on meta"):
            superpixel_kl(labels[:, :7], M[:, :7, :3].to("meta"))


def test_auto_does_not_interpret():
    tensors = [torch.zeros(1, 4, dtype=torch.int64), torch.randn(1, 4, 3)]
    assert OPS.select("superpixel_kl", OPS.BACKENDS, tensors).name == "fused"
    assert OPS.BACKENDS[0].refuse(tensors) is not None
    with force("triton"):
        assert OPS.select("superpixel_kl", OPS.BACKENDS, [t.to(DEVICE) for t in tensors]).name == "triton"
        assert OPS.BACKENDS[0].refuse([torch.zeros(1, device=DEVICE)]) is None  # as `info` asks


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [*CASES, *LARGE, (96, 196, 8, "int32"), (96, 196, 8, "int64")], ids=str)
def test_on_cuda(case, dtype, poisoned):
    labels, M = example(*case, dtype, "cuda")
    for form in FORMS:
        compare(labels, M, form)
    loss, grad = torch.ops.segclip_fast.superpixel_kl(labels, M.detach(), False, True)
    again, grad_again = torch.ops.segclip_fast.superpixel_kl(labels, M.detach(), False, True)
    assert torch.equal(loss, again)
    assert torch.equal(grad, grad_again)
