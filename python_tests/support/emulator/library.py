# SPDX-License-Identifier: Apache-2.0
"""The CUDA backend without a GPU: its kernels run lane by lane on the CPU.

The sources of ``libfastproto_cuda`` are compiled as C++ against the headers of this folder and
become ops of CPU tensors, ``fastproto_emulated::proto_attention_fwd`` and ``_bwd``. Slow, and exact
in what matters: who reads what, when, rounded how. Needs a C++ compiler.

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
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastproto import functional
from fastproto.op import autograd, native
from support.environment import environment

HEADERS = Path(__file__).parent
SOURCES = HEADERS.parents[2] / "csrc"
_FLAGS = (
    "-std=gnu++20",
    "-O1",  # compiles twice as fast, and runs as fast
    "-ffp-contract=off",  # what is multiply_add in the kernels, and only that, is one operation
    "-fno-math-errno",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wno-unknown-pragmas",
    "-DFASTPROTO_EMULATE",
    "-DFASTPROTO_SM90",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
)


def compiler() -> str | None:
    """The C++ compiler that is used: CXX, g++ or clang++."""
    wanted = os.environ.get("CXX", "g++").split()[:1]
    return next(filter(shutil.which, (*wanted, "g++", "clang++")), None)


def build(name: str, units: Sequence[Path], extra: Sequence[str] = ()) -> Path:
    """Compile a library against the emulator, or find it compiled from the same sources.

    Args:
        name: Of the library, in ``build/emulator``.
        units: Its C++ files.
        extra: More flags of the compiler.

    Raises:
        RuntimeError: It does not compile; with what the compiler says.
    """
    tool, torch_folder = compiler() or "c++", Path(torch.__file__).parent
    flags = [*_FLAGS, *extra, f"-I{HEADERS}", "-isystem", str(torch_folder / "include")]
    if os.environ.get("FASTPROTO_SANITIZE") == "1":  # as in setup.py; `make sanitize`
        flags += ["-fsanitize=address", "-O1", "-g1"]
    state = hashlib.sha256(repr((tool, flags, torch.__version__)).encode())
    for file in (*units, *sorted(SOURCES.rglob("*.*h")), *sorted(HEADERS.rglob("*.h"))):
        if file.parent.name not in ("cpu", "template"):
            state.update(str(file).encode() + file.read_bytes())
    folder = SOURCES.parent / "build" / "emulator"
    library = folder / f"lib{name}-{state.hexdigest()[:16]}.so"
    if library.is_file():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        objects = [str(Path(scratch) / f"{index}.o") for index in range(len(units))]

        def compile_unit(unit: Path, to: str) -> None:
            _run([tool, *flags, "-x", "c++", "-c", str(unit), "-o", to])

        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_unit, units, objects))
        linked = Path(scratch) / library.name
        libraries = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10", "-pthread"]
        _run([tool, *flags, "-shared", "-o", str(linked), *objects, *libraries])
        for old in folder.glob(f"lib{name}-*.so"):
            old.unlink(missing_ok=True)
        linked.replace(library)
    return library


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"the emulator does not compile: {' '.join(command)}\n{result.stderr}")


@functools.cache
def load() -> autograd.OpPair:
    """Build the library if need be, and register its ops."""
    kernels = sorted(SOURCES.glob("cuda/*/instantiations/*.cu"))
    library = build("fastproto_emulated", [SOURCES / "api" / "proto_attention_cuda.cpp", *kernels])
    names = [f"fastproto_emulated::proto_attention_{part}" for part in ("fwd", "bwd")]
    for name in names:
        schema = str(autograd.op(name.replace("_emulated", ""))._schema)
        torch.library.define(name, schema[schema.index("(") :])
    torch.ops.load_library(library)
    pair = autograd.library_pair("native", *names)
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
