# SPDX-License-Identifier: Apache-2.0
"""Tables in Markdown, and where they stand in a page."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Columns = dict[str, Callable[[Row], str]]
"""Titles of columns, and what stands in them."""


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
