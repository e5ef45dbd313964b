# SPDX-License-Identifier: Apache-2.0
"""Thin front of CMakeLists.txt: finds torch and a compiler, drives CMake, or installs pure.

Environment: FASTPROTO_NATIVE=0 installs without native code; FASTPROTO_CUDA=auto|0|1 and
FASTPROTO_CUDA_ARCHS are handed to CMake; MAX_JOBS limits parallel compilation;
FASTPROTO_SANITIZE=1 builds the CPU library with ASan and UBSan, in build/sanitize.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
SANITIZE = os.environ.get("FASTPROTO_SANITIZE") == "1"


def find_torch() -> Path | None:
    """Folder of the torch of the environment installed into, also under pip's build isolation.

    Torch is no fixed build requirement: pip would download a second one, the newest for CUDA, and
    build against that. pip's isolated environment keeps the interpreter of the environment it
    installs into, so a torch there is found through sysconfig. Where there is none, torch is asked
    for (``setup_requires``, which pip reads first); the stable ABI fits whichever it then installs.
    """
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.submodule_search_locations:
        return Path(spec.submodule_search_locations[0])
    for key in ("purelib", "platlib"):
        candidate = Path(sysconfig.get_paths()[key]) / "torch"
        if (candidate / "include").is_dir():
            return candidate
    return None


def torch_version(torch: Path) -> str:
    """Version of the torch in ``torch``, read without importing it."""
    for line in (torch / "version.py").read_text(encoding="utf-8").splitlines():
        if line.startswith("__version__"):
            return line.split("=")[1].strip().strip("'\"")
    return "unknown"


def why_pure() -> str | None:
    """Why no native code can be built here, in a sentence; None where it can."""
    if os.environ.get("FASTPROTO_NATIVE") == "0":
        return "FASTPROTO_NATIVE=0 is set"
    compiler = os.environ.get("CXX", "c++").split()[0]
    if not any(shutil.which(name) for name in (compiler, "g++", "clang++")):
        return "no C++ compiler was found"
    return None


class CMakeBuild(build_ext):
    """Builds every target of CMakeLists.txt and installs them into the package."""

    def run(self) -> None:
        """Configure, build and install; fails loudly, as every error of a compiler should."""
        torch = find_torch()
        assert torch is not None  # why_pure() has looked
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        options = {
            "CMAKE_INSTALL_PREFIX": ROOT if self.inplace else Path(self.build_lib).resolve(),
            "FASTPROTO_TORCH_DIR": torch,
            "FASTPROTO_TORCH_VERSION": torch_version(torch),
            "FASTPROTO_CUDA": os.environ.get("FASTPROTO_CUDA", "auto"),
            "FASTPROTO_SANITIZE": "ON" if SANITIZE else "OFF",
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": subprocess.check_output(
                [sys.executable, "-m", "pybind11", "--cmakedir"], text=True
            ).strip(),
        }
        if ninja := shutil.which("ninja"):  # not an earlier build's, which pip has deleted
            options["CMAKE_MAKE_PROGRAM"] = ninja
        if "FASTPROTO_CUDA_ARCHS" in os.environ:
            options["FASTPROTO_CUDA_ARCHS"] = os.environ["FASTPROTO_CUDA_ARCHS"]
        definitions = [f"-D{key}={value}" for key, value in options.items()]
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.check_call(["cmake", "-G", "Ninja", "-S", ROOT, "-B", build, *definitions])
        subprocess.check_call(["cmake", "--build", build, "--parallel", jobs])
        subprocess.check_call(["cmake", "--install", build])

    def get_outputs(self) -> list[str]:
        """Files installed into the package, for the wheel's record."""
        package = Path(self.build_lib) / "fastproto"
        return [str(p) for pattern in ("lib/*", "_C*") for p in package.glob(pattern)]


reason = why_pure()
wants_torch = reason is None and find_torch() is None
if wants_torch and any(word.endswith("_wheel") for word in sys.argv):  # pip did not get it
    reason = "there is no torch to build against; install it first, or build with isolation"
if reason is not None:
    print(f"fastproto: no native code, plain PyTorch is used: {reason}")
setup(
    setup_requires=["torch>=2.10"] if wants_torch else [],
    ext_modules=[] if reason else [Extension("fastproto._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    # A folder of its own: the normal build's objects and cache stay what they are.
    options={"build": {"build_base": "build/sanitize"}} if SANITIZE else {},
)
