"""Where a measurement was made: commit, versions, processor. Needs neither torch nor git."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "triton", "xformers", "open_clip_torch", "numpy", "scikit-image")


def commit() -> str:
    """COMMIT if it is set (`make gpu` sets it); else the checkout's commit, marked if the tree has changes.

    Changes of what a run itself writes, results and the pages with their tables, do not count.
    """
    if os.environ.get("COMMIT"):
        return os.environ["COMMIT"]
    written = [f":!{path}" for path in ("benchmarks/results", "docs", "README.md")]
    try:
        name = _git("describe", "--always", "--abbrev=12")
        return name + ("-dirty" if _git("status", "--porcelain", "--", ".", *written) else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def versions() -> dict[str, str | None]:
    """Python and the packages that may serve a call; None where one is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def slug(name: str) -> str:
    """A device's name as a file name: "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
