"""How the benchmarks measure: memory, gate, turns, counts, floors, stored captions."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("needs the repository", allow_module_level=True)
sys.path.insert(0, str(ROOT / "benchmarks"))

from harness import (  # noqa: E402
    captions,
    counts,
    floors,
    gate,
    memory,
    rivals,
    timing,
)

CPU = torch.device("cpu")
MIB = 2**20


# --- memory


def test_peak_counts_temporaries_and_not_what_was_there():
    before = torch.ones(MIB // 4)

    def call():
        a = before * 2  # 1 MiB
        b = a + 1  # 2 MiB
        del a
        c = torch.cat([b, b])  # 3 MiB, of which 2 stay
        del b
        return c

    call()
    peak = memory.peak_bytes(call, CPU)
    assert 3 * MIB <= peak < 3 * MIB + 4096
    assert memory.peak_bytes(call, CPU) == peak


def test_peak_counts_what_autograd_keeps_and_gradients():
    x = torch.ones(MIB // 4, requires_grad=True)

    def call():
        # exp keeps its result (1 MiB), sin keeps its input, which is the same; sin's result is kept by exp.
        torch.autograd.grad(x.exp().sin().exp().sum(), x)

    call()
    # Three results alive, then the gradients: of sum an expanded scalar, of the last exp 1 MiB, of sin a
    # cosine and its product, while what each step no longer needs is freed.
    peak = memory.peak_bytes(call, CPU)
    assert 4 * MIB <= peak <= 5 * MIB + 4096


def test_peak_sees_inside_an_operation():
    q = torch.randn(1, 1, 512, 8)

    def literal():
        return (q @ q.mT).softmax(dim=-1) @ q

    literal()
    assert memory.peak_bytes(literal, CPU) >= 2 * MIB  # scores and weights, 512 x 512 floats each
    compact = memory.peak_bytes(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q), CPU)
    assert q.nbytes <= compact < MIB


# --- gate


def values(**changes):
    tensors = {"out": torch.randn(64), "d x": torch.randn(64), "assignment": torch.arange(64)}
    return tensors | changes


def test_gate_passes_what_agrees_and_names_what_does_not():
    exact = values()
    close = {name: x * (1 + 1e-6) if x.is_floating_point() else x for name, x in exact.items()}
    assert gate.passes(close, exact, {}, 1e-4).error == pytest.approx(1e-6, rel=0.2)
    wrong = close | {"d x": exact["d x"] + 0.01}
    with pytest.raises(gate.GateError, match="d x: relative RMS"):
        gate.passes(wrong, exact, {}, 1e-4)
    with pytest.raises(gate.GateError, match="out: not finite"):
        gate.passes(close | {"out": exact["out"] / 0}, exact, {}, 1e-4)
    with pytest.raises(gate.GateError, match="out: expected"):
        gate.passes(close | {"out": exact["out"][:3]}, exact, {}, 1e-4)
    with pytest.raises(gate.GateError, match="expected"):
        gate.passes({"out": exact["out"]}, exact, {}, 1e-4)


def test_gate_counts_flips():
    exact = values()
    flipped = exact | {"assignment": exact["assignment"].flip(0)}
    with pytest.raises(gate.GateError, match="64 assignments differ, allowed 10"):
        gate.passes(flipped, exact, {}, 1e-4, flips_allowed=10)
    assert gate.passes(flipped, exact, {}, 1e-4, flips_allowed=64).flips == 64
    only = {"labels": torch.arange(3)}
    assert gate.passes(only, only, {}, 0.0).flips == 0


def test_gate_allows_twice_the_twins_own_error_and_no_more():
    exact = values()
    off = exact | {"out": exact["out"] * 1.1}
    assert gate.passes(off, exact, {"out": 0.06}, 1e-4).allowed == pytest.approx(0.12)
    with pytest.raises(gate.GateError):
        gate.passes(off, exact, {"out": 0.04}, 1e-4)
    with pytest.raises(gate.GateError):  # whatever the twin's own error
        gate.passes(exact | {"out": exact["out"] * 1.6}, exact, {"out": 9.0}, 1e-4)


def test_gradient_of_pure_rounding_has_no_scale_of_its_own():
    exact = values() | {"d zero": torch.full((64,), 1e-9)}
    found = gate.errors(exact | {"d zero": torch.full((64,), -1e-9)}, exact)
    assert found["d zero"] < 1e-4


def comparison(*names, broken=()):
    x = torch.ones(8)

    def rival(name):
        def make():
            if name == "absent":
                raise rivals.Unavailable("has no such thing here")
            result = {"out": x * (2 if name in broken else 1)}
            return rivals.Rival(lambda _: x + 1, lambda: result)

        return make

    makers = {name: rival(name) for name in names}
    return rivals.compare(makers, lambda: {"out": x}, rivals.Plan(1e-4, rounds=3, seconds=0.0))


def test_a_red_gate_is_not_timed_and_the_others_are():
    results = comparison("reference", "absent", "fast", broken=("fast",))
    assert len(results["reference"].samples) == 3
    assert isinstance(results["absent"], rivals.Unavailable)
    assert isinstance(results["fast"], gate.GateError)


# --- clock


def test_rivals_take_turns():
    order = []
    calls = {name: (lambda _, name=name: order.append(name)) for name in "ABC"}
    samples = timing.interleaved(calls, CPU, rounds=3, seconds=0.0)
    assert order[-9:] == list("ABCABCABC")
    assert {name: len(found) for name, found in samples.items()} == dict.fromkeys("ABC", 3)


def test_pytest_benchmark_gets_the_measured_times():
    class Benchmark:
        def pedantic(self, target, rounds):
            self.durations = []
            for _ in range(rounds):
                begin = timing.measured_seconds()
                target()
                self.durations.append(timing.measured_seconds() - begin)

    benchmark = Benchmark()
    timing.play(benchmark, [0.5, 0.25, 2.0])
    assert benchmark.durations == pytest.approx([0.5, 0.25, 2.0])


# --- counts and floors


def test_attention_counts_the_same_in_both_paths():
    from segclip_fast.ops import attention
    from segclip_fast.ops._dispatch import force

    q, k, v = (torch.randn(2, 33, 4, 8, requires_grad=True) for _ in range(3))
    found = {}
    for backend in ("reference", "fused"):
        with force(backend):
            with counts.counted() as forward:
                out = attention(q, k, v)
            with counts.counted() as backward:
                out.sum().backward()
        found[backend] = forward.get_total_flops(), backward.get_total_flops()
    assert found["reference"][0] == found["fused"][0] == 2 * 2 * (2 * 4 * 33 * 33 * 8)
    assert found["fused"][1] * 4 == found["reference"][1] * 5  # scores again instead of kept


def test_group_assign_formulas_are_what_its_operations_do():
    from segclip_fast.ops import group_assign, group_assign_fused

    B, N, L, D, W = 2, 20, 4, 12, 3
    sizes = [(B, L, D), (B, N, D), (D, W), (D,), (D,), (D, W)]
    operands = [torch.randn(size, requires_grad=True) for size in sizes]
    with counts.counted() as by_formula:
        found = group_assign(*operands, tau=0.9)
    with counts.counted() as backward_by_formula:
        (found.pooled.sum() + found.hard.square().sum()).backward()
    plain = [x.detach() for x in operands]
    with counts.counted() as inside:
        outputs = group_assign_fused.forward(plain, None, 0.9)
    grads = [torch.ones_like(x) for x in outputs[:3]]
    with counts.counted() as backward_inside:
        group_assign_fused.backward(grads, plain, outputs[1:], 0.9)
    assert by_formula.get_total_flops() == inside.get_total_flops() > 0
    assert backward_by_formula.get_total_flops() == backward_inside.get_total_flops() > 0


def test_an_operation_without_formula_is_an_error(monkeypatch):
    from segclip_fast.ops import superpixel_kl

    known = {name: formula for name, formula in counts.FORMULAS.items() if "superpixel" not in name}
    monkeypatch.setattr(counts, "FORMULAS", known)
    labels, assignment = torch.zeros(1, 4, dtype=torch.int64), torch.randn(1, 4, 3)
    with pytest.raises(counts.UncountedError, match="superpixel_kl"), counts.counted():
        superpixel_kl(labels, assignment)


def test_moved_bytes_of_a_chain_by_hand():
    x = torch.ones(1000)
    assert counts.moved_bytes(lambda: (x + 1).view(10, 100).exp()) == 4 * 4000
    row = torch.ones(1, 100)
    assert counts.moved_bytes(lambda: row.expand(10, 100) + 0) == 400 + 4000  # repeated rows are read once


def test_floors_by_hand():
    kl = floors.superpixel_kl({"B": 2, "N": 3, "L": 4}, 4, backward=False)
    assert kl.bytes == 2 * 3 * 4 * 4 + 2 * 3 * 8
    shape = {"B": 1, "T": 2, "S": 3, "H": 1, "d": 4}
    assert floors.attention(shape, 4, backward=False).bytes == (2 * 2 * 4 + 2 * 3 * 4) * 4
    causal = floors.attention(shape | {"S": 2, "causal": 1}, 4, backward=False)
    packed = floors.attention_packed({"total": 2, "pairs": 3, "H": 1, "d": 4}, 4, backward=False)
    assert causal == packed
    for name, floor in floors.FLOORS.items():
        if name.startswith("group"):
            sizes = {"B": 1, "N": 8, "L": 2, "D": 4, "W": 2}
            assert floor(sizes, 4, True).bytes > 2 * floor(sizes, 4, False).bytes - 8 * 4 * 4


# --- captions


def test_stored_token_ids_are_the_tokenizers():
    pytest.importorskip("open_clip")
    from segclip_fast.config import TextConfig
    from segclip_fast.data.tokenizer import tokenizer_for

    ids = tokenizer_for(TextConfig())(captions.CAPTIONS, 32)
    assert [tuple(row[row > 0].tolist()) for row in ids] == list(captions.TOKENS)
    assert len({len(row) for row in captions.TOKENS}) > 5
