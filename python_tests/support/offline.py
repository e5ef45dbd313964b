# SPDX-License-Identifier: Apache-2.0
"""Compiles Triton launches for GPUs that are not there, and reads what came out.

Not under ``TRITON_INTERPRET=1``. Registers, stack (spills) and shared memory are those of the real
binary, by the ``cuobjdump`` that comes with Triton; instructions are counted in its PTX.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
import triton.backends.nvidia
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastproto.op.chips import SHARED_MEMORY
from fastproto.op.triton import launch
from fastproto.op.triton.configs import KERNELS, TABLE, Config, Plan
from fastproto.op.triton.launch import Launch

CUOBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
SHARED_LIMIT = 64 * 1024
"""Bytes that a program has on any GPU."""
_TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
}


@dataclasses.dataclass(frozen=True)
class Resources:
    """What a kernel needs.

    Attributes:
        registers: Of a thread.
        stack: Bytes of local memory of a thread: spilled registers.
        shared: Bytes of shared memory of a program.
        instructions: Kinds of matrix instructions.
    """

    registers: int
    stack: int
    shared: int
    instructions: tuple[str, ...]


def source_of(launch: Launch, number: str = "fp32") -> ASTSource:
    """The launch as Triton's just-in-time compiler would specialise it; ``number``: a float."""
    signature: dict[str, str] = {}
    constants = dict(launch.constants)
    attributes: dict[tuple[int, ...], Any] = {}
    not_specialised = launch.kernel.do_not_specialize
    for index, name in enumerate(launch.kernel.arg_names):
        value = launch.arguments.get(name)
        if name in constants or value is None:
            signature[name] = "constexpr"
            constants.setdefault(name, None)
        elif isinstance(value, Tensor):
            signature[name] = f"*{_TYPES[value.dtype]}"
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = number
        elif value == 1 and name not in not_specialised:
            signature[name] = "constexpr"
            constants[name] = 1
        else:
            signature[name] = "i32"
            if value % 16 == 0 and name not in not_specialised:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def compile_launch(launch: Launch, capability: int, number: str = "fp32") -> Resources:
    """Compile for ``sm_<capability>``; ``number`` as in `source_of`."""
    options = {"num_warps": launch.config.warps, "num_stages": launch.config.stages}
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source_of(launch, number), target=target, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report = subprocess.run(
            [CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    usage = re.search(r"Function \w+:\s+REG:(\d+) STACK:(\d+)", report)
    if usage is None:
        raise RuntimeError(f"{CUOBJDUMP} -res-usage: found {report!r}; allowed: a function's usage")
    kinds = r"wgmma\.mma_async|mma\.sync|tcgen05\.mma"
    found = sorted(set(re.findall(kinds, compiled.asm["ptx"])))
    return Resources(int(usage[1]), int(usage[2]), compiled.metadata.shared, tuple(found))


def launches(
    config: Config,
    kernel: str,
    dtype: torch.dtype,
    *,
    dim: int = 512,
    channels_last: bool = False,
    save: bool = True,
    precision: str = "tf32x3",
) -> Launch:
    """The launch of one kernel with one configuration: a training step of 16 x 16 pixels."""
    fitted = config.fit(dim)
    plan = Plan(fitted, fitted, fitted)
    feat = torch.empty(2, 2, 16, 16, dim, dtype=dtype, device="meta").movedim(-1, 2)
    if not channels_last:
        feat = feat.contiguous()
    protos = torch.empty(320, dim, dtype=dtype, device="meta")
    offsets = torch.empty(5, dtype=torch.int32, device="meta")
    found: list[Launch] = []
    settings: Any = (feat, protos, offsets, None)
    how: Any = {"plan": plan, "precision": precision}
    forward: Any = (*settings, 0.05, 1e-6, True, save)  # t, eps, concat
    out, *saved = launch.run_forward(found.append, *forward, **how)
    if save:
        options: Any = (0.05, 1e-6, True, True, True)  # t, eps, concat, needs, needs
        grad = torch.empty_like(out)
        launch.run_backward(found.append, grad, *settings, *saved, *options, **how)
    (wanted,) = [one for one in found if one.kernel.__name__ == f"{kernel}_kernel"]
    return wanted


def stats_launch(dtype: torch.dtype) -> Launch:
    """Statistics of the prototypes: one configuration for all."""
    found: list[Launch] = []
    protos = torch.empty(320, 512, dtype=dtype, device="meta")
    launch.proto_stats(found.append, protos, 1e-6)
    return found[0]


@dataclasses.dataclass(frozen=True)
class Case:
    """A configuration of the table in one of its uses."""

    kernel: str
    config: Config
    capability: int
    dtype: torch.dtype
    dim: int
    channels_last: bool
    save: bool
    precision: str

    @property
    def name(self) -> str:
        """For a test id."""
        parts = [
            self.kernel,
            f"d{self.dim}",
            f"sm{self.capability}",
            str(self.dtype)[6:],
            "channels_last" if self.channels_last else "nchw",
        ]
        if self.dtype == torch.float32:
            parts.append(self.precision)
        if not self.save:
            parts.append("inference")
        return "-".join(parts)

    def compile(self) -> Resources:
        """The kernel, for its chip."""
        wanted = launches(
            self.config,
            self.kernel,
            self.dtype,
            dim=self.dim,
            channels_last=self.channels_last,
            save=self.save,
            precision=self.precision,
        )
        return compile_launch(wanted, self.capability)


def cases() -> Iterator[Case]:
    """The table on every chip, in the types, layouts and modes that differ in code.

    For D = 512, and for 2048 (a ResNet-50's), which several programs share.
    """
    for kernel, dtype, capability, dim in itertools.product(
        KERNELS, TABLE, SHARED_MEMORY, (512, 2048)
    ):
        case = functools.partial(
            Case, kernel, getattr(TABLE[dtype], kernel), capability, dtype, dim
        )
        layouts = (False, True) if dtype != torch.float16 else (False,)
        precisions = ("tf32x3", "tf32") if dtype == torch.float32 else ("ieee",)
        for channels_last, precision in itertools.product(layouts, precisions):
            yield case(channels_last, True, precision)
        if kernel == "forward":
            yield case(False, False, precisions[0])
