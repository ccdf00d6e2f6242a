import csv
import logging
import pickle
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from segclip_fast.data import stamps
from segclip_fast.data.stamp_catalog import concept_of, read_catalog
from segclip_fast.data.stamps import StampSource, main
from segclip_fast.data.tokenizer import WordTokenizer

COLOURS = {"lion": (250, 0, 0), "tiger": (0, 250, 0), "mango": (0, 0, 250), "banana": (250, 250, 0)}


def _stamp(root, path, caption, colour=(200, 50, 50), size=(40, 60), mode="RGBA"):
    """A disc with a soft edge; the hidden colour under transparent pixels is a glaring magenta."""
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[: size[0], : size[1]]
    radius = np.hypot((y + 0.5) / size[0] - 0.5, (x + 0.5) / size[1] - 0.5)
    alpha = np.clip((0.47 - radius) * 40, 0, 1)
    pixels = np.zeros((*size, 4), np.uint8)
    pixels[:, :, :3] = np.where(alpha[:, :, None] > 0, colour, (255, 0, 255))
    pixels[:, :, 3] = np.rint(alpha * 255)
    Image.fromarray(pixels).convert(mode).save(file.with_suffix(".png"))
    if caption is not None:
        file.with_suffix(".txt").write_text(caption + "\nfr.utf8=Quelque chose.\n", encoding="utf-8")


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "stamps"
    _stamp(folder, "animals/cats/lion", "A lion.", COLOURS["lion"])
    _stamp(folder, "animals/cats/lion-2", "An old lion", COLOURS["lion"], size=(60, 30))
    _stamp(folder, "animals/cats/tiger", "A sleeping tiger!", COLOURS["tiger"])
    _stamp(folder, "food/fruit/mango", "A mango.", COLOURS["mango"], size=(30, 30))
    _stamp(folder, "food/fruit/banana", "A banana, ripe and sweet.", COLOURS["banana"], size=(25, 90))
    return folder


def _concepts(root):
    return sorted({stamp.concept for stamp in read_catalog(root)})


# ---- which stamps, and what they are called ----


@pytest.mark.parametrize(
    ("caption", "concept"),
    [
        ("A frog.", "frog"),
        ("An Adelaide Rosella.", "adelaide rosella"),
        ("A blue whale.", "blue whale"),
        ("A pair of closed scissors.", "scissors"),
        ("The baby of a gnu.", "gnu"),
        ("A baby sheep (a lamb).", "sheep"),
        ("A ripe, red tomato!", "red tomato"),
        ("A “Granny Smith” apple.", "granny smith apple"),
        ("A plumber\u2019s wrench.", "plumber\u2019s wrench"),
        ("Mercury—the planet closest to the Sun.", "mercury"),
        ("A hoverfly resembles a honeybee drone.", "hoverfly"),
        ("A red and white anemone flower.", "white anemone flower"),
        ("George the blue groper.", "blue groper"),
        ("The Earth. Our planet!", "earth"),
        ("A spiny lobster, from the Hawaiian islands.", "spiny lobster"),
        ("Measuring tape.", "measuring tape"),
        ("Eat your broccoli!", None),
        ("This shell is hundreds of years old!", None),
        ("", None),
        ("...", None),
    ],
)
def test_concept_of(caption, concept):
    assert concept_of(caption) == concept


def test_classes_are_shared(tmp_path):
    for name, caption in {
        "a": "A tiger.",
        "b": "A Sumatran tiger.",
        "c": "A lion.",
        "d": "A sea lion.",
        "e": "A flower.",
        "f": "Two flowers.",
    }.items():
        _stamp(tmp_path, f"animals/{name}", caption)
    for name in ("fire", "garbage", "pickup"):
        _stamp(tmp_path, f"vehicles/{name}", f"A {name} truck.")
    assert _concepts(tmp_path) == ["flower", "lion", "sea lion", "tiger", "truck"]


def test_what_is_left_out(root):
    kept = read_catalog(root)
    before = [stamp.path for stamp in kept]
    _stamp(root, "animals/cartoon/cat", "A cat.")
    _stamp(root, "symbols/alphabets/english/a", "The letter A.")
    _stamp(root, "town/roadsigns/stop", "A stop sign.")
    _stamp(root, "animals/cats/lion_mirror", "A lion.")
    _stamp(root, "food/pizza", "A pizza.")
    _stamp(root, "food/speechless", None)
    _stamp(root, "food/empty", "")
    _stamp(root, "food/broccoli", "Eat your broccoli!")
    _stamp(root, "food/opaque", "A box.", mode="RGB")
    _stamp(root, "food/icon", "An icon.", size=(16, 16))
    Image.new("RGBA", (40, 40), (10, 20, 30, 0)).save(root / "food/ghost.png")
    (root / "food/ghost.txt").write_text("A ghost.\n")
    read_catalog.cache_clear()
    assert [stamp.path for stamp in read_catalog(root)] == before


def test_palette_and_gray_stamps_are_kept(root):
    _stamp(root, "space/moon", "The moon.", (200, 200, 200), mode="LA")
    read_catalog.cache_clear()
    assert "moon" in _concepts(root)


def test_held_out_stamps(root):
    held = [stamp for stamp in read_catalog(root) if stamp.held_out]
    assert [stamp.concept for stamp in held] == ["lion"]
    train, val, seen = (StampSource(root, 4, split=split) for split in ("train", "val", "val_seen"))
    assert {stamp.path for stamp in val.stamps} == {held[0].path}
    assert train.stamps == seen.stamps
    assert set(train.stamps).isdisjoint(val.stamps)
    assert {stamp.concept for stamp in val.stamps} <= {stamp.concept for stamp in train.stamps}
    assert train.class_names == val.class_names == ("background", "banana", "lion", "mango", "tiger")


# ---- samples ----


def test_sample_contents(root):
    source = StampSource(root, 60, size=64)
    counts = set()
    for sample in (source[i] for i in range(len(source))):
        assert sample.image.shape == (64, 64, 3)
        assert sample.image.dtype == np.uint8
        assert sample.mask.shape == (64, 64)
        assert sample.mask.dtype == np.int64
        shown = {source.class_names[label] for label in np.unique(sample.mask)} - {"background"}
        assert shown == set(sample.content)
        assert sample.mentioned
        assert set(sample.mentioned) <= shown
        assert all(name in sample.caption.lower() for name in sample.mentioned)
        assert not any(name in sample.caption.lower() for name in set(COLOURS) - set(sample.mentioned))
        counts.add((len(sample.content), len(sample.mentioned)))
    assert {(1, 1), (2, 2), (3, 3)} <= counts


def test_caption_vocabulary(root):
    source = StampSource(root, 80, size=48)
    words = source.caption_vocabulary()
    assert {"sweet", "ripe", "sleeping", "mango", "photo", "next"} <= set(words)  # of captions and templates
    assert "background" not in words
    assert list(words) == sorted(set(words))
    tokenize = WordTokenizer(words, 16)  # refuses other words
    tokenize([sample.caption for sample in (source[i] for i in range(80))])
    prompts = [f"a photo of a {name}." for name in source.class_names[1:]]
    tokenize(prompts)
    WordTokenizer(StampSource(root, 1, split="val").caption_vocabulary(), 16)(prompts)


def test_mask_is_pixel_exact(root):
    """Each stamp has its own pure colour: its mask must be the pixels closer to it than to what is behind."""
    source = StampSource(root, 40, size=96)
    for sample in (source[i] for i in range(len(source))):
        for name in sample.content:
            colour = np.array(COLOURS[name])
            region = sample.mask == source.class_names.index(name)
            near = np.abs(sample.image.astype(int) - colour).max(axis=2) < 3
            assert near[region].mean() > 0.75  # all but the soft edge
            assert (region & near).sum() / near.sum() > 0.97
        magenta = np.abs(sample.image.astype(int) - (255, 0, 255)).max(axis=2) < 60
        assert not magenta.any()  # the colour under transparent pixels never shows


def test_same_index_same_sample(root):
    one, other = StampSource(root, 30, size=48), StampSource(root, 30, size=48)
    first = [one[i] for i in range(30)]
    second = [other[i] for i in reversed(range(30))][::-1]
    for a, b in zip(first, second, strict=True):
        assert np.array_equal(a.image, b.image)
        assert np.array_equal(a.mask, b.mask)
        assert a.caption == b.caption
    different = StampSource(root, 30, seed=1, size=48)
    assert any(not np.array_equal(first[i].image, different[i].image) for i in range(5))
    seen = StampSource(root, 30, size=48, split="val_seen")
    assert not any(np.array_equal(first[i].image, seen[i].image) for i in range(30))


def test_source_is_a_picklable_sequence(root):
    source = StampSource(root, 3, size=48)
    image = source[1].image
    copy = pickle.loads(pickle.dumps(source))
    assert np.array_equal(copy[1].image, image)
    assert np.array_equal(source[-2].image, image)
    assert len(list(source)) == 3
    with pytest.raises(IndexError, match="index: expected 0 to 2, got 3"):
        source[3]


def test_cache_is_bounded(root, monkeypatch):
    monkeypatch.setattr(stamps, "CACHE_BYTES", 8000)
    source = StampSource(root, 40, size=64)
    reference = StampSource(root, 40, size=64)
    for i in range(40):
        source[i]
        held = sum(pixels.nbytes for pixels in source._cut_outs.values())
        assert held == source._cached_bytes
        assert held <= 8000 or len(source._cut_outs) == 1
    monkeypatch.undo()
    assert np.array_equal(source[7].image, reference[7].image)


def test_without_photographs_backgrounds_are_plain(root, monkeypatch, caplog):
    monkeypatch.setattr(stamps, "_PHOTOGRAPHS", ())
    stamps._photographs.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            sample = StampSource(root, 5, size=64)[0]
        assert "plain backgrounds" in caplog.text
        assert sample.content
    finally:
        stamps._photographs.cache_clear()


def test_photographs_need_no_network():
    pytest.importorskip("skimage")
    assert len(stamps._photographs()) >= 1


# ---- refusals ----


def test_missing_root(tmp_path):
    for folder in (tmp_path / "none", tmp_path):
        with pytest.raises(FileNotFoundError, match="root: expected the stamps folder") as caught:
            StampSource(folder, 3)
        assert "apt-get download tuxpaint-stamps-default" in str(caught.value)
        assert "dpkg -x" in str(caught.value)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"length": 0}, "length: expected at least 1 sample, got 0"),
        ({"length": 1, "seed": -2}, "seed: expected a non-negative integer, got -2"),
        ({"length": 1, "size": 16}, "size: expected 32 to 1024 pixels, got 16"),
        ({"length": 1, "split": "test"}, "split: expected one of"),
    ],
)
def test_source_refuses(root, kwargs, message):
    with pytest.raises(ValueError, match=message):
        StampSource(root, **kwargs)


def test_broken_stamp(root):
    data = (root / "animals/cats/lion.png").read_bytes()
    (root / "animals/cats/lion.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"root: expected readable stamps, got '.*lion\.png'"):
        StampSource(root, 1)


def test_relative_root(root, monkeypatch):
    monkeypatch.chdir(root.parent)
    source = StampSource("stamps", 2, size=48)
    monkeypatch.chdir(root)
    assert source[0].content


def test_split_without_stamps(tmp_path):
    _stamp(tmp_path, "animals/lion", "A lion.")
    with pytest.raises(ValueError, match="split: expected stamps to draw from, got none in 'val'"):
        StampSource(tmp_path, 1, split="val")


# ---- command line ----


def test_written_folder(root, tmp_path):
    output = tmp_path / "out"
    command = [sys.executable, "-m", "segclip_fast.data.stamps", str(root), str(output), "--count", "6"]
    done = subprocess.run([*command, "--size", "48"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "6 pictures of 4 concepts" in done.stdout
    source = StampSource(root, 6, size=48)
    assert (output / "labels.txt").read_text().splitlines() == list(source.class_names)
    with (output / "captions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    for index, row in enumerate(rows):
        sample = source[index]
        assert row["caption"] == sample.caption
        assert row["content"].split("; ") == list(sample.content)
        assert np.array_equal(np.asarray(Image.open(output / row["image"])), sample.image)
        mask = Image.open(output / row["mask"])
        assert mask.mode == "P"
        assert np.array_equal(np.asarray(mask), sample.mask)


def test_output_is_not_overwritten_by_accident(root, tmp_path, capsys):
    output = tmp_path / "out"
    main([str(root), str(output), "--count", "4", "--size", "32"])
    with pytest.raises(SystemExit) as caught:
        main([str(root), str(output), "--count", "2", "--size", "32"])
    assert caught.value.code == 2
    assert "output: expected an empty folder or --overwrite" in capsys.readouterr().err
    assert len(list((output / "images").iterdir())) == 4
    main([str(root), str(output), "--count", "2", "--size", "32", "--overwrite"])
    assert len(list((output / "images").iterdir())) == len(list((output / "masks").iterdir())) == 2


def test_command_line_refuses(root, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    for arguments, message in (
        ([str(root), str(tmp_path / "file")], "output: expected a folder, got the file"),
        ([str(tmp_path / "none"), str(tmp_path / "new")], "apt-get download tuxpaint-stamps-default"),
        ([str(root), str(tmp_path / "new"), "--count", "0"], "length: expected at least 1"),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


# ---- the real package ----


def test_real_catalog(stamp_root):
    catalog = read_catalog(stamp_root)
    concepts = {stamp.concept for stamp in catalog}
    assert len(catalog) >= 250
    assert 150 <= len(concepts) <= 254
    assert {"lion", "tiger", "sea lion", "scissors", "elephant", "truck"} <= concepts
    assert all(1 <= len(concept.split()) <= 3 for concept in concepts)
    assert not any("cartoon" in stamp.path for stamp in catalog)
    held = {stamp.concept for stamp in catalog if stamp.held_out}
    assert len(held) >= 25
    assert held <= {stamp.concept for stamp in catalog if not stamp.held_out}


@pytest.mark.parametrize("split", ["train", "val", "val_seen"])
def test_real_samples(stamp_root, split):
    source = StampSource(stamp_root, 150, size=64, split=split)
    samples = [source[i] for i in range(150)]
    start = time.perf_counter()
    for i in range(150):
        source[i]
    assert (time.perf_counter() - start) / 150 < 10e-3
    for sample in samples:
        assert sample.content
        assert set(np.unique(sample.mask)) <= set(range(len(source.class_names)))
        assert 0.003 < (sample.mask > 0).mean() < 0.95
