# SPDX-License-Identifier: Apache-2.0
"""Reads what every kernel of the built CUDA library needs, GPU or not, and prints it.

python scripts/cuda_resources.py                   # tables; exit code 1 if a budget is exceeded
python scripts/cuda_resources.py --write           # and into docs/kernels/sm80.md and sm90.md
python scripts/cuda_resources.py --library FILE    # another than the installed package's
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "python_tests"))

from page_tables import replace_table, table
from support import cuda_resources
from support.cuda_resources import INSTRUCTIONS, Budget, Kernel

import fastproto
from fastproto.op import library

ROOT = Path(__file__).resolve().parent.parent
PAGES = {name: ROOT / "docs" / "kernels" / f"{name}.md" for name in ("sm80", "sm90")}
LIBRARY = Path(fastproto.__file__).parent / "lib" / "libfastproto_cuda.so"


def table_of(kernels: list[Kernel], budgets: dict[str, Budget], ptx: dict[str, int]) -> str:
    """Markdown: a line per kernel; registers of a thread for each chip."""
    chips = list(dict.fromkeys(kernel.chip for kernel in kernels))
    extra = ["sm_100"] if any(kernel.symbol in ptx for kernel in kernels) else []
    instructions = [
        name for name in INSTRUCTIONS if any(kernel.instructions[name] for kernel in kernels)
    ]
    titles = ["kernel", "threads", *(f"registers {chip}" for chip in chips + extra)]
    titles += ["stack, local", "shared KiB", *instructions]
    groups: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        groups.setdefault(kernel.label, []).append(kernel)
    rows = []
    for label, group in sorted(groups.items()):
        budget = budgets.get(group[0].traits)
        by_chip = {kernel.chip: kernel for kernel in group}
        cells = [f"`{label}`", "" if budget is None else str(budget.threads)]
        cells += [str(by_chip[chip].registers) if chip in by_chip else "" for chip in chips]
        cells += [str(ptx.get(group[0].symbol, "")) for _ in extra]
        cells.append(str(max(kernel.stack + kernel.local for kernel in group)))
        cells.append("" if budget is None else f"{budget.shared / 1024:.1f}")
        for name in instructions:
            counts = sorted({kernel.instructions[name] for kernel in group})
            cells.append(" to ".join(dict.fromkeys((str(counts[0]), str(counts[-1])))))
        rows.append(cells)
    version = library.build_info().get("cuda_compiler") or "unknown"
    source = f"<sub>nvcc {version}; `python scripts/cuda_resources.py --write`</sub>"
    return f"{table('', titles, rows)}\n\n{source}"


def main() -> int:
    """Read, print, and say whether all is well."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--library", type=Path, default=LIBRARY, metavar="FILE")
    parser.add_argument("--write", action="store_true", help="into docs/kernels")
    arguments = parser.parse_args()
    reason = cuda_resources.why_not()
    if reason is None and not arguments.library.is_file():
        reason = f"there is no {arguments.library}"
    if reason is not None:
        print(f"cuda_resources.py: cannot run: {reason}.", file=sys.stderr)
        return 2
    kernels = cuda_resources.kernels(arguments.library)
    budgets = cuda_resources.budgets(kernels, ROOT / "csrc")
    bad = cuda_resources.all_complaints(kernels, budgets)
    ptx: dict[str, int] = {}
    if cuda_resources.ptxas() is None:
        print("sm_100: not assembled, there is no nvcc", file=sys.stderr)
    else:
        objections, ptx = cuda_resources.assemble(arguments.library, "sm_100")
        bad += [f"sm_100: {objection}" for objection in objections]
    for name, page in PAGES.items():
        chosen = [kernel for kernel in kernels if kernel.name.startswith(f"{name}::")]
        if not chosen:
            continue
        text = table_of(chosen, budgets, ptx)
        print(f"\n{name}\n\n{text}")
        if arguments.write:
            replace_table(page, "resources", text)
    print("\n".join(bad), file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
