"""The build seam: what is where once installed, and what the compiled module says about itself."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from segclip_fast import _C

ROOT = Path(__file__).resolve().parents[1]
BLOCK = "import sys; sys.modules['segclip_fast._C'] = None; "


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_kernels_install_as_a_subpackage():
    spec = importlib.util.find_spec("segclip_fast.kernels")
    assert spec is not None, "segclip_fast.kernels is missing: is segclip_fast installed (pip install -e .)?"
    kernels = importlib.import_module("segclip_fast.kernels")
    assert Path(kernels.__file__).parent.name == "kernels"


@pytest.mark.parametrize("module", ["segclip_fast", "segclip_fast.ops", "segclip_fast.ops.felzenszwalb"])
def test_imports_without_the_extension(module):
    assert run(f"{BLOCK} import {module}; print('fine')") == "fine\n"


def test_importing_the_package_loads_neither_torch_nor_the_extension():
    heavy = "{'torch', 'triton', 'xformers', 'skimage', 'segclip_fast._C'}"
    assert run(f"import sys, segclip_fast; print(sorted({heavy} & set(sys.modules)))") == "[]\n"


def test_cuda_build_describes_itself():
    build = _C.cuda_build()
    assert set(build) == {"compiled", "architectures"}
    assert bool(build["architectures"]) == build["compiled"]


def test_cuda_devices_gives_devices_or_a_reason():
    info = _C.cuda_devices()
    assert set(info) == {"devices", "runtime_version", "driver_version", "reason"}
    assert bool(info["devices"]) != bool(info["reason"])
    if _C.cuda_build()["compiled"]:
        assert info["runtime_version"] >= 11000
    else:
        assert info["reason"] == "segclip_fast was built without CUDA"


def test_extension_does_not_link_torch_or_a_shared_cuda_runtime():
    linked = subprocess.run(["ldd", _C.__file__], capture_output=True, text=True, check=False).stdout
    assert "libtorch" not in linked
    assert "libcudart" not in linked


@pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the repository")
def test_every_source_reaches_the_build_and_the_sdist():
    cmake, manifest = (ROOT / "CMakeLists.txt").read_text(), (ROOT / "MANIFEST.in").read_text()
    for source in (ROOT / "csrc").iterdir():
        if source.suffix in {".cpp", ".cu"}:
            assert f"csrc/{source.name}" in cmake
    for needed in ("graft csrc", "graft kernels", "graft configs", "CMakeLists.txt", "constraints.txt"):
        assert needed in manifest


@pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the repository")
def test_the_prepared_runs_are_installed_with_the_package(tmp_path):
    for name in ("segclip_fast", "kernels", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    build = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", "built"]
    subprocess.run(build, cwd=tmp_path, capture_output=True, check=True)
    # -S: neither the copy that is installed here nor what it needs; so the folder alone is looked at.
    code = "import importlib.resources as r; print(r.files('segclip_fast.configs'))"
    found = Path(
        subprocess.run(
            [sys.executable, "-S", "-c", code],
            cwd=tmp_path / "built",
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    )
    assert found == tmp_path / "built" / "segclip_fast" / "configs"
    runs = {file.relative_to(ROOT / "configs") for file in (ROOT / "configs").rglob("*.yaml")}
    assert {file.relative_to(found) for file in found.rglob("*.yaml")} == runs
    assert len(runs) >= 13


def test_extension_rejects_what_the_op_would_not_pass():
    import numpy as np

    with pytest.raises(TypeError, match="images: expected uint8, float32 or float64, got int64"):
        _C.felzenszwalb(np.zeros((1, 4, 4, 3), np.int64), 1.0, 0.8, 20, 1)
    with pytest.raises(ValueError, match="images: expected 4 dimensions, got 3"):
        _C.felzenszwalb(np.zeros((4, 4, 3)), 1.0, 0.8, 20, 1)
    with pytest.raises(ValueError, match="felzenszwalb: image is empty"):
        _C.felzenszwalb(np.zeros((1, 0, 4, 3)), 1.0, 0.8, 20, 1)


@pytest.mark.skipif(not (ROOT / "tests").exists(), reason="needs the repository")
def test_the_tests_of_a_gpu_collect_where_little_is_installed():
    # `make gpu` uses a machine's own Python; one test file that does not import would stop all of them.
    missing = ["skimage", "scipy", "open_clip", "xformers", "cv2", "tyro", "matplotlib", "tqdm"]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({missing}))\n"
        "import pytest; sys.exit(pytest.main(['-m', 'gpu', '--collect-only', 'tests']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "test_felzenszwalb_cuda.py" in done.stdout
