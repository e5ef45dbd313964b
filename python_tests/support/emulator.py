# SPDX-License-Identifier: Apache-2.0
"""The CUDA backend without a GPU: its kernels run lane by lane on the CPU.

The sources of ``libfastproto_cuda`` are compiled as C++ against ``csrc/cuda/emulator`` and become
ops of CPU tensors, ``fastproto_emulated::proto_attention_fwd`` and ``_bwd``. Slow, and exact in
what matters: who reads what, when, rounded how. Needs a source checkout and a C++ compiler.

The environment is read at each call: FASTPROTO_CUDA_KERNELS forces a family of kernels,
FASTPROTO_EMULATE_CAPABILITY says which chip it is (90, an H200, unless set), FASTPROTO_EMULATE_SEED
lets threads run in a random order, FASTPROTO_EMULATE_PROXIES=1 makes it an error that TMA or WGMMA
uses shared memory whose writer has run no fence (slow). :func:`pretending` sets them for a while.
Built under FASTPROTO_SANITIZE=1, every access of a kernel to a tensor is checked by
AddressSanitizer.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from fastproto import functional
from fastproto.op import autograd, native
from support.environment import environment

_FLAGS = (
    "-std=gnu++20",
    "-O2",
    "-ffp-contract=off",  # what is multiply_add in the kernels, and only that, is one operation
    "-fno-math-errno",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wno-unknown-pragmas",
    "-DFASTPROTO_EMULATE",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
)


class EmulatorError(RuntimeError):
    """The emulated library cannot be built here."""


def sources() -> Path:
    """Root of the source checkout: around this package, or around the current folder.

    Raises:
        EmulatorError: There is none.
    """
    for start in (Path(__file__).resolve().parents[2], *(Path.cwd() / "x").parents):
        if (start / "csrc" / "cuda" / "emulator" / "cuda.h").is_file():
            return start
    raise EmulatorError(
        "the emulator is built from fastproto's sources: found none around "
        f"{Path(__file__).parent} or {Path.cwd()}; run from a source checkout"
    )


def _compiler() -> str:
    for name in (os.environ.get("CXX", "").split() or ["g++"])[0], "g++", "clang++":
        if shutil.which(name):
            return name
    raise EmulatorError("the emulator needs a C++ compiler: found neither CXX, g++ nor clang++")


def has_sm90() -> bool:
    """Whether the sources hold kernels for Hopper."""
    return any(sources().glob("csrc/cuda/sm90/instantiations/*.cu"))


@functools.cache
def build() -> Path:
    """Compile the emulated library, or find it compiled from the same sources.

    Raises:
        EmulatorError: No sources, no compiler, or it does not compile; says which.
    """
    root, compiler = sources(), _compiler()
    torch_folder = Path(torch.__file__).parent
    flags = [*_FLAGS, *(["-DFASTPROTO_SM90"] if has_sm90() else [])]
    flags += ["-isystem", str(torch_folder / "include")]
    if os.environ.get("FASTPROTO_SANITIZE") == "1":  # as in setup.py; `make sanitize`
        flags += ["-fsanitize=address", "-O1", "-g1"]
    units = sorted(
        file
        for pattern in (
            "csrc/api/*_cuda.cpp",
            "csrc/cuda/emulator/*.cpp",
            "csrc/cuda/**/instantiations/*.cu",
        )
        for file in root.glob(pattern)
    )
    state = hashlib.sha256(repr((compiler, flags, torch.__version__)).encode())
    for file in sorted((root / "csrc").rglob("*")):
        if file.is_file() and file.parent.name not in ("cpu", "bindings", "template"):
            state.update(str(file.relative_to(root)).encode())
            state.update(file.read_bytes())
    folder = root / "build" / "emulator"
    library = folder / f"libfastproto_emulated-{state.hexdigest()[:16]}.so"
    if library.is_file():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        objects = [Path(scratch) / f"{index}.o" for index in range(len(units))]

        def compile_unit(unit: Path, to: Path) -> None:
            _run([compiler, *flags, "-x", "c++", "-c", str(unit), "-o", str(to)])

        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_unit, units, objects))
        linked = Path(scratch) / library.name
        libraries = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10", "-pthread"]
        _run([compiler, *flags, "-shared", "-o", str(linked), *map(str, objects), *libraries])
        for old in folder.glob("libfastproto_emulated-*.so"):
            old.unlink(missing_ok=True)
        linked.replace(library)
    return library


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise EmulatorError(f"the emulator does not compile: {' '.join(command)}\n{result.stderr}")


@functools.cache
def load() -> autograd.OpPair:
    """Build the library if need be, and register its ops."""
    torch.ops.load_library(build())
    name = "fastproto_emulated::proto_attention_"
    pair = autograd.library_pair("native", f"{name}fwd", f"{name}bwd")
    torch.library.register_fake(pair.forward, functools.partial(native.fake_forward, True))
    torch.library.register_fake(pair.backward, native.fake_backward)
    autograd.register(pair)
    return pair


def proto_attention(
    feat: Tensor,
    protos: Tensor,
    offsets: Tensor,
    *,
    temperature: float | Tensor = 0.05,
    eps: float = 1e-6,
    concat: bool = True,
    tf32: bool = False,
) -> Tensor:
    """As :func:`fastproto.proto_attention` with backend "native" on a GPU, for CPU tensors.

    As there, nothing checks the values of ``offsets`` or of a tensor ``temperature``.
    """
    pair = load()
    functional._check(feat, protos, offsets, temperature, eps)
    return autograd.call(pair, feat, protos, offsets, temperature, eps, concat, (tf32,))


def pretending(
    *,
    kernels: str | None = None,
    capability: int | None = None,
    seed: int | None = None,
    proxies: bool | None = None,
) -> contextlib.AbstractContextManager[None]:
    """Set what the emulated library reads from the environment, and put it back."""
    wanted = {
        "FASTPROTO_CUDA_KERNELS": kernels,
        "FASTPROTO_EMULATE_CAPABILITY": capability,
        "FASTPROTO_EMULATE_SEED": seed,
        "FASTPROTO_EMULATE_PROXIES": None if proxies is None else int(proxies),
    }
    return environment(**{name: str(x) for name, x in wanted.items() if x is not None})
