"""Where a run's numbers and pictures go besides its own files: TensorBoard and Weights & Biases.

Both are optional packages. Whether they are there is known before training; what fails later (a full disk, a
network) is warned about once and never ends a run.
"""

from __future__ import annotations

import importlib
import logging
import numbers
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from .._checks import require
from ..interop.files import write_whole

TENSORBOARD = "tensorboard"  # folder in the run folder, and the package
WANDB_ID = "wandb_id.txt"  # file in the run folder
PROJECT = "segclip_fast"
FLUSH_SECONDS = 10  # what a killed run may lose of TensorBoard's events
CHOICES: dict[str, tuple[str, ...]] = {
    "": (),
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "all": ("tensorboard", "wandb"),
}
_MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}
_LOGGER = logging.getLogger("segclip_fast")


class Reporter(Protocol):
    """Takes what a run finds out, in the order of the steps."""

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Numbers of a step by name; values that are no numbers are left out."""

    def picture(self, step: int, name: str, picture: np.ndarray) -> None:
        """A picture (H, W, 3) uint8 of a step."""

    def close(self) -> None:
        """Send what is left; nothing may be reported afterwards."""


def require_packages(report_to: str) -> None:
    """Raise unless everything that `report_to` needs is installed.

    Raises:
        ValueError: not one of `CHOICES`.
        ImportError: a package is missing; the message says how to install all that are.
    """
    require(report_to in CHOICES, "report_to", f"one of {', '.join(map(repr, CHOICES))}", report_to)
    missing = []
    for package in CHOICES[report_to]:
        try:
            importlib.import_module(_MODULES[package])
        except ImportError as error:
            missing.append((package, error))
    if missing:
        names = " ".join(package for package, _ in missing)
        raise ImportError(
            f"report_to: expected the packages of {report_to!r}, got none of {names}: pip install {names} "
            f"({missing[0][1]})"
        ) from missing[0][1]


def make_reporters(report_to: str, run: Path, config: Mapping[str, Any], start: int) -> list[Reporter]:
    """The reporters that a run asked for; of several processes only the first one should have any.

    Args:
        report_to: "" (none), "tensorboard", "wandb" or "all".
        run: the run folder, which exists.
        config: the run's settings, plain values, to be shown beside its curves.
        start: finished steps to continue from; TensorBoard forgets later ones. At 0, W&B begins a new run.

    Raises:
        ValueError: not one of the choices.
        ImportError: a package is missing; nothing has been started then.
        RuntimeError: a service did not start, such as W&B without a login.
    """
    require_packages(report_to)
    makers: dict[str, Callable[[], Reporter]] = {
        "tensorboard": lambda: TensorBoard(run, start),
        "wandb": lambda: WandB(run, config, start),
    }
    made: list[Reporter] = []
    for name in CHOICES[report_to]:
        try:
            made.append(Guarded(name, makers[name]()))
        except Exception as error:
            for reporter in made:
                reporter.close()
            raise RuntimeError(f"report_to: {name} did not start: {error}") from error
    return made


class TensorBoard:
    """Event files in RUN/tensorboard: `tensorboard --logdir RUN`.

    Args:
        run: the run folder.
        start: finished steps; events of later steps that an earlier process wrote are hidden.
    """

    def __init__(self, run: Path, start: int) -> None:
        self.writer = importlib.import_module(_MODULES["tensorboard"]).SummaryWriter(
            str(run / TENSORBOARD), purge_step=start + 1, flush_secs=FLUSH_SECONDS
        )

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """One curve for each name."""
        for name, value in _numbers(values).items():
            self.writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, picture: np.ndarray) -> None:
        """A picture (H, W, 3) uint8."""
        self.writer.add_image(name, picture, step, dataformats="HWC")

    def close(self) -> None:
        """Write what is left."""
        self.writer.close()


class WandB:
    """A run of W&B's project "segclip_fast", continued when training is.

    W&B takes steps in ascending order only: steps that are trained again after a resume stay as they were.

    Args:
        run: the run folder; its name is the run's name, and RUN/wandb_id.txt keeps W&B's id.
        config: the settings.
        start: finished steps.
    """

    def __init__(self, run: Path, config: Mapping[str, Any], start: int) -> None:
        self.package = importlib.import_module(_MODULES["wandb"])
        known = run / WANDB_ID
        identifier = known.read_text().strip() if start and known.is_file() else ""
        if not identifier:
            identifier = secrets.token_hex(4)
            write_whole(known, lambda path: path.write_text(identifier + "\n"))
        self.run = self.package.init(
            project=PROJECT,
            dir=str(run),
            name=run.resolve().name,
            config=dict(config),
            id=identifier,
            resume="allow",
        )

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """One curve for each name."""
        self.run.log(_numbers(values), step=step)

    def picture(self, step: int, name: str, picture: np.ndarray) -> None:
        """A picture (H, W, 3) uint8."""
        self.run.log({name: self.package.Image(picture)}, step=step)

    def close(self) -> None:
        """Send what is left."""
        self.run.finish()


class Guarded:
    """A reporter whose first failure is logged and ends reporting, not the run.

    Args:
        name: what the warning calls it.
        reporter: what may fail.
    """

    def __init__(self, name: str, reporter: Reporter) -> None:
        self.name, self.reporter, self.failed = name, reporter, False

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """See `Reporter`."""
        self._attempt(lambda: self.reporter.scalars(step, values))

    def picture(self, step: int, name: str, picture: np.ndarray) -> None:
        """See `Reporter`."""
        self._attempt(lambda: self.reporter.picture(step, name, picture))

    def close(self) -> None:
        """See `Reporter`."""
        self._attempt(self.reporter.close)

    def _attempt(self, call: Callable[[], None]) -> None:
        if self.failed:
            return
        try:
            call()
        except Exception as error:
            self.failed = True
            _LOGGER.warning(
                "report_to: %s failed, the run goes on without it (%s: %s)",
                self.name,
                type(error).__name__,
                error,
            )


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The entries that a curve can show; True is 1."""
    return {name: float(value) for name, value in values.items() if isinstance(value, numbers.Real)}
