"""The real torchrun, as tests start it: several processes of one thread on this machine, with gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist


def command(*arguments: object, processes: int = 2) -> list[str]:
    """Its command line; workers are scripts beside this file, or `-m` and a module."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*start, *map(str, arguments)]


def environment() -> dict[str, str]:
    """One thread a process, and this folder to import from."""
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def run(*arguments: object, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """Run to the end; skips the test where there is no gloo."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this PyTorch has no gloo")
    line = command(*arguments, processes=processes)
    return subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=300, check=False)
