"""What the command lines share: a parser whose errors are one line, and exit codes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line: `ValueError` instead of the usage text."""

    def error(self, message: str) -> NoReturn:
        """Raise ValueError with the message."""
        raise ValueError(f"{message} (--help lists the options)")


def add_model(parser: argparse.ArgumentParser) -> None:
    """The option --model, also called --checkpoint: what `evaluation.models.load_segmenter` takes."""
    parser.add_argument(
        "--model",
        "--checkpoint",
        required=True,
        metavar="SPEC",
        help="checkpoint folder, or file of the authors; maskclip:NAME[:PRETRAINED]; groupvit:PATH_OR_ID",
    )


def leave(code: int) -> NoReturn:
    """End the process with `code`; under torchrun at once.

    gloo's threads can abort an interpreter that shuts down at leisure ("terminate called without an active
    exception", seen once in some forty runs; PyTorch issue 190489), when everything has been written.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        os._exit(code)
    sys.exit(code)


def run_main(name: str, run: Callable[[Sequence[str] | None], int | None], argv: Sequence[str] | None) -> int:
    """Run a command line: its own exit code (0 for None), or 2 after one line about what is unusable.

    Args:
        name: of the command, in front of that line.
        run: parses the arguments and does the work.
        argv: arguments, or None for those of the process.
    """
    try:
        return run(argv) or 0
    except (ValueError, OSError, RuntimeError, ImportError, MemoryError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        print(f"{name}: error: {lines[0]}", file=sys.stderr)
        return 2
