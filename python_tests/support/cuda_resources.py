# SPDX-License-Identifier: Apache-2.0
"""What the kernels of the compiled CUDA library need, read from its machine code; no GPU involved.

Registers, stack and local memory are those of the binary, by ``cuobjdump``; matrix and tensor
memory instructions are counted in its disassembly, and minima with a predicate, which no kernel may
have. What a kernel may need stands in the ``Traits`` it is compiled with (csrc/cuda): a small
program, compiled here, prints those.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from fastproto.op.chips import SHARED_MEMORY

INSTRUCTIONS = ("HMMA", "HGMMA", "UTMALDG")
REGISTERS = 65536
"""Of a multiprocessor, and so of a block."""
CLAMPED = "VIMNMX with a predicate"
"""An integer minimum or maximum that also says which of its operands it was. ptxas 13.0 makes it of
comparisons with a clamped value, and for sm_90 branches on it wrongly (csrc/cuda/sm80/tiles.cuh).
Outputs follow the destination; the last operand chooses minimum or maximum and is none."""
MORE, FEWER = "registers of a consumer", "registers of a producer"
"""What setmaxnreg leaves a thread; together no more than all had at the launch, or the block waits
for ever."""
_MAX_REGISTERS = re.compile(r"\bUSETMAXREG\.(TRY_ALLOC|DEALLOC)\b.*\b(0x[0-9a-f]+)")
_CLAMPED = re.compile(r"\bU?VI\w*MNMX[\w.]*\s+U?R\w+,\s*(?:!?U?PT,\s*)*U?P\d,")


class Budget(NamedTuple):
    """What ``Traits`` promise: threads and bytes of a block, registers of a thread at most
    (``kMaxRegisters``; 255 where it is not given).
    """

    threads: int
    registers: int
    shared: int


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel of the library, for one architecture; bytes and registers are a thread's.

    Attributes:
        symbol: Its mangled name.
        name: Without parameters and the package's namespaces: ``sm80::forward_kernel``.
        traits: Its template's arguments as C++ wants them, or "".
        chip: "sm_80".
        local: Bytes of local memory: spilled registers, arrays with computed indices.
        instructions: How many of each of :data:`INSTRUCTIONS`, and :data:`CLAMPED`; :data:`MORE`
            and :data:`FEWER`.
    """

    symbol: str
    name: str
    traits: str
    chip: str
    registers: int
    stack: int
    local: int
    instructions: dict[str, int] = dataclasses.field(hash=False)

    @property
    def label(self) -> str:
        """For tables and test ids."""
        arguments = re.sub(r"\b(?:\w+::)+", "", self.traits)
        return f"{self.name}<{arguments}>" if arguments else self.name


@functools.cache
def tool(name: str) -> Path | None:
    """NVIDIA's cuobjdump or nvdisasm: on PATH, or the one that comes with Triton."""
    found = shutil.which(name)
    if found is not None:
        return Path(found)
    try:
        import triton.backends.nvidia
    except ImportError:
        return None
    bundled = Path(triton.backends.nvidia.__file__).parent / "bin" / name
    return bundled if bundled.is_file() else None


@functools.cache
def ptxas() -> Path | None:
    """The assembler that belongs to the nvcc on PATH: another's may not know its PTX."""
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if nvcc is None:
        return None
    command = [nvcc, "-dryrun", "-x", "cu", "-c", os.devnull]
    report = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    folder = re.search(r"^#\$ _HERE_=(.*)$", report, flags=re.MULTILINE)
    path = Path(folder[1]) / "ptxas" if folder is not None else None
    return path if path is not None and path.is_file() else None


def why_not() -> str | None:
    """Why no library can be read here, in a sentence; None if it can."""
    for name in ("cuobjdump", "nvdisasm"):
        if tool(name) is None:
            return f"there is no {name}, neither on PATH nor in an installed triton"
    return None if shutil.which("c++filt") else "there is no c++filt"


def kernels(library: Path) -> list[Kernel]:
    """Every kernel in ``library``, once per architecture it has machine code for."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _ask("cuobjdump", "-xelf", "all", library.resolve(), cwd=folder)
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            parts = list(pool.map(_kernels_of_cubin, sorted(folder.glob("*.cubin"))))
    found = [kernel for part in parts for kernel in part]
    symbols = "\n".join(kernel.symbol for kernel in found)
    names = [_split(line) for line in _output(["c++filt"], given=symbols).splitlines()]
    return [
        dataclasses.replace(kernel, name=name, traits=traits)
        for kernel, (name, traits) in zip(found, names, strict=True)
    ]


def _kernels_of_cubin(file: Path) -> list[Kernel]:
    """Without their readable names."""
    chip = re.search(r"\.(sm_\w+)\.cubin$", file.name)
    assert chip is not None, file.name
    usage = _ask("cuobjdump", "-res-usage", file)
    counts = _count_instructions(file)
    pattern = r"^ Function (\w+):\s+REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)"
    return [
        Kernel(symbol, "", "", chip[1], int(registers), int(stack), int(local), counts[symbol])
        for symbol, registers, stack, local in re.findall(pattern, usage, flags=re.MULTILINE)
    ]


EMULATOR = Path(__file__).parent / "emulator"
_BUDGETS = """
#define FASTPROTO_EMULATE
#include <cstdio>
{includes}
template <class T> concept Traits = requires {{ T::kThreads; T::kSharedBytes; }};
template <class T> constexpr int most_registers() {{
  if constexpr (requires {{ T::kMaxRegisters; }}) return int(T::kMaxRegisters);
  else return 255;
}}
template <class T> void print(int index) {{
  if constexpr (Traits<T>)
    std::printf("%d %d %d %d\\n", index, int(T::kThreads), most_registers<T>(),
                int(T::kSharedBytes));
}}
int main() {{ {prints} }}
"""


def budgets(kernels: Iterable[Kernel], sources: Path) -> dict[str, Budget]:
    """Of the kernels whose first template argument is one, by ``traits``; ``sources`` is the folder
    ``csrc`` that the library was built from.
    """
    wanted = sorted({kernel.traits for kernel in kernels if kernel.traits})
    headers = [
        path
        for folder in ("sm80", "sm90")
        for path in sorted((sources / "cuda" / folder).glob("*.cuh"))
    ]
    program = _BUDGETS.format(
        includes="\n".join(f'#include "{path}"' for path in headers),
        prints="\n".join(f"print<{traits}>({index});" for index, traits in enumerate(wanted)),
    )
    compiler = os.environ.get("CXX") or shutil.which("g++") or "c++"
    options = ["-std=gnu++20", "-O0", "-w", "-pthread", f"-I{EMULATOR}", "-x", "c++", "-"]
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "budgets"
        _output([*compiler.split(), *options, "-o", binary], given=program)
        lines = [list(map(int, line.split())) for line in _output([binary]).splitlines()]
    return {wanted[index]: Budget(*numbers) for index, *numbers in lines}


def wanted_instruction(kernel: Kernel) -> str | None:
    """The matrix instruction that a kernel is written for."""
    folder, _, name = kernel.name.rpartition("::")
    if folder not in ("sm80", "sm90") or "stats" in name:
        return None
    return "HGMMA" if folder == "sm90" and "latency" not in name else "HMMA"


def complaints(kernel: Kernel, budget: Budget | None) -> list[str]:
    """What is wrong with a kernel, in sentences."""
    found = []
    if kernel.stack or kernel.local:
        found.append(f"{kernel.stack} bytes of stack, {kernel.local} of local memory; allowed: 0")
    if kernel.instructions[CLAMPED]:
        found.append(f"{kernel.instructions[CLAMPED]} {CLAMPED}; allowed: 0")
    wanted = wanted_instruction(kernel)
    if wanted is not None and not kernel.instructions[wanted]:
        found.append(f"no {wanted}; allowed: some")
    if budget is None:
        if wanted is not None:
            found.append("no budget; allowed: Traits with kThreads and kSharedBytes")
        return found
    if kernel.registers > budget.registers:
        found.append(f"{kernel.registers} registers; allowed by its Traits: {budget.registers}")
    of_block = -(-kernel.registers // 8) * 8 * budget.threads  # handed out in eights
    if of_block > REGISTERS:
        found.append(f"{of_block} registers of a block; allowed: {REGISTERS}")
    asked = (budget.threads - 128) * kernel.instructions[MORE] + 128 * kernel.instructions[FEWER]
    if asked > kernel.registers * budget.threads:
        found.append(f"setmaxnreg: {asked}; allowed: {kernel.registers * budget.threads}")
    # Of other chips the plan asks the driver.
    allowed = SHARED_MEMORY.get(int(kernel.chip.strip("sm_af")))
    if allowed is not None and budget.shared > allowed:
        found.append(f"{budget.shared} bytes of shared memory; allowed: {allowed}")
    return found


def all_complaints(kernels: Iterable[Kernel], budgets: dict[str, Budget]) -> list[str]:
    """What is wrong with any of them, each with the kernel's name."""
    return [
        f"{kernel.label} {kernel.chip}: {complaint}"
        for kernel in kernels
        for complaint in complaints(kernel, budgets.get(kernel.traits))
    ]


def assemble(library: Path, chip: str) -> tuple[list[str], dict[str, int]]:
    """Assembles the PTX in ``library`` for another chip.

    Returns:
        What the assembler objects to, spills and local memory included, and :data:`CLAMPED`; and
        the registers of a thread by the kernel's symbol.
    """
    assembler = ptxas()
    assert assembler is not None

    def one(file: Path) -> tuple[str, str]:
        options = [f"-arch={chip}", "-v", "-warn-spills", "-warn-lmem-usage", "-Werror"]
        output = file.with_suffix(".cubin")
        command = [str(assembler), *options, str(file), "-o", str(output)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        wrong = re.findall(r"^ptxas (?!info).*$", result.stderr, flags=re.MULTILINE)
        if result.returncode != 0:
            wrong = wrong or [f"exit code {result.returncode}"]
        elif clamped := sum(counts[CLAMPED] for counts in _count_instructions(output).values()):
            wrong.append(f"{clamped} {CLAMPED}")
        return "; ".join(f"{file.name}: {text}" for text in wrong), result.stderr

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _ask("cuobjdump", "-xptx", "all", library.resolve(), cwd=folder)
        files = sorted(folder.glob("*.ptx"))
        if not files:
            return [f"{library.name}: found no PTX"], {}
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            reports = list(pool.map(one, files))
    pattern = r"Compiling entry function '(\w+)'(?:.*\n)*?.*Used (\d+) registers"
    registers = {
        symbol: int(count) for _, report in reports for symbol, count in re.findall(pattern, report)
    }
    return [text for text, _ in reports if text], registers


def ptx_architectures(library: Path) -> set[str]:
    """For which architectures ``library`` holds PTX."""
    report = _ask("cuobjdump", "-lptx", library)
    return set(re.findall(r"\.(sm_\w+)\.ptx$", report, flags=re.MULTILINE))


def _count_instructions(file: Path) -> dict[str, dict[str, int]]:
    """By symbol."""
    found: dict[str, dict[str, int]] = {}
    counts: dict[str, int] = {}
    # Without data flow (-ndf), which takes most of the time.
    for line in _ask("nvdisasm", "-c", "-ndf", file).splitlines():
        if line.startswith(".text."):
            counts = found[line[6:-1]] = dict.fromkeys((*INSTRUCTIONS, CLAMPED, MORE, FEWER), 0)
        elif "MMA" in line or "UTMA" in line:
            for name in re.findall(rf"\b({'|'.join(INSTRUCTIONS)})\b", line)[:1]:
                counts[name] += 1
        elif "MNMX" in line:
            counts[CLAMPED] += _CLAMPED.search(line) is not None
        elif "USETMAXREG" in line and (asked := _MAX_REGISTERS.search(line)):
            counts[MORE if asked[1] == "TRY_ALLOC" else FEWER] = int(asked[2], 16)
    return found


def _split(function: str) -> tuple[str, str]:
    """Name and first template argument of ``void space::name<argument, ...>(parameters)``."""
    head = re.match(r"(?:void )?((?:\(anonymous namespace\)|\w+|::)+)", function)
    assert head is not None, function
    name = re.sub(r"^fastproto::(?:cuda::)?|\(anonymous namespace\)::", "", head[1])
    name = name.removeprefix("fastproto::")
    rest = function[head.end() :]
    if not rest.startswith("<"):
        return name, ""
    depth = 0
    for index, letter in enumerate(rest):
        depth += {"<": 1, "(": 1, ">": -1, ")": -1}.get(letter, 0)
        if depth == 0 or (depth == 1 and letter == ","):
            return name, rest[1:index].strip()
    raise AssertionError(function)


def _ask(name: str, *arguments: str | Path, cwd: Path | None = None) -> str:
    """Of one of NVIDIA's tools."""
    path = tool(name)
    assert path is not None  # why_not() has looked
    return _output([path, *arguments], cwd)


def _output(command: Sequence[str | Path], cwd: Path | None = None, given: str = "") -> str:
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=cwd, input=given
    )
    if result.returncode != 0:
        text = result.stderr or result.stdout
        raise RuntimeError(f"{Path(command[0]).name} failed: {text.strip()[-4000:]}")
    return result.stdout
