"""The info command names every op, and what is missing."""

from __future__ import annotations

import importlib.metadata

import torch

from segclip_fast import info


def test_report(capsys):
    assert info.main() == 0
    text = capsys.readouterr().out
    for name in ("attention / fused", "group_assign / reference", "superpixel_kl / fused", "_C", "open_clip"):
        assert name in text


def test_missing_packages_say_how_to_get_them(monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    rows = {row.name: row for row in info.packages()}
    assert not rows["xformers"].works
    assert "pip install xformers" in rows["xformers"].detail


def test_refusals_have_reasons():
    rows = info.backends(torch.device("meta"))
    refused = [row for row in rows if not row.works]
    assert refused
    assert all("meta" in row.detail for row in refused)
