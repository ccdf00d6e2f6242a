"""Train a model: `python -m segclip_fast.train RUN [settings]`, in one process or by torchrun in several.

RUN is a prepared run or a YAML file (`segclip_fast.training.runs` says what may stand in it); every setting
is a flag, which changes it. --print-config prints what would be trained, as such a file, and leaves.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from ._cli import leave
from .config import TrainConfig
from .training.runs import available, dump, load_run, summary

PROGRAM = "python -m segclip_fast.train"
# open_clip's names of settings that lie deeper here; --batch-size, --epochs and the like are the same.
ALIASES = {
    "train-data": "data.train-data",
    "train-num-samples": "data.train-num-samples",
    "train-data-upsampling-factors": "data.train-data-upsampling-factors",
    "dataset-type": "data.dataset-type",
    "csv-img-key": "data.csv-img-key",
    "csv-caption-key": "data.csv-caption-key",
    "csv-separator": "data.csv-separator",
    "workers": "data.workers",
    "lr": "optim.lr",
    "wd": "optim.weight-decay",
    "eps": "optim.eps",
    "grad-clip-norm": "optim.clip",
}
HELP = ("-h", "--help")
PRINT = ("--print-config", "--print_config")
INSTEAD = {"steps": "epochs", "epochs": "steps"}
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
ERRORS = (ValueError, OSError, FloatingPointError, ImportError, NotImplementedError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and train.

    Args:
        arguments: those of the command line, or None for the process's own.

    Returns:
        Exit code: 0 done or stopped by SIGTERM, 2 unusable settings, input or disk. What is wrong stands in
        one line on stderr, once for all processes that agree on it.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    first = os.environ.get("RANK", "0") == "0"
    if not given:
        return _say(f"usage: {PROGRAM} RUN [settings]\n\n{_runs()}\n\n--help lists the settings", first, 2)
    try:
        config = parse(given)
        if config is None or set(PRINT) & set(given):
            return 0 if config is None else _say(dump(config).rstrip(), first, 0)
    except ERRORS as error:
        return _say(f"error: {error}", first, 2)
    from .training.loop import train

    try:
        train(config)
    except SystemExit as left:
        return left.code if isinstance(left.code, int) else int(left.code is not None)
    except ERRORS as error:
        alone = not getattr(error, "on_every_rank", False)
        rank = f" (process {os.environ['RANK']})" if alone and not first else ""
        return _say(f"error{rank}: {error}", first or alone, 2)
    except RuntimeError as error:
        if not any(sign in str(error) for sign in LOST):
            raise
        reason = str(error).strip().splitlines()[0]
        return _say(f"error: another process has ended, see its message ({reason})", first, 2)
    return _say(f"trained model: {config.output}/model", first, 0)


def parse(arguments: Sequence[str]) -> TrainConfig | None:
    """The run of a command line with its flags applied; None once its help has been printed.

    Raises:
        ValueError: no such run, or a flag that is unknown or has a value that does not fit.
        OSError: the run's file is missing or cannot be read.
    """
    import tyro

    run, *flags = arguments
    asked = bool(set(HELP) & set(arguments))
    if run.startswith("-") and not asked:
        raise ValueError(f"RUN: expected a prepared run or a YAML file first, got {run!r} ({PROGRAM} --help)")
    config = TrainConfig() if run.startswith("-") else load_run(run)
    flags = spelled_out([flag for flag in flags if flag not in PRINT])
    options: dict[str, Any] = {"default": _one_length(config, flags), "prog": f"{PROGRAM} RUN"}
    if asked:
        with contextlib.suppress(SystemExit):
            tyro.cli(TrainConfig, args=["--help"], description=_description(), **options)
        return None
    with _one_line():
        return tyro.cli(TrainConfig, args=flags, **options)


def spelled_out(flags: Sequence[str]) -> list[str]:
    """Flags with open_clip's names replaced by those of `TrainConfig`; --resume alone is --resume latest."""
    found = []
    for number, flag in enumerate(flags):
        name, equals, value = flag.removeprefix("--").partition("=")
        known = ALIASES.get(name.replace("_", "-"))
        found.append(f"--{known}{equals}{value}" if known and flag.startswith("--") else flag)
        alone = number + 1 == len(flags) or flags[number + 1].startswith("--")
        if flag == "--resume" and alone:
            found.append("latest")
    return found


def _one_length(config: TrainConfig, flags: Sequence[str]) -> TrainConfig:
    """The run, without its steps where the flags give epochs, and the other way round (unless they too)."""
    named = {flag.partition("=")[0] for flag in flags}
    for one, other in INSTEAD.items():
        if f"--{one}" in named:
            changes: dict[str, Any] = {one: getattr(config, one) or 1, other: 0}
            return dataclasses.replace(config, **changes)
    return config


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    """Make a ValueError of one line of the box that tyro draws around an error.

    Raises:
        ValueError: the block wanted to leave.
    """
    drawn, columns = io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "10000"  # not folded
    try:
        with contextlib.redirect_stderr(drawn):
            yield
    except SystemExit as left:
        if not left.code:
            raise
        problem = re.sub(r"^Error parsing ((?!--)\S+: )?", "", _first_part(drawn.getvalue()))
        raise ValueError(f"{problem} (--help lists the settings)") from None
    finally:
        os.environ.pop("COLUMNS")
        if columns is not None:
            os.environ["COLUMNS"] = columns


def _first_part(box: str) -> str:
    """What stands in a box of tyro's below its title, up to the next rule."""
    lines = [line.strip("│ ") for line in box.splitlines() if not line.startswith("╰")]
    rules = [number for number, line in enumerate(lines) if line and not line.strip("─-")]
    if not lines or lines[0].startswith("╭"):
        rules = [0, *rules]  # the title stands in the frame; where all is ASCII, over a rule
    start, end = [*rules, len(lines), len(lines)][:2]
    return " ".join(line for line in lines[start + 1 : end] if line) or box.strip()


def _runs() -> str:
    names = available()
    width = max(map(len, names))
    return "\n".join(["prepared runs:", *(f"  {name:{width}}  {summary(name)}" for name in names)])


def _description() -> str:
    shorter = {**ALIASES, "resume": "resume latest"}
    short = "\n".join(f"  --{name:30} --{setting}" for name, setting in shorter.items())
    return f"{__doc__}\n{_runs()}\n\nshorter names, those of open_clip:\n{short}"


def _say(text: str, aloud: bool, code: int) -> int:
    """Print `text`, what is wrong to stderr; gives `code` back."""
    stream: TextIO = sys.stderr if code else sys.stdout
    if aloud:
        print(text, file=stream)
    return code


if __name__ == "__main__":
    leave(main())
