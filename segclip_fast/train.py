"""Train a model: `python -m segclip_fast.train RUN [settings]`, also under torchrun with one process.

RUN is one of the prepared runs: `paper` (ViT-B/16 from CLIP; bring your pictures and captions as a folder),
`scenes` (learns the embedded scenes on a laptop) and `stamps` (a small model on the Tux Paint stamps). Every
setting is a flag, see --help.
"""

from __future__ import annotations

import sys

from .config import TrainConfig
from .training.presets import RUNS


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and train; returns the exit code: 0 done, 2 unusable settings, input or disk."""
    import tyro

    runs = {name: (run.__doc__ or "", run()) for name, run in RUNS.items()}
    config: TrainConfig = tyro.extras.overridable_config_cli(
        runs, args=arguments, description=__doc__, prog="python -m segclip_fast.train"
    )
    from .training.loop import train

    try:
        train(config)
    except (ValueError, OSError, FloatingPointError, ImportError, NotImplementedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"trained model: {config.output}/model")
    return 0


if __name__ == "__main__":
    sys.exit(main())
