# SPDX-License-Identifier: Apache-2.0
"""The CUDA library of the installed package: there wherever nvcc was, and touched by no CPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

import fastproto
from fastproto.op import library

LIBRARY = Path(fastproto.__file__).parent / "lib" / "libfastproto_cuda.so"
BUILT = bool(library.build_info().get("cuda_compiler"))


def python(code: str, *arguments: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=tempfile.gettempdir(),
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


needs_library = pytest.mark.skipif(not BUILT, reason="the package was built without nvcc")


@pytest.mark.skipif(
    not library.build_info(), reason="the package was installed without native code"
)
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
@pytest.mark.skipif("FASTPROTO_CUDA" in os.environ, reason="FASTPROTO_CUDA is set")
def test_is_built_where_nvcc_is_found() -> None:
    assert BUILT


def test_is_installed_where_it_was_built() -> None:
    assert LIBRARY.is_file() == BUILT
    assert bool(library.build_info().get("cuda_architectures")) == BUILT


USE = """
import torch, fastproto
from support.problems import PROBLEMS
feat, protos, offsets = PROBLEMS[4].make()
feat.requires_grad_()
fastproto.proto_attention(feat, protos, offsets).sum().backward()
fastproto.op.backends.describe()
maps = open("/proc/self/maps").read()
assert "libfastproto_cpu" in maps
print("libfastproto_cuda" in maps)
"""


@needs_library
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="there is no /proc")
def test_nothing_loads_it_without_a_gpu() -> None:
    """Not even who asks which backends there are."""
    result = python(USE, PYTHONPATH=str(Path(__file__).resolve().parents[1]))  # support
    assert result.returncode == 0, result.stderr
    assert result.stdout == "False\n"
    if torch.version.cuda is None:
        assert library.why_not_cuda() == "this torch has no CUDA"


@needs_library
def test_depends_on_torch_alone() -> None:
    """The runtime is linked in, and the driver's functions are looked up when they are needed."""
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("there is no readelf")
    report = subprocess.run(
        [readelf, "-d", LIBRARY], capture_output=True, text=True, check=True
    ).stdout
    needed = [line.split("[")[1].rstrip("]") for line in report.splitlines() if "(NEEDED)" in line]
    found = {name for name in needed if "cu" in name or "torch" in name}
    assert found == {"libtorch_cuda.so", "libtorch_cpu.so"}


LOAD = """
import ctypes, sys, torch, fastproto.op.backends
fastproto.op.backends.describe()  # the CPU library, which defines the schemas
ctypes.CDLL(sys.argv[1])
torch.ops.load_library(sys.argv[2])
print(torch._C._dispatch_has_kernel_for_dispatch_key("fastproto::proto_attention_fwd", "CUDA"))
"""


@needs_library
@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has a libtorch_cuda")
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_loads_beside_a_libtorch_cuda(tmp_path: Path) -> None:
    """Every symbol is found, where torch was loaded in no global scope: what a GPU's torch does."""
    stub = tmp_path / "libtorch_cuda.so"
    source = 'extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }'
    command = ["g++", "-shared", "-fPIC", f"-Wl,-soname,{stub.name}", "-x", "c++", "-", "-o", stub]
    subprocess.run(command, input=source, text=True, check=True)
    result = python(LOAD, stub, LIBRARY, LD_BIND_NOW="1")
    assert result.stdout == "True\n", result.stderr


@needs_library
def test_every_launcher_is_in_it() -> None:
    """A name that nothing defines would show where the library is loaded: on a GPU alone."""
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("there is no nm")
    command = [nm, "-DC", "--undefined-only", LIBRARY]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert not [line.strip() for line in report.splitlines() if "fastproto" in line]
