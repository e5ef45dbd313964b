# SPDX-License-Identifier: Apache-2.0
"""Loads the native libraries of the installed package and explains why one is not there."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch

from fastproto.errors import ArgumentError

logger = logging.getLogger("fastproto")

_FOLDER = Path(__file__).parents[1] / "lib"
_SUFFIX = ".dylib" if sys.platform == "darwin" else ".so"


@functools.cache
def why_not_cpu() -> str | None:
    """Loads the CPU library; why it cannot be used, in a sentence, or None when it can."""
    reason = _load("fastproto_cpu")
    if reason is None:
        cpu_level()  # refuses FASTPROTO_CPU_LEVEL where it names none
    return reason


@functools.cache
def why_not_cuda() -> str | None:
    """Loads the CUDA library; why it cannot be used, in a sentence, or None when it can.

    A CPU-only torch never loads it: its symbols are those of libtorch_cuda.
    """
    if torch.version.cuda is None:
        return "this torch has no CUDA"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return why_not_cpu() or _load("fastproto_cuda") or _why_not_driver()


def cuda_is_broken() -> str | None:
    """Why the CUDA library that was compiled does not work although a GPU is there, or None."""
    compiled = build_info().get("cuda_compiler", "")
    if not compiled or not torch.cuda.is_available() or os.environ.get("FASTPROTO_NATIVE") == "0":
        return None
    return why_not_cuda()


def _why_not_driver() -> str | None:
    """Why the driver cannot run what nvcc compiled: a major version's runs on all its drivers."""
    built_with = build_info().get("cuda_compiler", "")
    known = _driver_knows()
    if known is None or not built_with or known // 1000 >= int(built_with.split(".")[0]):
        return None
    return (
        f"the driver knows CUDA {known // 1000}.{known % 1000 // 10}, the library was built with "
        f"{built_with}; update the driver, or reinstall with an nvcc that the driver knows"
    )


def _driver_knows() -> int | None:
    """Newest CUDA of the driver, e.g. 13000; None where there is no driver to ask."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    return version.value if driver.cuDriverGetVersion(ctypes.byref(version)) == 0 else None


def _path(name: str) -> Path:
    return _FOLDER / f"lib{name}{_SUFFIX}"


def _load(name: str) -> str | None:
    if os.environ.get("FASTPROTO_NATIVE") == "0":
        return "FASTPROTO_NATIVE=0 is set"
    path = _path(name)
    if not path.is_file():
        tools = "nvcc >= 12.5" if name == "fastproto_cuda" else "a C++ compiler"
        return (
            f"the package was installed without {path.name}; reinstall it where torch and {tools} "
            "are found"
        )
    try:
        torch.ops.load_library(path)
    except OSError as error:
        built = build_info().get("built_with_torch", "unknown")
        # torch names the file, the loader's own words are behind it.
        why = str(error.__cause__ or error).replace(str(path), path.name)
        return (
            f"{path.name} does not load ({why}); it was built with torch {built} for torch >= "
            f"{build_info().get('stable_abi', '2.10')}, this is torch {torch.__version__}"
        )
    return None


def build_info() -> dict[str, Any]:
    """Compiler, torch, stable ABI and CUDA architectures of the native build; empty when pure."""
    module = _bindings()
    return dict(module.build_info()) if module is not None else {}


def built_for() -> list[str]:
    """Architectures of the CUDA library, as FASTPROTO_CUDA_ARCHS has them."""
    return str(build_info().get("cuda_architectures", "")).split()


def cpu_level() -> str | None:
    """Instruction set of the CPU kernels: "baseline", "avx2", "avx512", "avx512bf16", "amx".

    None without native code.

    Raises:
        ArgumentError: FASTPROTO_CPU_LEVEL names none that this CPU has.
    """
    module = _bindings()
    try:
        return module.cpu_level() if module is not None else None
    except RuntimeError as error:
        raise ArgumentError(
            "FASTPROTO_CPU_LEVEL",
            found=repr(os.environ.get("FASTPROTO_CPU_LEVEL")),
            allowed="baseline, avx2, avx512, avx512bf16 or amx, if this CPU and build have it",
        ) from error


def _bindings() -> Any:
    if importlib.util.find_spec("fastproto._C") is None:
        return None
    from fastproto import _C

    return _C


@functools.cache
def say_once(sentence: str) -> None:
    """Log a sentence at WARNING, once a process."""
    logger.warning(sentence)
