"""Every CUDA source compiles for the architectures we name, and no kernel keeps registers in memory."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[1] / "csrc"
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
MACHINE_CODE = ("80", "90")
PTX = "90"  # compiled again by the driver of a newer GPU


@pytest.mark.skipif(NVCC is None, reason="no nvcc in PATH or /usr/local/cuda")
@pytest.mark.parametrize("source", sorted(path.name for path in CSRC.glob("*.cu")))
def test_compiles_without_spills(source, tmp_path):
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in MACHINE_CODE]
    command = [
        *(str(NVCC), "-std=c++17", "-O3", "-fmad=false", "-DSEGCLIP_WITH_CUDA", "-Xptxas=-v", *targets),
        *(f"-gencode=arch=compute_{PTX},code=compute_{PTX}", "-c", str(CSRC / source)),
        *("-o", str(tmp_path / "out.o")),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "warning" not in done.stderr
    kernels = re.findall(r"Compiling entry function '(\w+)' for 'sm_(\d+)'", done.stderr)
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", done.stderr)]
    assert len(spills) == 2 * len(kernels)
    assert not any(spills), done.stderr
    if source == "felzenszwalb.cu":
        segment = [arch for name, arch in kernels if "segment_images" in name]
        assert sorted(segment) == [arch for arch in MACHINE_CODE for _ in range(4)]
