"""The demonstration: writes what it says and refuses to replace anything."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from segclip_fast import SegCLIP, quickstart
from segclip_fast.data.scenes import SceneSource


@pytest.fixture(scope="module")
def demonstration(tmp_path_factory):
    output = tmp_path_factory.mktemp("demo") / "demo"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quickstart, "HELD_OUT", 8)
        assert quickstart.main(["--output", str(output), "--steps", "2"]) == 0
    return output


def test_writes_report_and_pictures(demonstration, capsys):
    report = json.loads((demonstration / "report.json").read_text())
    assert report["steps"] == 2
    assert set(report["results"]) == {"untrained", "chance", "plain", "snapped"}
    for result in report["results"].values():
        assert 0 <= result["miou"] <= 1
    for name in ("grid.png", "curve.png", "scene.png"):
        assert np.asarray(Image.open(demonstration / name).convert("RGB")).std() > 5, name
    assert SegCLIP.from_pretrained(demonstration / "run" / "model").config.vision.image_size == 64
    quickstart.print_table(report)
    assert "snapped" in capsys.readouterr().out


def test_refuses_to_replace(demonstration, capsys):
    before = (demonstration / "report.json").read_bytes()
    assert quickstart.main(["--output", str(demonstration), "--steps", "2"]) == 2
    assert "error: output: expected an empty folder" in capsys.readouterr().err
    assert (demonstration / "report.json").read_bytes() == before


def test_chance_is_low():
    assert quickstart.chance(SceneSource(30, size=32), 0).miou < 0.12
