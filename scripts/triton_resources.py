# SPDX-License-Identifier: Apache-2.0
"""Compiles every configuration of the Triton kernels' table, GPU or not, and prints what it needs.

python scripts/triton_resources.py            # a table; exit code 1 if anything spills
python scripts/triton_resources.py --write    # and into docs/kernels/triton.md
"""

from __future__ import annotations

import argparse
import concurrent.futures
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "python_tests"))

import torch
import triton
from page_tables import replace_table, table
from support.offline import SHARED_LIMIT, Case, Resources, cases
from triton.compiler.errors import CompilationError

PAGE = Path(__file__).resolve().parent.parent / "docs" / "kernels" / "triton.md"


def _compile(case: Case) -> Resources | str:
    try:
        return case.compile()
    except CompilationError as error:
        return str(error)


def table_of(results: list[tuple[Case, Resources]]) -> str:
    """Markdown: one line per kernel, chip and type, the worst of dimensions, layouts and modes."""
    groups: dict[tuple[str, ...], list[Resources]] = {}
    for case, found in results:
        config = case.config
        tile = f"{config.block_m} x {config.block_n} x {config.chunk}"
        split = f", {config.out_chunks} chunks, {config.warps} warps"
        kind = str(case.dtype)[6:]
        if case.dtype == torch.float32:
            kind += f" {case.precision}"
        key = (case.kernel, tile + split, f"sm_{case.capability}", kind)
        groups.setdefault(key, []).append(found)
    titles = ["kernel", "pixels x prototypes x channels", "chip", "type"]
    titles += ["registers", "stack", "shared KiB", "matrix instructions"]
    rows = []
    for key, found_all in groups.items():
        worst = [max(getattr(f, name) for f in found_all) for name in ("registers", "stack")]
        shared = f"{max(found.shared for found in found_all) / 1024:.0f}"
        kinds = ", ".join(sorted({kind for found in found_all for kind in found.instructions}))
        rows.append([*key, *map(str, worst), shared, kinds])
    versions = f"triton {triton.__version__}, torch {torch.__version__}"
    source = f"<sub>{versions}; `python scripts/triton_resources.py --write`</sub>"
    return f"{table('', titles, rows, 'llllrrrl')}\n\n{source}"


def main() -> int:
    """Compile, print, and say whether all is well."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"into {PAGE.name}")
    parser.add_argument("--filter", default="", help="only cases whose name contains this")
    arguments = parser.parse_args()
    todo = [case for case in cases() if arguments.filter in case.name]
    with concurrent.futures.ProcessPoolExecutor() as pool:
        outcomes = list(zip(todo, pool.map(_compile, todo), strict=True))
    results = [(case, found) for case, found in outcomes if isinstance(found, Resources)]
    text = table_of(results)
    print(text)
    bad = [f"{case.name}: {found}" for case, found in outcomes if isinstance(found, str)]
    bad += [
        f"{case.name}: {found}"
        for case, found in results
        if found.stack or found.shared > SHARED_LIMIT
    ]
    print("\n".join(bad), file=sys.stderr)
    if arguments.write:
        replace_table(PAGE, "resources", text)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
