"""Builds segclip_fast._C with CMake; everything else is declared in pyproject.toml."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

FOLDERS = {  # beside the package
    "segclip_fast.kernels": "kernels",
    "segclip_fast.configs": "configs",
    "segclip_fast.configs.ablations": "configs/ablations",
}


class CMakeBuild(build_ext):
    """Runs CMake once for the one extension. WITH_CUDA=auto|on|off comes from the environment."""

    def build_extension(self, ext):
        cmake, compiler = shutil.which("cmake"), os.environ.get("CXX", "").split()
        if cmake is None:
            raise RuntimeError("segclip_fast: cmake is missing; run `pip install cmake ninja`")
        if not any(map(shutil.which, compiler[:1] or ["c++", "g++", "clang++"])):
            wanted = compiler[0] if compiler else "a C++17 compiler"
            raise RuntimeError(
                f"segclip_fast: {wanted} was not found; install one (`apt install g++`) or set CXX"
            )
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve() / "cmake"
        target.mkdir(parents=True, exist_ok=True)
        configure = [
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DWITH_CUDA={os.environ.get('WITH_CUDA') or 'auto'}",
            "-DCMAKE_BUILD_TYPE=Release",
        ]
        if shutil.which("ninja"):
            configure += ["-G", "Ninja"]
        # --fresh: an earlier isolated build leaves a cache that names a ninja which no longer exists.
        root = str(Path(__file__).resolve().parent)
        subprocess.run([cmake, "--fresh", "-S", root, "-B", str(build), *configure], check=True)
        subprocess.run([cmake, "--build", str(build), "--parallel"], check=True)


setup(
    packages=[*find_packages(include=["segclip_fast", "segclip_fast.*"]), *FOLDERS],
    package_dir=FOLDERS,
    package_data={name: ["*.yaml"] for name in FOLDERS},
    ext_modules=[Extension("segclip_fast._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    zip_safe=False,
)
