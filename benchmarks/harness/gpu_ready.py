"""Whether `make gpu` can run here: everything it needs, and what to do about each thing that is missing.

python benchmarks/harness/gpu_ready.py    # exit status 0 if nothing is missing
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import sys
from pathlib import Path

CARRY = "carry its wheel: make gpu WHEELS=folder"
PACKAGES = {  # distribution: least version, what it is for
    "triton": ("3.5", "the kernels"),
    "numpy": ("1.26", "the package"),
    "pillow": ("10.1", "the package"),
    "safetensors": ("0.4", "the package"),
    "setuptools": ("77", "the build"),
    "pybind11": ("2.13", "the build"),
    "pytest": ("8.0", "tests and benchmarks"),
    "pytest-benchmark": ("5.0", "the benchmarks"),
}


def missing() -> list[str]:
    """One sentence per thing that is missing."""
    found = [*_device(), *_tools()]
    if sys.version_info < (3, 11):
        found.append(
            f"Python >= 3.11 is needed to test the build instead of the checkout, here is {sys.version}"
        )
    for name, (least, use) in PACKAGES.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} >= {least} is not installed ({use}): {CARRY}")
            continue
        if _parts(version) < _parts(least):
            found.append(f"{name} >= {least} is needed ({use}), here is {version}: {CARRY}")
    return found


def _device() -> list[str]:
    try:
        import torch
    except ImportError:
        return ["torch is not installed: point PYTHON at the Python that has it, make gpu PYTHON=..."]
    if torch.version.cuda is None:
        return [f"no CUDA device: torch {torch.__version__} was built without CUDA"]
    if not torch.cuda.is_available():
        return [
            f"no CUDA device: torch {torch.__version__} sees none (is there a driver? CUDA_VISIBLE_DEVICES?)"
        ]
    return []


def _tools() -> list[str]:
    found = []
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    places = [Path(home) / "bin/nvcc" for home in filter(None, homes)] + [Path("/usr/local/cuda/bin/nvcc")]
    if not (os.environ.get("CUDACXX") or shutil.which("nvcc") or any(place.exists() for place in places)):
        found.append("nvcc was not found: install the CUDA toolkit or set CUDA_HOME")
    found += [
        f"{tool} was not found on PATH: pip install {tool}, or {CARRY}"
        for tool in ("cmake", "ninja")
        if shutil.which(tool) is None
    ]
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        found.append("a C++17 compiler was not found: apt install g++")
    return found


def _parts(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def main() -> int:
    """Say what is missing; the exit status."""
    problems = missing()
    for problem in problems:
        print(f"make gpu: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
