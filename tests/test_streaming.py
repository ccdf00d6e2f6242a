"""The measurement of the loader: pairs, gate, a smoke run; likewise that of the training loop."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("needs the repository", allow_module_level=True)
pytest.importorskip("skimage")
pytest.importorskip("open_clip")
sys.path.insert(0, str(ROOT / "benchmarks"))

import streaming  # noqa: E402
from harness import pairs, tokens  # noqa: E402
from harness.captions import CAPTIONS  # noqa: E402
from reporting.streaming import streaming_tables  # noqa: E402

from segclip_fast.config import DataConfig, SegCLIPConfig, TextConfig  # noqa: E402
from segclip_fast.data import pipeline  # noqa: E402
from segclip_fast.data.mixture import Synthetic  # noqa: E402
from segclip_fast.data.shards import ShardSource  # noqa: E402
from segclip_fast.data.tokenizer import tokenizer_for  # noqa: E402

SMALL = pairs.Sizes("web", 240, 320, 90)
STAGES = {"read", "crop", "superpixels", "tokens", "all"}


# --- the pairs


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return pairs.write_shards(tmp_path_factory.mktemp("pairs"), SMALL, 12, shards=2, processes=2)


def test_pairs_are_readable_and_of_the_asked_sizes(written):
    source = ShardSource(written.pattern)
    assert len(source) == written.pairs == 12
    assert len(source.shards) == 2
    samples = [source[index] for index in range(12)]
    assert all(min(sample.image.shape[:2]) == 240 for sample in samples)
    assert all(max(sample.image.shape[:2]) <= 320 for sample in samples)
    assert len({sample.image.shape for sample in samples}) > 2
    assert {sample.caption for sample in samples} <= set(CAPTIONS)
    assert written.pixels == np.mean([sample.image[..., 0].size for sample in samples])


def test_pairs_are_the_same_every_time_and_no_two_alike(written, tmp_path):
    again = pairs.write_shards(tmp_path, SMALL, 12, shards=2)
    for first, second in zip(
        ShardSource(written.pattern).shards, ShardSource(again.pattern).shards, strict=True
    ):
        assert Path(first).read_bytes() == Path(second).read_bytes()
    source = ShardSource(written.pattern)
    assert len({source[index].image.tobytes() for index in range(12)}) == 12
    with pytest.raises(ValueError, match="pairs: expected a multiple of 5 shards, got 12"):
        pairs.write_shards(tmp_path, SMALL, 12, shards=5)


def test_equal_pictures_are_refused(monkeypatch, tmp_path):
    same = pairs.draw_picture(SMALL, np.random.default_rng(0))
    monkeypatch.setattr(pairs, "draw_picture", lambda sizes, rng: same)
    with pytest.raises(AssertionError, match="two pictures are the same"):
        pairs.write_shards(tmp_path, SMALL, 2)


def test_stored_tokens_are_the_tokenizers(monkeypatch, written):
    made = Synthetic(200, 8)
    texts = [*CAPTIONS, *(made[index].caption for index in range(200))]
    expected = tokenizer_for(TextConfig())(texts, 32)
    assert torch.equal(tokens.StoredTokenizer()(texts, 32), expected)
    with pytest.raises(ValueError, match="expected captions whose tokens are stored, got 'A cat'"):
        tokens.StoredTokenizer()(["A cat"])

    def prepared():
        data, model = DataConfig("webdataset", written.pattern), SegCLIPConfig()
        return pipeline.PairDataset(ShardSource(written.pattern), data, model, 0, superpixels=False)

    with tokens.tokenizer_at_hand() as name:
        assert name == "open_clip"
        expected = [prepared()[position].tokens for position in range(5)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with tokens.tokenizer_at_hand() as name:
        assert name == "stored"
        assert isinstance(prepared().tokenize, tokens.StoredTokenizer)
        for position, ids in enumerate(expected):
            assert torch.equal(prepared()[position].tokens, ids)
    assert pipeline.tokenizer_for is tokenizer_for


# --- the script


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """What a run of 40 small pairs stores; all but one way on 20, both training runs with the small model."""
    whole = streaming.runs

    def runs(workers):
        small = whole(workers)[0].config
        return [dataclasses.replace(each, config=small, batch=10) for each in whole(workers)]

    output = tmp_path_factory.mktemp("streaming") / "streaming.json"
    with pytest.MonkeyPatch.context() as patch:
        variants = [
            each if each.name == "float64" else dataclasses.replace(each, pairs=20)
            for each in streaming.VARIANTS
        ]
        patch.setattr(streaming, "VARIANTS", variants)
        patch.setattr(streaming, "WEB", SMALL)
        patch.setattr(streaming, "runs", runs)
        streaming.main(["--pairs", "40", "--workers", "1", "--output", str(output)])
    return json.loads(output.read_text())


def test_smoke_run_measures_everything(smoke):
    assert {"commit", "versions", "cpu", "cores", "workers", "setting", "command"} <= smoke.keys()
    assert [one["name"] for one in smoke["sets"]] == ["web", "resized"]
    for one in smoke["sets"]:
        rows = {row["superpixels"]: row for row in one["rows"]}
        assert list(rows) == [
            *("scikit-image", "scikit-image, stored picture", "float64", "float32"),
            *(f"float64, stored picture, cache, pass {number}" for number in (1, 2)),
            "on the device",
        ]
        assert [row["pairs"] for row in one["rows"]] == [20, 20, 40, 20, 20, 20, 20]
        for name, row in rows.items():
            spent = row["worker_ms_per_pair"]
            assert spent.keys() == STAGES
            assert spent["all"] == pytest.approx(sum(spent.values()) / 2)
            share = row["superpixel_share_of_worker"]
            assert share < 0.05 if name == "on the device" else 0.05 < share < 1
            assert 0 < row["workers_busy"] <= 1
    assert [row["expected"] for row in smoke["training"]] == ["data", "compute"]
    for row in smoke["training"]:
        assert row["bound_by"] in ("data", "compute", "communication")
        assert sum(row["shares"].values()) == pytest.approx(1)
        assert row["steps"] == 2  # of four, two of which warm up
    assert "| web | float64 | 40 |" in streaming_tables(smoke)


def test_the_gate_compares_labels(monkeypatch, written, tmp_path):
    streaming.check(written, tmp_path / "cache")
    assert len(list((tmp_path / "cache").rglob("*.png"))) == streaming.CHECKED
    whole = streaming.Skimage.__call__
    monkeypatch.setattr(streaming.Skimage, "__call__", lambda self, picture: whole(self, picture) + 1)
    with pytest.raises(AssertionError):
        streaming.check(written, tmp_path / "cache")


def test_what_bounds_the_loader(written):
    dataset = streaming.opened(streaming.Variant("", 12), written, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "BATCH", 6)
        patch.setattr(streaming, "BUSY", 2.0)
        assert streaming.stream(dataset, 12)["bound_by"] == "handing over"
        patch.setattr(streaming, "BUSY", 0.0)
        spent = streaming.stream(dataset, 12)
    slowest = max(STAGES - {"all"}, key=lambda stage: spent["worker_ms_per_pair"][stage])
    assert spent["bound_by"] == slowest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pairs", "30"], "pairs: expected a multiple of 20, got 30"),
        (["--workers", "0"], "workers: expected at least 1, got 0"),
        (["--pairs", "40"], "another --output than the stored results, which are of 10000 pairs"),
    ],
)
def test_script_refuses(arguments, message, capsys):
    with pytest.raises(SystemExit):
        streaming.main(arguments)
    assert message in capsys.readouterr().err


def test_models_of_the_training_runs():
    small, large = (each.config for each in streaming.runs(2))
    assert small.vision.image_size == large.vision.image_size == 224
    assert all(each.batch < each.pairs for each in streaming.runs(2))


# --- the loop's benchmark


@pytest.mark.slow
def test_smoke_run_of_the_loops_benchmark(tmp_path):
    environment = {**os.environ, "SEGCLIP_BENCH_SMOKE": "1", "SEGCLIP_BENCH_DEVICE": "cpu"}
    file = tmp_path / "benchmarks.json"
    command = [sys.executable, "-m", "pytest", "benchmarks/bench_training.py", "--benchmark-only"]
    command += [f"--benchmark-json={file}"]
    subprocess.run(command, check=True, cwd=ROOT, env=environment)
    entries = [item["extra_info"] for item in json.loads(file.read_text())["benchmarks"]]
    assert [entry["size"] for entry in entries] == [
        "ViT-B/16, B 2",
        "ViT-B/16, B 2",
        "ViT-B/16, B 4 as 2 x 2",
    ]
    assert [entry["source"] for entry in entries] == ["synthetic", "shards", "synthetic"]
    for entry in entries:
        assert entry["gate"]["error"] < 1e-4
        assert entry["throughput"]["steps"] == 2
        assert entry["mfu"]["data sheet"] is None
