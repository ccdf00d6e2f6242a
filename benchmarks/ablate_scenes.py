"""What the demonstration's choices are worth: the scenes run with one of them changed, 400 steps each.

python benchmarks/ablate_scenes.py    # about ten minutes; writes results/cpu_scenes_ablation.json
"""

from __future__ import annotations

import dataclasses
import tempfile

from report import RESULTS, commit, store

from segclip_fast.config import TrainConfig
from segclip_fast.data.scenes import SceneSource
from segclip_fast.evaluation.harness import evaluate_source
from segclip_fast.training.loop import train
from segclip_fast.training.runs import load_run

STEPS, IMAGES, SEEDS = 400, 200, (1, 2)


def changed(config: TrainConfig, **changes: float) -> TrainConfig:
    """The run with changed settings, named like loss__superpixel_kl or model__vision__layers."""
    for name, value in changes.items():
        parts = name.split("__")
        nested = [config]
        for part in parts[:-1]:
            nested.append(getattr(nested[-1], part))
        new = value
        for owner, part in zip(reversed(nested), reversed(parts), strict=True):
            new = dataclasses.replace(owner, **{part: new})
        config = new
    return config


VARIANTS = {
    "the demonstration": {},
    "a block after the grouping module": {"model__vision__layers": 3},
    "superpixel loss off": {"loss__superpixel_kl": 0.0},
    "superpixel loss at weight 1": {"loss__superpixel_kl": 1.0},
    "reconstruction loss off": {"loss__reconstruction": 0.0},
}


def main() -> None:
    held_out = SceneSource(IMAGES, size=64, split="val")
    rows = []
    for name, changes in VARIANTS.items():
        for seed in SEEDS:
            with tempfile.TemporaryDirectory() as folder:
                base = dataclasses.replace(
                    load_run("scenes"),
                    steps=STEPS,
                    seed=seed,
                    output=f"{folder}/run",
                    eval_images=1,
                    quiet=True,
                )
                model = train(changed(base, **changes))
            plain = evaluate_source(model, held_out, batch_size=32).miou
            snapped = evaluate_source(model, held_out, batch_size=32, snap=True).miou
            rows.append(
                {
                    "variant": name,
                    "seed": seed,
                    "miou": round(plain, 4),
                    "snapped": round(snapped, 4),
                    **changes,
                }
            )
            print(f"| {name} | {seed} | {plain:.3f} | {snapped:.3f} |", flush=True)
    values = {"command": "python benchmarks/ablate_scenes.py", "commit": commit(), "steps": STEPS}
    store(RESULTS / "cpu_scenes_ablation.json", values | {"images": IMAGES, "rows": rows})


if __name__ == "__main__":
    main()
