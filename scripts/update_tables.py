# SPDX-License-Identifier: Apache-2.0
"""Writes the tables in README.md from the newest result files in benchmarks/results.

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``; no number is typed by hand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
METRICS = {"dice": "Dice", "hd95": "HD95 mm", "assd": "ASSD mm", "nsd": "NSD 2 mm"}


def newest(name: str) -> list[dict[str, Any]]:
    """The newest record of each result whose name begins with ``name``, by data set or machine."""
    latest: dict[str, Path] = {}
    for path in sorted(RESULTS.glob(f"????-??-??-{name}*.json")):
        latest[path.stem[11:]] = path
    return [
        json.loads(path.read_text(encoding="utf-8")) | {"file": path.name}
        for path in latest.values()
    ]


def provenance(record: dict[str, Any]) -> str:
    """One line: where the numbers come from."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return (
        f"<sub>{record['date']}, {record['machine']}, {versions}; `{record['command']}`; "
        f"`benchmarks/results/{record['file']}`</sub>"
    )


def cell(value: float | None) -> str:
    """A number for a table, or a dash where it is not defined."""
    return "-" if value is None else f"{value:.2f}"


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the numbers among ``values``."""
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers else None


def heldout() -> str:
    """Organs and patients that training never saw, per data set, beside the baseline."""
    blocks = []
    for record in newest("heldout"):
        training, methods = record["training"], record["methods"]
        columns = [(metric, "organ_slices", title) for metric, title in METRICS.items()]
        columns.append(("dice", "all_slices", "Dice, all slices"))
        lines = [
            f"**{record['data']}**: trained on {', '.join(record['base_classes'])} "
            f"({training['encoder']}, {training['steps']} steps at {training['image_size']} px, "
            f"{record['training_minutes']:.0f} minutes). The organs below were annotated in one "
            f"patient and segmented, one at a time, in {len(record['queries'])} patients training "
            "never read. Each cell: fastproto / baseline (prototype scores and bilinear "
            "upsampling, same encoder, no decoder), in the slices that hold the organ.",
            "",
            "| organ | " + " | ".join(title for *_, title in columns) + " |",
            "|---" * (1 + len(columns)) + "|",
        ]
        means: dict[tuple[str, str], list[Any]] = {}
        for index, row in enumerate(methods["fastproto"]["all_slices"]):
            cells = []
            for metric, counted, _ in columns:
                values = [
                    methods[name][counted][index][metric]["mean"]
                    for name in ("fastproto", "baseline")
                ]
                means.setdefault((metric, counted), []).append(values)
                cells.append(" / ".join(map(cell, values)))
            lines.append(f"| {row['organ']} | " + " | ".join(cells) + " |")
        dice = " | ".join(
            " / ".join(cell(mean(column)) for column in zip(*values, strict=True))
            if metric in ("dice", "nsd")
            else ""
            for (metric, _), values in means.items()
        )
        blocks.append("\n".join([*lines, f"| **mean** | {dice} |", "", provenance(record)]))
    return "\n\n".join(blocks)


def memory() -> str:
    """Peak resident memory, and the size of both networks."""
    blocks = []
    for record in newest("memory"):
        lines = ["| | peak resident memory |", "|---|---|"]
        lines += [f"| {case} | {mib} MiB |" for case, mib in record["peak_resident_mib"].items()]
        lines += ["", "| network | parameters | file |", "|---|---|---|"]
        lines += [
            f"| {name} | {size['parameters'] / 1e6:.2f} M | {size['file_mb']:.1f} MB |"
            for name, size in record["networks"].items()
        ]
        blocks.append("\n".join([*lines, "", provenance(record)]))
    return "\n\n".join(blocks)


TABLES: dict[str, Callable[[], str]] = {"heldout": heldout, "memory": memory}


def main() -> None:
    """Fill every table of README.md."""
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    for name, table in TABLES.items():
        pattern = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text, count = pattern.subn(lambda m, table=table: m[1] + table() + "\n" + m[2], text)
        if count != 1:
            raise SystemExit(f"README.md: found {count} tables {name!r}; allowed: one.")
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
