# SPDX-License-Identifier: Apache-2.0
"""Tables in Markdown, where they stand in a page, and the records that they are made from."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

NO_RECORD = "No record in `benchmarks/results` yet."
Row = dict[str, Any]
Columns = dict[str, Callable[[Row], str]]
"""Titles of columns, and what stands in them."""


def newest(results: Path, name: str) -> list[Row]:
    """The newest record of each result whose name begins with ``name``, a pattern of glob."""
    found = sorted(results.glob(f"????-??-??-{name}*.json"))
    paths = {path.stem[11:]: path for path in found}.values()
    return [json.loads(path.read_text(encoding="utf-8")) | {"file": path.name} for path in paths]


def provenance(record: Row) -> str:
    """A link to where the page of all records says how these numbers were measured."""
    name = record["file"].removesuffix(".json")
    return f"<sub>Measured: [{name}](provenance.md#{name})</sub>"


def cell(value: float | None) -> str:
    """A number for a table, or a dash where it is not defined."""
    return "-" if value is None else f"{value:.2f}"


def table(
    title: str, columns: Columns | Sequence[str], rows: Iterable[Any], align: str = ""
) -> str:
    """A table, "" without rows; all columns but the first to the right, or as "llr" says."""
    if isinstance(columns, dict):
        rows = [[show(row) for show in columns.values()] for row in rows]
    rows, align = list(rows), align or "l" + "r" * (len(columns) - 1)
    rule = "|" + "".join("---:|" if side == "r" else "---|" for side in align)
    head, *lines = ["| " + " | ".join(row) + " |" for row in (columns, *rows)]
    titled = [f"**{title}**", ""] if title else []
    return "\n".join([*titled, head, rule, *lines]) if lines else ""


def replace_table(page: Path, name: str, content: str) -> None:
    """Put ``content`` between the marks of a table in ``page``; other scripts do, too."""
    pattern = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    text = page.read_text(encoding="utf-8")
    text, count = pattern.subn(lambda m: m[1] + content + "\n" + m[2], text)
    if count != 1:
        raise SystemExit(f"{page}: found {count} tables {name!r}; allowed: one.")
    page.write_text(text, encoding="utf-8")
