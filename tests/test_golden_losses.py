"""The first steps of training give the stored losses, by both paths; `golden_losses.py` says which.

50 steps in float64, 30 of them in float32 as everyone trains: why so is said there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json

import pytest
from golden_losses import (
    FILE,
    MARGIN,
    SINGLE,
    STEPS,
    TERMS,
    curve,
    deviation,
    double,
    seen,
    settings,
    stored,
)

from segclip_fast.training import preparing

TOLERANCE = 1e-4  # absolute, of the total and of every term at every step
PATHS = ("auto", "reference")


def trained(folder, double_precision):
    """By path: the curve, and the hash of what it was trained on."""
    found = {}
    for path in PATHS:
        with seen() as data, double() if double_precision else contextlib.nullcontext():
            losses = curve(settings(folder / path, path), STEPS if double_precision else SINGLE)
        found[path] = losses, data.hexdigest()
    return found


def assert_stored(path, losses, note=""):
    for name in TERMS:
        for step, (found, expected) in enumerate(zip(losses[name], stored()[name], strict=False), start=1):
            difference = abs(found - expected)
            assert difference <= TOLERANCE, f"{path}: {name} of step {step}: {difference:.1e} off{note}"


def test_fifty_steps_in_float64(tmp_path):
    found = trained(tmp_path, double_precision=True)
    for path, (losses, data) in found.items():
        same = data == json.loads(FILE.read_text())["data_sha256"]
        note = "" if same else "; pictures, labels or tokens differ too (another processor or NumPy?)"
        assert [len(losses[name]) for name in TERMS] == [STEPS] * len(TERMS)
        assert_stored(path, losses, note)
    (fast, fast_data), (reference, reference_data) = (found[path] for path in PATHS)
    assert fast_data == reference_data
    assert deviation(fast, reference) <= 1e-9


def test_thirty_steps_in_float32(tmp_path):
    found = trained(tmp_path, double_precision=False)
    for path, (losses, _) in found.items():
        assert [len(losses[name]) for name in TERMS] == [SINGLE] * len(TERMS)
        assert_stored(path, losses)
    (fast, _), (reference, _) = (found[path] for path in PATHS)
    assert deviation(fast, reference) <= TOLERANCE


def test_the_file_is_whole():
    content = json.loads(FILE.read_text())
    assert content["closest_tie"] >= MARGIN
    losses = content["losses"]
    assert tuple(losses) == TERMS
    weights = dict(zip(TERMS[1:], (1, 1, 0.1), strict=True))
    for step in range(STEPS):
        total = sum(weight * losses[name][step] for name, weight in weights.items())
        assert losses["total"][step] == pytest.approx(total, abs=1e-12)
    assert losses["total"][-1] < losses["total"][0] - 0.5  # it learns


def replaced(config, **changes):
    """`config` with changed fields, those of its parts as optim__warmup."""
    for name, value in changes.items():
        part, _, rest = name.partition("__")
        value = replaced(getattr(config, part), **{rest: value}) if rest else value
        config = dataclasses.replace(config, **{part: value})
    return config


# Small changes, and the steps in which they show.
MUTATIONS = {
    "kl_form": ({"loss__kl_form": "official"}, 1),
    "warmup": ({"optim__warmup": 0.16}, 5),
    "tau": ({"model__grouping__tau": 0.91}, 8),
    "beta": ({"optim__betas": (0.9, 0.99)}, 10),
    "decay": ({"optim__weight_decay": 0.1}, 25),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_small_change_shows(tmp_path, name):
    changes, steps = MUTATIONS[name]
    losses = curve(replaced(settings(tmp_path / "run"), **changes), steps)
    assert deviation(losses, stored()) > 3 * TOLERANCE


def test_another_epsilon_of_one_norm_shows(tmp_path, monkeypatch):
    """Of one whose input has little variance, like the centers and the embeddings."""
    initial = preparing.initial_model

    def changed(config):
        model = initial(config)
        model.vision.grouping.blocks[0].norm_keys.eps = 1e-6
        return model

    monkeypatch.setattr(preparing, "initial_model", changed)
    assert deviation(curve(settings(tmp_path / "run"), 1), stored()) > 3 * TOLERANCE
