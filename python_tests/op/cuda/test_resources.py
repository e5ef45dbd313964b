# SPDX-License-Identifier: Apache-2.0
"""The machine code of the installed CUDA library: no spills, within budget, on tensor cores; no
decision about a clamped value.

Nothing is compiled but a small program that prints the budgets; the PTX for newer GPUs is
assembled for one of them.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import pytest
from support import cuda_resources
from support.cuda_resources import CLAMPED, FEWER, MORE, Budget, Kernel

import fastproto
from fastproto.op import library

SOURCES = Path(__file__).resolve().parents[3] / "csrc"
LIBRARY = Path(fastproto.__file__).parent / "lib" / "libfastproto_cuda.so"

if not LIBRARY.is_file():
    pytest.skip("the package was built without nvcc", allow_module_level=True)
reason = cuda_resources.why_not()
if reason is not None:
    pytest.skip(reason, allow_module_level=True)


ARCHITECTURES = library.build_info()["cuda_architectures"].split()


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    return cuda_resources.kernels(LIBRARY)


def test_architectures(kernels: list[Kernel]) -> None:
    """sm90 for 90a alone; all else for every architecture, and as PTX for those to come."""
    plain = {f"sm_{name.rstrip('af')}" for name in ARCHITECTURES}
    found: dict[bool, set[str]] = {False: set(), True: set()}
    for kernel in kernels:
        found[kernel.name.startswith("sm90::")].add(kernel.chip)
    assert found[False] == plain
    assert found[True] <= {"sm_90a"}
    lowest = min(plain, key=lambda name: int(name[3:]))
    assert cuda_resources.ptx_architectures(LIBRARY) == {lowest}


def test_no_decision_rests_on_a_clamped_value(kernels: list[Kernel]) -> None:
    """The predicate of such a minimum was wrong on Hopper: pieces were stored out of bounds."""
    counts = {f"{kernel.label} {kernel.chip}": kernel.instructions[CLAMPED] for kernel in kernels}
    assert {label: count for label, count in counts.items() if count} == {}


def test_every_kernel_keeps_its_budget(kernels: list[Kernel]) -> None:
    budgets = cuda_resources.budgets(kernels, SOURCES)
    bad = cuda_resources.all_complaints(kernels, budgets)
    assert not bad, "\n".join(bad)
    assert len(budgets) > 1
    for each in kernels:
        if cuda_resources.wanted_instruction(each) == "HGMMA":
            assert each.instructions[MORE] > each.registers > each.instructions[FEWER] > 0


@pytest.mark.slow
@pytest.mark.skipif(cuda_resources.ptxas() is None, reason="there is no nvcc")
def test_newer_gpus_can_run_the_ptx(kernels: list[Kernel]) -> None:
    """Blackwell gets the sm80 kernels: without spills there, too."""
    objections, registers = cuda_resources.assemble(LIBRARY, "sm_100")
    assert not objections, "\n".join(objections)
    symbols = {kernel.symbol for kernel in kernels if not kernel.name.startswith("sm90::")}
    assert set(registers) == symbols


WGMMA = {"HMMA": 0, "HGMMA": 40, "UTMALDG": 4, CLAMPED: 0, MORE: 240, FEWER: 24}
GOOD = Kernel("_Z", "sm90::forward_kernel", "T", "sm_90a", 168, 0, 0, WGMMA)


def test_what_is_wrong_is_said() -> None:
    """The check would notice."""
    budget = Budget(384, 168, 200 * 1024)
    kernel = functools.partial(dataclasses.replace, GOOD)
    assert not cuda_resources.complaints(GOOD, budget)
    without = WGMMA | {"HMMA": 3, "HGMMA": 0}
    for wrong, allowed, words in (
        (kernel(stack=8), budget, "8 bytes of stack"),
        (kernel(local=16), budget, "16 of local memory"),
        (kernel(registers=160), Budget(128, 152, 0), "allowed by its Traits: 152"),
        (kernel(registers=169), Budget(384, 255, 0), "67584 registers of a block"),
        (kernel(instructions=WGMMA | {FEWER: 32}), budget, "setmaxnreg: 65536; allowed: 64512"),
        (GOOD, Budget(384, 168, 230 * 1024), "bytes of shared memory"),
        (kernel(chip="sm_80"), budget, "bytes of shared memory"),
        (kernel(instructions=without), budget, "no HGMMA"),
        (kernel(instructions=WGMMA | {CLAMPED: 2}), budget, "2 VIMNMX with a predicate"),
        (GOOD, None, "no budget"),
    ):
        (complaint,) = cuda_resources.complaints(wrong, allowed)
        assert words in complaint
    latency = kernel(name="sm90::forward_latency_kernel", instructions=without)
    assert not cuda_resources.complaints(latency, budget)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("@!P0 VIMNMX.RELU R10, P1, P1, R8, 0x8, PT ;", True),
        ("VIMNMX R10, PT, P0, R8, R9, !PT ;", True),
        ("UVIMNMX.U32 UR4, UP1, UPT, UR8, 0x8, UPT ;", True),
        ("@P1 VIMNMX.RELU R10, PT, PT, R8, 0x8, PT ;", False),
        ("@P1 VIMNMX.RELU R10, R8.reuse, 0x8, PT ;", False),
        ("VIMNMX R10, R8, R9, !P1 ;", False),
        ("VIADDMNMX R10, R8, -R9, 0x40, PT ;", False),
        ("ISETP.GE.AND P1, PT, R8, 0x8, PT ;", False),
    ],
)
def test_a_minimum_with_a_predicate_is_seen(text: str, found: bool) -> None:
    """Of its operands, the one that chooses minimum or maximum is no result."""
    assert bool(cuda_resources._CLAMPED.search(text)) == found


def test_names() -> None:
    """Of templates in templates, values in parentheses, kernels that are none."""
    assert cuda_resources._split(
        "void fastproto::cuda::sm80::f_kernel<fastproto::cuda::T<float, (fastproto::X)1>, 3>(int)"
    ) == ("sm80::f_kernel", "fastproto::cuda::T<float, (fastproto::X)1>")
    assert cuda_resources._split("fastproto::(anonymous namespace)::null_kernel(float const*)") == (
        "null_kernel",
        "",
    )
