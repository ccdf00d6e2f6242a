"""Superpixels in C++ under sanitizers: random images, on which CPU and CUDA implementation must agree."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [
    ROOT / "tests" / "fuzz_felzenszwalb.cpp",
    *(ROOT / "csrc" / f"felzenszwalb{part}.cpp" for part in ("", "_sort", "_weights", "_emulated")),
]
FLAGS = ["-std=c++17", "-O1", "-g", "-ffp-contract=off", "-pthread", f"-I{ROOT / 'csrc'}"]
CHECKS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory):
    """Builds and runs the program; returns what it printed."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler (set CXX)")
    folder = tmp_path_factory.mktemp("fuzz")

    def run(check: str, images: int, seed: int, warps: int) -> str:
        program = folder / check
        if not program.exists():
            command = [compiler, *FLAGS, *CHECKS[check], "-o", str(program), *map(str, SOURCES)]
            subprocess.run(command, check=True)
        environment = os.environ | {"TSAN_OPTIONS": "halt_on_error=1", "UBSAN_OPTIONS": "print_stacktrace=1"}
        done = subprocess.run(
            [str(program), str(images), str(seed), str(warps)],
            capture_output=True,
            text=True,
            env=environment,
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        return done.stdout

    return run


@pytest.mark.timeout(900)
def test_20_000_images_with_checked_memory(fuzz):
    assert "0 of 20000 images differ" in fuzz("address", 20_000, 1, 1)


@pytest.mark.timeout(900)
def test_warps_as_threads(fuzz):
    assert "0 of 1500 images differ" in fuzz("thread", 1500, 2, 3)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_one_million_images_with_checked_memory(fuzz):
    assert "0 of 1000000 images differ" in fuzz("address", 1_000_000, 3, 1)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_more_warps_as_threads(fuzz):
    assert "0 of 20000 images differ" in fuzz("thread", 20_000, 4, 5)
