import pickle
import re
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest

from segclip_fast.data import materials
from segclip_fast.data.scenes import MATERIALS, SceneSource, caption_vocabulary, make_scene

SCENES = [make_scene(seed) for seed in range(400)]


def _words(text):
    return re.findall(r"[^\W_]+", text.lower())


def test_materials_are_single_unique_words():
    assert len(MATERIALS) >= 14
    assert len(set(MATERIALS)) == len(MATERIALS)
    assert all(re.fullmatch("[a-z]+", name) for name in MATERIALS)


def test_types_shapes_and_ranges():
    for scene in SCENES:
        assert scene.image.shape == (64, 64, 3)
        assert scene.image.dtype == np.uint8
        assert scene.image.flags.c_contiguous
        assert scene.mask.shape == (64, 64)
        assert scene.mask.dtype == np.int64
        assert len(scene.content) in (2, 3)


def test_mask_content_and_caption_agree():
    for scene in SCENES:
        assert {MATERIALS[label] for label in np.unique(scene.mask)} == set(scene.content)
        assert set(scene.mentioned) <= set(scene.content)
        named = [word for word in _words(scene.caption) if word in MATERIALS]
        assert sorted(named) == sorted(scene.mentioned)
        assert 1 <= len(named) <= 3


def test_every_blob_has_its_size():
    for scene in SCENES:
        shares = np.array([(scene.mask == MATERIALS.index(name)).mean() for name in scene.content])
        assert (shares[:-1] >= 0.12).all()
        assert (shares[:-1] <= 0.40).all()
        assert shares[-1] >= 0.4  # the background is last


def test_mask_is_pixel_exact(monkeypatch):
    """With every material painted in one flat colour, the picture is the mask."""

    def flat(material, rng):
        return np.full((materials.LEVELS, 3), 10 * MATERIALS.index(material.name) + 5, np.uint8)

    monkeypatch.setattr(materials.Material, "render_ramp", flat)
    for seed in range(30):
        scene = make_scene(seed)
        assert np.array_equal(scene.image, np.repeat(10 * scene.mask[:, :, None] + 5, 3, axis=2))


def test_caption_mix():
    counts = Counter(len(scene.mentioned) for scene in SCENES)
    assert 0.22 < counts[1] / len(SCENES) < 0.38
    assert counts[2] > 80
    assert counts[3] > 40
    assert any(re.fullmatch(r"a photo of a \w+", scene.caption) for scene in SCENES)
    assert {name for scene in SCENES for name in scene.content} == set(MATERIALS)


def test_on_means_on():
    """ "X on Y" is said of a background Y only."""
    said = 0
    for scene in SCENES:
        match = re.search(r" (?:on|in front of) (\w+)$", scene.caption)
        if match:
            said += 1
            assert match.group(1) == scene.content[-1]
    assert said > 30


def test_vocabulary_covers_captions_and_prompts():
    vocabulary = caption_vocabulary()
    assert len(set(vocabulary)) == len(vocabulary)
    texts = [scene.caption for scene in SCENES] + [f"a photo of a {name}." for name in MATERIALS]
    assert {word for text in texts for word in _words(text)} == set(vocabulary)


def test_same_seed_same_bytes_in_another_process():
    code = (
        "import sys, hashlib; from segclip_fast.data.scenes import make_scene\n"
        "s = make_scene(12345)\n"
        "print(hashlib.sha256(s.image.tobytes() + s.mask.tobytes() + s.caption.encode()).hexdigest())"
    )
    runs = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout for _ in "ab"
    }
    assert len(runs) == 1
    first, second = make_scene(12345), make_scene(12345)
    assert np.array_equal(first.image, second.image)
    assert not np.array_equal(first.image, make_scene(12346).image)


def test_order_of_access_does_not_matter():
    source = SceneSource(10, seed=3)
    forwards = [source[i].image for i in range(10)]
    backwards = [source[i].image for i in reversed(range(10))][::-1]
    assert all(np.array_equal(a, b) for a, b in zip(forwards, backwards, strict=True))


@pytest.mark.parametrize("seed", range(6))
def test_same_scene_at_every_size(seed):
    small, large = make_scene(seed), make_scene(seed, size=192)
    assert small.caption == large.caption
    assert (large.mask[1::3, 1::3] == small.mask).mean() > 0.99
    error = np.abs(large.image[1::3, 1::3].astype(int) - small.image).mean()
    assert error < 4


def test_splits_and_seeds_are_disjoint():
    def fingerprints(**kwargs):
        source = SceneSource(50, **kwargs)
        return {scene.image.tobytes() for scene in (source[i] for i in range(50))}

    groups = [fingerprints(seed=seed, split=split) for seed in (0, 1) for split in ("train", "val")]
    assert len(set.union(*groups)) == 200


def test_source_is_a_sequence():
    source = SceneSource(3, size=32)
    assert len(source) == 3
    assert source.class_names == MATERIALS
    assert len(list(source)) == 3
    assert source[0].image.shape == (32, 32, 3)
    assert np.array_equal(source[-1].image, source[2].image)
    assert np.array_equal(source[np.int64(1)].image, pickle.loads(pickle.dumps(source))[1].image)
    for index in (3, -4):
        with pytest.raises(IndexError, match="index: expected 0 to 2, got"):
            source[index]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"length": 0}, "length: expected 1 to"),
        ({"length": 2, "seed": -1}, "seed: expected a non-negative integer, got -1"),
        ({"length": 2, "size": 8}, "size: expected 16 to 1024 pixels, got 8"),
        ({"length": 2, "split": "test"}, "split: expected one of"),
    ],
)
def test_source_refuses(kwargs, message):
    with pytest.raises(ValueError, match=message):
        SceneSource(**kwargs)


def test_make_scene_refuses():
    with pytest.raises(ValueError, match="seed: expected a non-negative integer"):
        make_scene(-1)
    with pytest.raises(ValueError, match="size: expected 16 to 1024"):
        make_scene(0, size=2000)
    with pytest.raises(TypeError):
        make_scene(1.5)


def test_one_patch_is_enough_to_recognise_a_material():
    """Nearest neighbours on colour and texture statistics of single 8 x 8 patches, over unseen instances."""

    def patches(stream):
        features, labels = [], []
        for label, material in enumerate(materials.BY_NAME.values()):
            for instance in range(24):
                rng = np.random.default_rng([stream, label, instance])
                levels = material.render_levels(materials.canvas(64), rng)
                image = material.render_ramp(rng)[levels].astype(np.float32) / 255
                blocks = image.reshape(8, 8, 8, 8, 3).swapaxes(1, 2).reshape(64, 8, 8, 3)[::5]
                flat = np.sort(blocks.reshape(len(blocks), 64, 3), axis=1)[:, 3::8]
                steps = [np.abs(np.diff(blocks, axis=a)).mean(axis=(1, 2)) for a in (1, 2)]
                features.append(
                    np.concatenate([flat.reshape(len(blocks), -1), *(4 * s for s in steps)], axis=1)
                )
                labels.append(np.full(len(blocks), label))
        return np.concatenate(features), np.concatenate(labels)

    train, train_labels = patches(0)
    test, test_labels = patches(1)
    distance = (test**2).sum(1)[:, None] - 2 * test @ train.T + (train**2).sum(1)
    correct = train_labels[distance.argmin(axis=1)] == test_labels
    assert correct.mean() > 0.95
    for label, name in enumerate(MATERIALS):
        assert correct[test_labels == label].mean() > 0.8, name


def test_a_scene_is_cheap():
    best = min(_seconds(range(start, start + 50)) for start in range(0, 400, 50))
    assert best / 50 < 3e-3  # measured 0.55 ms on one core; the slack is for a busy machine


def _seconds(seeds):
    start = time.perf_counter()
    for seed in seeds:
        make_scene(seed)
    return time.perf_counter() - start
