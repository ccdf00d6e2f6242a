"""The info command names every op and kernel, and what is missing."""

from __future__ import annotations

import importlib.metadata
import sys

import pytest
import torch

from segclip_fast import info
from segclip_fast.ops import _autotune


def test_report(capsys):
    assert info.main() == 0
    text = capsys.readouterr().out
    for name in ("attention / fused", "group_assign / reference", "superpixel_kl / fused", "_C", "open_clip"):
        assert name in text
    for name in ("attention: cudnn", "attention: xformers", "attention_packed: varlen", _autotune.SWITCH):
        assert name in text


def test_missing_packages_say_how_to_get_them(monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    rows = {row.name: row for row in info.packages()}
    assert not rows["xformers"].works
    assert "pip install xformers" in rows["xformers"].detail


@pytest.mark.parametrize("table", [info.backends, info.kernels])
def test_refusals_have_reasons(table):
    rows = table(torch.device("meta"))
    refused = [row for row in rows if not row.works]
    assert refused
    assert all("meta" in row.detail for row in refused)


def test_report_without_optional_packages(monkeypatch, capsys):
    for name in ("xformers", "xformers.ops", "triton", "open_clip", "segclip_fast._C"):
        monkeypatch.setitem(sys.modules, name, None)
    assert info.main() == 0
    assert "build it with" in capsys.readouterr().out


def test_choices_are_printed_and_the_switch(monkeypatch, capsys):
    _autotune.forget()
    kernel = _autotune.Candidate("quick", lambda x: x, lambda x: None)
    _autotune.pick("attention", 1, [kernel], {"x": torch.ones(3)}, lambda call: 1.5)
    info.main()
    text = capsys.readouterr().out
    assert "attention (x (3,) float32): quick [quick 1.500 ms]" in text
    assert f"({_autotune.SWITCH}): on" in text
    monkeypatch.setenv(_autotune.SWITCH, "0")
    info.main()
    assert f"({_autotune.SWITCH}): off" in capsys.readouterr().out
    _autotune.forget()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_gpu_the_report_holds_choices(capsys):
    _autotune.forget()
    assert info.main() == 0
    text = capsys.readouterr().out
    assert text.count("  attention (q (32,") == 4  # patches and captions, without and with gradient
    assert text.count("  attention_packed (q (384,") == 2
