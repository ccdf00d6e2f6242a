"""Pictures of a run: the right columns with the right pixels, repeatable, without a trace in the run."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from dataset_files import photo
from PIL import Image
from small import small_model

from segclip_fast.data.sample import RawSample
from segclip_fast.data.transforms import CLIP_MEAN, CLIP_STD, normalise
from segclip_fast.evaluation.drawing import borders, distinct_colours
from segclip_fast.model.reconstruction import mask_patches, patchify
from segclip_fast.training import pictures
from segclip_fast.training.pictures import columns, draw, write
from segclip_fast.training.random_state import random_state

SCALE = 5  # of 32 pixels, to 160
NAMES = ("cat", "dog", "sofa")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return small_model()


def mask_of(height: int, width: int) -> np.ndarray:
    mask = np.zeros((height, width), dtype=np.int64)
    mask[height // 2 :] = 2
    mask[:, -5:] = 255
    return mask


def some(masks: bool = True) -> list[RawSample]:
    return [
        RawSample(photo(0, (32, 32)), "a cat on a sofa", mask_of(32, 32) if masks else None),
        RawSample(photo(1, (40, 77)), "a dog\nand another dog " * 20),
        RawSample(photo(2, (90, 20)), "grass", mask_of(90, 20) if masks else None),
    ]


def small(cell: np.ndarray) -> np.ndarray:
    """A cell at the training size; every pixel of it stands 5 x 5 times in the cell."""
    assert cell.shape == (160, 160, 3)
    blocks = cell.reshape(32, SCALE, 32, SCALE, 3)
    assert (blocks == blocks[:, :1, :, :1]).all()
    return blocks[:, 0, :, 0]


def titles(model, samples, names=()) -> list[str]:
    return [column.title for column in columns(model, samples, names)]


def test_columns_are_those_that_there_is_something_for(model):
    assert titles(model, some(), NAMES) == ["picture", "regions", "reconstruction", "segmentation", "truth"]
    assert titles(model, some(masks=False), NAMES) == ["picture", "regions", "reconstruction", "segmentation"]
    assert titles(model, some(masks=False)) == ["picture", "regions", "reconstruction"]
    assert titles(model, some()) == ["picture", "regions", "reconstruction", "truth"]
    without = small_model(reconstruction__enabled=False)
    assert titles(without, some(), NAMES) == ["picture", "regions", "segmentation", "truth"]


def test_whole_picture_holds_every_cell_in_its_place(model):
    shown, picture = columns(model, some(), NAMES), draw(model, some(), NAMES)
    assert picture.dtype == np.uint8
    assert picture.shape[1] == 8 + 5 * 168
    tops = set()
    for number, column in enumerate(shown):
        left = 8 + 168 * number
        rows = [np.flatnonzero((picture[:, left] == cell[0, 0]).all(axis=1)) for cell in column.cells]
        found = [
            {top for top in tops_of if np.array_equal(picture[top : top + 160, left : left + 160], cell)}
            for tops_of, cell in zip(rows, column.cells, strict=True)
        ]
        assert all(len(places) == 1 for places in found), column.title
        tops.add(tuple(places.pop() for places in found))
    assert len(tops) == 1  # all columns of a row at one height
    assert sorted(*tops) == list(*tops)


def test_picture_is_the_central_square_at_the_training_size(model):
    first, wide, tall = (small(cell) for cell in columns(model, some())[0].cells)
    assert np.array_equal(first, some()[0].image)
    for found, sample, box in ((wide, some()[1], (18, 0, 58, 40)), (tall, some()[2], (0, 35, 20, 55))):
        expected = Image.fromarray(sample.image).crop(box).resize((32, 32), Image.Resampling.BICUBIC)
        assert np.array_equal(found, np.asarray(expected))


def test_regions_are_those_of_the_hard_assignment(model):
    sample = some()[0]
    with torch.no_grad():
        hard = model.eval().encode_image(normalise(sample.image)[None]).hard
    region = hard[0].argmax(dim=0).reshape(4, 4).numpy().repeat(8, axis=0).repeat(8, axis=1)
    assert len(np.unique(region)) > 1
    cell = columns(model, [sample])[1].cells[0]
    large = region.repeat(SCALE, axis=0).repeat(SCALE, axis=1)
    line = borders(large)
    assert (cell[line] == 255).all()
    picture = sample.image.repeat(SCALE, axis=0).repeat(SCALE, axis=1)
    expected = np.round(0.45 * picture + 0.55 * distinct_colours(3)[large])
    assert np.abs(cell[~line] - expected[~line]).max() <= 1


def test_reconstruction_shows_visible_patches_and_predicts_hidden_ones(model, monkeypatch):
    sample, other = some()[0], photo(9, (32, 32))
    prediction = patchify(normalise(other)[None], 8)
    seen = []

    def predict(regions, hard, masking):
        seen.append(masking)
        assert not torch.is_grad_enabled()
        return prediction

    monkeypatch.setattr(model.reconstruction, "forward", predict)
    tiles = small(columns(model, [sample])[2].cells[0]).reshape(4, 8, 4, 8, 3).swapaxes(1, 2)
    hidden = seen[0].hidden[0].bool().reshape(4, 4).numpy()
    assert 0 < hidden.sum() < 16
    assert hidden.sum() == 16 - model.config.reconstruction.kept(16)
    for (row, column), is_hidden in np.ndenumerate(hidden):
        expected = (other if is_hidden else sample.image)[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
        assert np.array_equal(tiles[row, column], expected), (row, column)


def test_reconstruction_is_that_of_a_training_pass(monkeypatch):
    torch.manual_seed(0)
    model = small_model(vision__patch_size=4, grouping__centers=6)  # assignments that the noise changes
    sample = some()[0]
    images = normalise(sample.image)[None]
    noise = model.draw_noise(images, torch.Generator().manual_seed(pictures.SEED))
    with torch.no_grad():
        model.reconstruction.predict.weight.mul_(10)  # far from the mean colour, as after training
    made, assigned, real = [], [], model.reconstruction.forward

    def spy(regions, hard, masking):
        assigned.append(hard)
        made.append(real(regions, hard, masking))
        return made[-1]

    monkeypatch.setattr(model.reconstruction, "forward", spy)
    with torch.no_grad():
        model.eval().terms(images, model.tokenize(["a cat"]), None, noise)
    cell = small(columns(model, [sample])[2].cells[0])
    assert torch.equal(assigned[0].round(), assigned[1].round())  # the noise is the same
    shown = patchify(torch.from_numpy(cell).permute(2, 0, 1)[None], 4)
    mean, deviation = (255.0 * torch.tensor(values).repeat(16) for values in (CLIP_MEAN, CLIP_STD))
    expected = (made[0] * deviation + mean).clamp(0, 255)
    hidden = mask_patches(noise.mask, model.config.reconstruction.kept(64)).hidden.bool()
    assert (shown[hidden] - expected[hidden]).abs().max() < 0.51
    assert shown[hidden].float().std() > 30


def test_segmentation_is_that_of_the_model(model):
    sample = some()[0]
    cell, legend = (part[0] for part in (lambda c: (c.cells, c.legends))(columns(model, [sample], NAMES)[3]))
    found = model.segment(sample.image, NAMES)
    large = found.labels.repeat(SCALE, axis=0).repeat(SCALE, axis=1)
    line = borders(large)
    picture = sample.image.repeat(SCALE, axis=0).repeat(SCALE, axis=1)
    expected = np.round(0.45 * picture + 0.55 * found.colours[large])
    assert np.abs(cell[~line] - expected[~line]).max() <= 1
    present = sorted((n for n, share in found.coverage.items() if share), key=lambda n: -found.coverage[n])
    assert [name for name, _ in legend] == present
    assert dict(legend) == {name: tuple(found.colours[NAMES.index(name)]) for name in present}


def test_truth_paints_labels_and_greys_what_is_not_counted(model):
    column = columns(model, some(), NAMES)[-1]
    cell, picture = column.cells[0].astype(float), some()[0].image.repeat(5, axis=0).repeat(5, axis=1)
    colours = distinct_colours(3)
    for (y, x), colour in {(20, 20): colours[0], (140, 20): colours[2], (20, 150): [150] * 3}.items():
        assert np.abs(cell[y, x] - (0.45 * picture[y, x] + 0.55 * np.array(colour))).max() <= 1
    assert (cell[80, :130] == 255).all()  # the line between the two
    assert [name for name, _ in column.legends[0]] == ["cat", "sofa"]
    assert np.unique(column.cells[1]).tolist() == [240]  # no mask
    assert column.legends[1] == ()
    assert [name for name, _ in columns(model, some())[-1].legends[0]] == ["0", "2"]  # no names


def test_background_is_not_painted_and_found_by_threshold(model):
    names = ("background", "cat", "dog")
    sample, threshold = some()[0], 0.999
    everything = columns(model, [sample], names, threshold=threshold)
    picture, found, truth = (everything[number].cells[0] for number in (0, 3, 4))
    labels = model.segment(sample.image, names[1:], background=True, threshold=threshold).labels
    assert 0 < (labels == 0).sum() < labels.size
    large = labels.repeat(SCALE, axis=0).repeat(SCALE, axis=1)
    same, line = (found == picture).all(axis=2), borders(large)
    assert same[(large == 0) & ~line].all()
    assert same[(large != 0) & ~line].mean() < 0.1
    assert {name for name, _ in everything[3].legends[0]} == {names[i] for i in np.unique(labels) if i}
    assert np.array_equal(truth[:80, :135], picture[:80, :135])
    assert not np.array_equal(truth[81:, :135], picture[81:, :135])
    assert everything[4].legends[0] == (("dog", tuple(distinct_colours(2)[1].tolist())),)
    by_default = columns(model, [sample], names)[3].cells[0]
    assert not np.array_equal(by_default, found)


@pytest.mark.parametrize("training", [True, False])
def test_leaves_no_trace_and_repeats_itself(model, training):
    model.train(training)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.manual_seed(5)
    first = draw(model, some(), NAMES)
    states = random_state()
    second = draw(model, some(), NAMES)
    assert np.array_equal(first, second)
    tensors, values = random_state()
    assert values == states[1]
    assert all(torch.equal(state, tensors[name]) for name, state in states[0].items())
    assert all(module.training == training for module in model.modules())
    assert all((parameter.grad == 1).all() for parameter in model.parameters())
    with torch.no_grad():
        model.reconstruction.predict.bias.add_(0.5)
    assert not np.array_equal(draw(model, some(), NAMES), first)


def test_samples_do_not_influence_each_other(model):
    alone = columns(model, some()[:1], NAMES)
    for one, all_of_them in zip(alone, columns(model, some(), NAMES), strict=True):
        assert np.array_equal(one.cells[0], all_of_them.cells[0]), one.title


def test_other_sizes_and_broken_weights():
    model = small_model(vision__image_size=200, vision__patch_size=20)
    assert draw(model, some(), NAMES).shape[1] == 8 + 5 * 208  # large enough as it is
    with torch.no_grad():
        model.reconstruction.predict.weight.fill_(torch.nan)  # a run that went wrong can still be looked at
    assert draw(model, some()).dtype == np.uint8


def test_many_long_names_stay_within_their_cell(model):
    """Names that find no room are cut or counted: nothing is drawn over the neighbouring column."""
    words = ("a", "photo", "of", "cat", "dog", "sofa", "grass", "and")
    names = tuple(f"{one} {two} {three} and {one}" for one in words for two in words[:3] for three in words)
    mask = np.arange(32 * 32).reshape(32, 32) % len(names)
    picture = draw(model, [RawSample(photo(0, (32, 32)), "", mask)], names)
    right = 8 + 5 * 168
    notes = picture[-40:]
    assert (notes[:, right - 8 :] == 255).all()
    assert (notes[:, 8 + 4 * 168 - 8 : 8 + 4 * 168] == 255).all()
    assert (notes[:, 8 + 4 * 168 : right - 8] < 255).any()


def test_refuses_what_it_cannot_draw(model):
    with pytest.raises(ValueError, match="samples: expected at least one sample, got 0"):
        draw(model, [])
    with pytest.raises(ValueError, match=r"samples\[1\].image: expected a \(H, W, 3\) uint8 array, got"):
        draw(model, [some()[0], RawSample(np.zeros((4, 4, 3)), "")])
    with pytest.raises(ValueError, match=r"samples\[0\].mask: expected a mask of \(32, 32\) integers"):
        draw(model, [RawSample(photo(0, (32, 32)), "", mask_of(32, 31))])
    with pytest.raises(ValueError, match="class_names: expected a name for each of the 3 labels"):
        draw(model, some(), ("cat", "dog"))
    with pytest.raises(ValueError, match="labels: expected distinct labels"):
        draw(model, some(), ("cat", "Cat", "dog"))


def test_write(tmp_path):
    picture = photo(0, (20, 30))
    path = write(tmp_path, 100, picture)
    assert path == tmp_path / "pictures" / "step-000100.png"
    assert np.array_equal(np.asarray(Image.open(path)), picture)
    again = write(tmp_path, 100, picture[::-1].copy())
    assert np.array_equal(np.asarray(Image.open(again)), picture[::-1])
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    with pytest.raises(ValueError, match=r"picture: expected a \(H, W, 3\) uint8 array"):
        write(tmp_path, 1, picture[..., 0])
    with pytest.raises(ValueError, match="step: expected a number of at least 0, got -1"):
        write(tmp_path, -1, picture)


@pytest.mark.gpu
def test_gpu_hides_the_same_patches(model):
    expected = columns(model, some(), NAMES)
    for here, there in zip(expected, columns(model.cuda(), some(), NAMES), strict=True):
        same = np.mean([np.mean(a == b) for a, b in zip(here.cells, there.cells, strict=True)])
        assert same > 0.9, here.title
