"""Runs as YAML files, the prepared ones among them."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from golden import golden, requires_golden

from segclip_fast import SegCLIP
from segclip_fast.config import TrainConfig, preset, scenes_tiny
from segclip_fast.interop.authors import authors_name
from segclip_fast.interop.clip import freeze_embeddings
from segclip_fast.training import runs
from segclip_fast.training.optim import build_optimizer, schedule
from segclip_fast.training.runs import available, dump, load_run, summary

ABLATIONS = [name for name in available() if name.startswith("ablations/")]


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "run.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write


# --- the prepared runs


def test_the_prepared_runs_have_names_and_a_line_each():
    assert available()[:3] == ["paper", "scenes", "stamps"]
    assert len(ABLATIONS) == 10
    for name in available():
        assert summary(name)[0].isupper(), name
        assert summary(name).endswith("."), name


@pytest.mark.parametrize("name", available())
def test_a_prepared_run_comes_back_from_its_dump(name, write):
    config = load_run(name)
    assert load_run(write(dump(config))) == config
    assert config.output.rpartition("/")[2] == name.rpartition("/")[2]


def different(old, new, prefix=""):
    """Dotted names of the settings in which two configs differ."""
    found = set()
    for field in dataclasses.fields(old):
        a, b = getattr(old, field.name), getattr(new, field.name)
        name = prefix + field.name
        if dataclasses.is_dataclass(a):
            found |= different(a, b, f"{name}.")
        elif a != b:
            found.add(name)
    return found


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("contrastive_only", {"loss.reconstruction", "loss.superpixel_kl", "model.reconstruction.enabled"}),
        ("no_reconstruction", {"loss.reconstruction", "model.reconstruction.enabled"}),
        ("no_superpixel", {"loss.superpixel_kl"}),
        (
            "official_superpixels",
            {"loss.kl_form", "data.superpixels.order", "data.superpixels.patch_label"},
        ),
        ("centers_4", {"model.grouping.centers"}),
        ("centers_16", {"model.grouping.centers"}),
        ("cross_layers_0", {"model.grouping.cross_layers"}),
        ("cross_layers_1", {"model.grouping.cross_layers"}),
        ("cut_after_8", {"model.vision.group_after"}),
        ("slic", {"data.superpixels.kind"}),
    ],
)
def test_an_ablation_changes_what_it_says(name, changes):
    assert different(load_run("paper"), load_run(f"ablations/{name}")) == changes | {"output"}


def test_they_are_found_without_being_installed(monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(name)

    expected = available()
    monkeypatch.setattr(runs.importlib.resources, "files", absent)
    if not (Path(runs.__file__).parents[2] / "configs").is_dir():
        pytest.skip("no repository")
    assert available() == expected
    assert load_run("scenes").data.dataset_type == "scenes"


# --- files


def test_a_file_changes_its_base_and_leaves_the_rest(write):
    write("base: paper\ndata:\n  workers: 2\n  superpixels: {sigma: 0.5}\nepochs: 3\n", "middle.yaml")
    path = write("base: ../middle.yaml\ndata: {superpixels: {min_size: 50}}\n", "deeper/run.yaml")
    changes = {"data.workers", "data.superpixels.sigma", "data.superpixels.min_size", "epochs"}
    config = load_run(path)
    assert different(load_run("paper"), config) == changes
    assert (config.data.workers, config.data.superpixels.sigma, config.epochs) == (2, 0.5, 3)


def test_what_a_file_leaves_out_is_the_default(write):
    assert load_run(write("seed: 7\n")) == TrainConfig(seed=7)
    assert load_run(str(write("{}\n", "empty.yml"))) == TrainConfig()


def test_steps_and_epochs_take_each_others_place(write):
    assert load_run(write("epochs: 2\n")).steps == 0
    by_steps = load_run(write("base: paper\nsteps: 5\n"))
    assert (by_steps.steps, by_steps.epochs) == (5, 0)
    by_epochs = load_run(write("base: scenes\nepochs: 0.5\n"))
    assert (by_epochs.steps, by_epochs.epochs) == (0, 0.5)
    with pytest.raises(ValueError, match=r"run.yaml: steps: expected 0 with epochs, got 5"):
        load_run(write("steps: 5\nepochs: 2\n"))


def test_named_architectures(write):
    assert load_run(write("model: vit_l14\n")).model == preset("vit_l14")
    changed = load_run(write("model:\n  preset: vit_b32\n  grouping: {centers: 3}\n")).model
    assert changed.vision == preset("vit_b32").vision
    assert changed.grouping == dataclasses.replace(preset("vit_b32").grouping, centers=3)
    write("model: {preset: vit_b32, grouping: {centers: 3}}\n", "first.yaml")
    assert load_run(write("base: first.yaml\nmodel: {grouping: {tau: 1}}\n")).model.grouping.centers == 3
    # Another name is another architecture, not the changes of the one before.
    assert load_run(write("base: first.yaml\nmodel: vit_b16\n")).model == preset("vit_b16")
    assert load_run(write("base: scenes\nmodel: {embed_dim: 8}\n")).model.text == preset("scenes_tiny").text


@pytest.mark.parametrize(
    ("text", "value"),
    [("4e-3", 0.004), ("4.0e-3", 0.004), ("1e+1", 10), (".5e1", 5), ("3E0", 3), ("2", 2), ("2.", 2)],
)
def test_forms_of_numbers(write, text, value):
    found = load_run(write(f"optim: {{lr: {text}}}\n")).optim.lr
    assert found == value
    assert type(found) is float


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sed: 7", r"run\.yaml: sed: expected one of output, .*, got an unknown setting"),
        ("data: {superpixels: {scael: 3}}", r"run\.yaml: data\.superpixels\.scael: expected one of kind, "),
        ("model: {visoin: {}}", r"model\.visoin: expected one of embed_dim, "),
        ("data: {preset: vit_b16}", r"data\.preset: expected one of dataset_type, "),
        ("7: 3", r"run\.yaml: 7: expected one of output, "),
        ("optim: {lr: fast}", r"run\.yaml: optim\.lr: expected a number, got 'fast'"),
        ("optim: {lr: '4e-3'}", r"optim\.lr: expected a number, got '4e-3'"),
        ("optim: {lr: true}", r"optim\.lr: expected a number, got True"),
        (f"optim: {{lr: {'9' * 400}}}", r"optim\.lr: expected a number, got 999"),
        ("seed: true", r"seed: expected a whole number, got True"),
        ("seed: 1.0", r"seed: expected a whole number, got 1\.0"),
        ("seed: 1e3", r"seed: expected a whole number, got 1000\.0"),
        ("quiet: 1", r"quiet: expected true or false, got 1"),
        ("output: 3", r"output: expected text, got 3"),
        ("output:", r"output: expected text, got nothing"),
        ("data:", r"run\.yaml: data: expected a mapping, got nothing"),
        ("data: scenes", r"data: expected a mapping, got 'scenes'"),
        ("model: [vit_b16]", r"model: expected a mapping, got \['vit_b16'\]"),
        ("model: vit_b17", r"run\.yaml: model\.preset: expected one of scenes_tiny, .*, got 'vit_b17'"),
        ("model: {preset: [1]}", r"model\.preset: expected one of .*, got \[1\]"),
        ("precision: fp16", r"precision: expected one of 'auto', 'fp32', 'amp_bf16', got 'fp16'"),
        ("optim: {betas: 0.9}", r"optim\.betas: expected a list of 2, got 0\.9"),
        ("optim: {betas: [0.9, 0.98, 1]}", r"optim\.betas: expected a list of 2, got \[0\.9, 0\.98, 1\]"),
        ("optim: {betas: [0.9, x]}", r"optim\.betas\[1\]: expected a number, got 'x'"),
        ("model: {text: {vocabulary: [a, 1]}}", r"model\.text\.vocabulary\[1\]: expected text, got 1"),
        ("batch_size: 0", r"run\.yaml: batch_size: expected a positive number, got 0"),
        ("data: {crop_area: [1, 0.5]}", r"run\.yaml: data\.crop_area: expected 0 < smallest"),
        ("seed: 1\nseed: 2", r"run\.yaml: expected YAML, got the key 'seed' twice line 2"),
        ("data: {workers: 1, workers: 1}", r"expected YAML, got the key 'workers' twice"),
        ("data: {", r"run\.yaml: expected YAML, got "),
        (
            "a: !!python/object:os.system x",
            r"run\.yaml: expected YAML, got could not determine a constructor",
        ),
        ("init: 2024-13-45", r"run\.yaml: expected YAML, got month must be in 1\.\.12"),
        ("- seed", r"run\.yaml: expected a mapping of settings, got \['seed'\]"),
        ("", r"run\.yaml: expected a mapping of settings, got an empty file"),
        ("base: 3", r"run\.yaml: base: expected a prepared run or a YAML file, got 3"),
        ("base: papers", r"run\.yaml: base: expected a YAML file .* prepared runs paper, .*, got 'papers'"),
        ("base: run.yaml", r"run\.yaml: base: expected no cycle, got \S*run\.yaml -> \S*run\.yaml"),
    ],
)
def test_errors_name_file_setting_expected_and_got(write, text, message):
    with pytest.raises(ValueError, match=message):
        load_run(write(text))


def test_errors_of_a_base_name_its_file(write):
    write("optim: {lr: x}\n", "other.yaml")
    with pytest.raises(ValueError, match=r"other\.yaml: optim\.lr: expected a number"):
        load_run(write("base: other.yaml\n"))
    write("base: run.yaml\n", "other.yaml")
    with pytest.raises(ValueError, match=r"no cycle, got \S*run\.yaml -> \S*other\.yaml -> \S*run\.yaml"):
        load_run(write("base: other.yaml\n"))


def test_files_that_are_not_there(write, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"run: expected an existing YAML file, got '\S*none\.yaml'"):
        load_run(tmp_path / "none.yaml")
    with pytest.raises(FileNotFoundError, match=r"run\.yaml: base: expected an existing YAML file"):
        load_run(write("base: none.yaml\n"))
    with pytest.raises(
        ValueError, match="run: expected a YAML file .* prepared runs paper, scenes, .*got 'p"
    ):
        load_run("papr")
    (tmp_path / "latin.yaml").write_bytes(b"output: \xe9\n")
    with pytest.raises(ValueError, match=r"latin\.yaml: expected YAML, got 'utf-8' codec"):
        load_run(tmp_path / "latin.yaml")
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(OSError, match=r"folder\.yaml"):
        load_run(tmp_path / "folder.yaml")


def test_dump_keeps_text_that_looks_like_something_else(write):
    words = ("no", "on", "1e3", "~", "é")
    model = scenes_tiny(words)
    config = TrainConfig(output="4e-3", model=model, init="no", eval_dataset="1:30", eval_root="null")
    assert load_run(write(dump(config))) == config
    assert dump(config).splitlines()[0] != "output: 4e-3"  # which would be a number


# --- the paper's run against the release


@pytest.mark.golden
@requires_golden
def test_the_papers_optimizer_is_that_of_the_release():
    config, stored = load_run("paper"), golden("model.pt")
    with torch.device("meta"):
        model = SegCLIP(config.model, config.loss)
    assert config.init.startswith("clip:")  # which freezes these:
    freeze_embeddings(model)
    found = {
        authors_name(name): (group["peak_lr"], group["weight_decay"])
        for group in build_optimizer(model, config.optim).param_groups
        for name in group["names"]
    }
    frozen, counts, expected = set(stored["frozen"]), [], {}
    for group in stored["optim_groups"]:
        members = set(group["params"])
        counts.append(len(members & (set(found) | frozen)))
        expected |= dict.fromkeys(members - frozen, (group["lr"], group["weight_decay"]))
        assert (group["b1"], group["b2"]) == config.optim.betas
        assert group["e"] == config.optim.eps
        assert group["warmup"] == config.optim.warmup
        assert group["max_grad_norm"] == config.optim.clip
    assert found == expected
    assert counts == [139, 134, 2, 0, 50, 46, 23, 21]
    assert stored["train"]["optim_step"]["clip"] == config.optim.clip
    assert config.global_batch(8) == 768
    assert (config.epochs, config.steps, config.seed) == (10, 0, 42)


@pytest.mark.golden
@requires_golden
def test_the_papers_schedule_is_that_of_the_release():
    warmup, stored = load_run("paper").optim.warmup, golden("model.pt")["optim_unit"]["schedule_factor"]
    steps = len(stored) - 1
    assert [schedule(step, steps, warmup) for step in range(steps + 1)] == pytest.approx(stored, abs=1e-12)
    total = 48_000
    for step in (1, 3_600, 7_199, 7_200, 20_000, 47_999, total):
        share = step / total
        cosine = 0.5 * (1 + math.cos(math.pi * (share - 0.15) / 0.85))
        assert schedule(step, total, warmup) == pytest.approx(share / 0.15 if share < 0.15 else cosine)
