"""The README tells the truth: its example runs, its links lead somewhere, its commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from PIL import Image

from segclip_fast import SegCLIP
from segclip_fast.config import scenes_tiny
from segclip_fast.data.scenes import make_scene

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_example_runs(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    SegCLIP(scenes_tiny()).save_pretrained(tmp_path / "demo/run/model")
    Image.fromarray(make_scene(3).image).save(tmp_path / "demo/scene.png")
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(example.splitlines()) <= 8
    exec(compile(example, "README.md", "exec"), {})
    assert "coral" in capsys.readouterr().out
    assert Image.open(tmp_path / "overlay.png").width >= 64


def test_links_lead_somewhere():
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    local = [target for target in targets if not target.startswith("http")]
    assert len(local) > 10
    for target in local:
        assert (ROOT / target).exists(), target


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"(?:^|`)make ([a-z-]+)", README, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
