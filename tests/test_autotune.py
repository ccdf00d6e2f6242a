"""Choosing a kernel by time: remembered, checked, switchable; with fake kernels and a fake clock."""

from __future__ import annotations

import pytest
import torch
from test_attention import Softmaxes, fail, no_choices, timer  # noqa: F401

from segclip_fast.ops import _autotune
from segclip_fast.ops._autotune import Candidate, pick


def fake(name, factor=2.0, refusal=None, run=None):
    return Candidate(name, run or (lambda x: x * factor), lambda x: refusal)


def test_fastest_is_remembered_per_key():
    candidates = [fake("a"), fake("b"), fake("c")]
    x = {"x": torch.randn(4)}
    assert pick("op", 1, candidates, x, timer(3.0, 1.0, 2.0)).name == "b"
    assert pick("op", 1, candidates, x, timer()).name == "b"
    assert pick("op", 2, candidates, x, timer(1.0, 3.0, 2.0)).name == "a"
    assert pick("other", 1, candidates, x, timer(3.0, 2.0, 1.0)).name == "c"
    assert [(c.op, c.winner.name) for c in _autotune.chosen()] == [("op", "b"), ("op", "a"), ("other", "c")]
    _autotune.forget()
    assert pick("op", 1, candidates, x, timer(1.0, 3.0, 2.0)).name == "a"


def test_noise_does_not_move_the_choice():
    x = {"x": torch.randn(4)}
    assert pick("op", 1, [fake("a"), fake("b")], x, timer(1.02, 1.0)).name == "a"
    assert pick("op", 2, [fake("a"), fake("b")], x, timer(1.05, 1.0)).name == "b"


def test_candidates_that_refuse_fail_or_are_wrong_are_out_with_a_reason():
    candidates = [
        fake("refuses", refusal="takes float16"),
        fake("raises", run=fail),
        fake("infinite", factor=torch.inf),
        fake("right"),
        fake("wrong", factor=2.1),
        fake("gradient", run=lambda x: (2 * x).detach() + 0 * x),
    ]
    x = {"x": torch.randn(4, requires_grad=True)}
    assert pick("op", 1, candidates, x, timer(5.0)).name == "right"
    (choice,) = _autotune.chosen()
    assert choice.milliseconds == {"right": 5.0}
    assert choice.reasons == {
        "refuses": "takes float16",
        "raises": "failed: MemoryError: out of memory",
        "infinite": "wrong: its result is not finite",
        "wrong": "wrong: its result differs by 5.0e-02, allowed 5e-03",
        "gradient": "wrong: its result differs by 1.0e+00, allowed 5e-03",
    }
    text = str(choice)
    assert text.startswith("op (x (4,) float32 with gradient): right [right 5.000 ms; refuses: takes float16")


def test_shape_counts():
    candidates = [fake("a"), fake("shape", run=lambda x: 2 * x[:2])]
    assert pick("op", 1, candidates, {"x": torch.randn(4)}, timer(2.0)).name == "a"
    assert _autotune.chosen()[0].reasons["shape"] == "wrong: its result has shape (2,), not (4,)"


def test_gradients_count_only_where_needed():
    candidates = [fake("a"), fake("gradient", run=lambda x: (2 * x).detach() + 0 * x)]
    with torch.no_grad():
        x = {"x": torch.randn(4, requires_grad=True)}
        assert pick("op", 1, candidates, x, timer(2.0, 1.0)).name == "gradient"


def test_nothing_works_is_remembered_too():
    assert pick("op", 1, [fake("a", run=fail), fake("b", refusal="no")], {"x": torch.ones(2)}) is None
    assert pick("op", 1, [fake("a")], {"x": torch.ones(2)}, timer()) is None
    assert "PyTorch's own choice [a: failed: MemoryError" in str(_autotune.chosen()[0])


def test_switched_off_takes_the_first_that_accepts(monkeypatch):
    candidates = [fake("a", refusal="no"), fake("b"), fake("c")]
    x = {"x": torch.randn(4)}
    monkeypatch.setenv(_autotune.SWITCH, "0")
    assert pick("op", 1, candidates, x, timer()).name == "b"
    assert _autotune.chosen()[0].reasons == {"a": "no"}
    monkeypatch.setenv(_autotune.SWITCH, "1")
    assert pick("op", 1, candidates, x, timer(2.0, 1.0)).name == "c"
    monkeypatch.setenv(_autotune.SWITCH, "yes")
    with pytest.raises(ValueError, match="SEGCLIP_FAST_AUTOTUNE: expected 0 or 1, got 'yes'"):
        pick("op", 1, candidates, x)


def test_signature_tells_kinds_apart():
    q = torch.zeros(2, 3, 4, 8)
    others = [q[:1], q.half(), q.transpose(-1, -2), q.clone().requires_grad_(), q.to("meta")]
    assert len({_autotune.signature(x) for x in (q, *others)}) == 6
    assert _autotune.signature(q) == _autotune.signature(q.clone())
    assert _autotune.signature(q, skip=1) == _autotune.signature(q[:1], skip=1)


def test_only_plain_eager_cuda_calls_are_tuned(monkeypatch):
    q = torch.randn(1, 2, 1, 8)
    assert not _autotune.applies(q)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert _autotune.applies(q)
    assert not torch.func.vmap(_autotune.applies, out_dims=None)(q)
    with Softmaxes():
        assert not _autotune.applies(q)
    for switch in ("are_deterministic_algorithms_enabled", "cuda.is_current_stream_capturing"):
        with monkeypatch.context() as patch:
            patch.setattr(f"torch.{switch}", lambda: True)
            assert not _autotune.applies(q)
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert not _autotune.applies(q)
