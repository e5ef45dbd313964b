# SPDX-License-Identifier: Apache-2.0
"""Tables of a page, which its reader can sort."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Cell(NamedTuple):
    """A cell: its text, the number to sort by (None: by the text), a part of the page to open."""

    text: str
    order: float | None = None
    link: str | None = None
    warning: bool = False

    @classmethod
    def number(cls, value: float | None, form: str) -> Cell:
        """A number in a format; what is not defined is a dash, and sorted last."""
        if value is None or math.isnan(value):
            return cls("-", math.inf)
        return cls(format(value, form), value)

    @property
    def key(self) -> str | None:
        """What the script sorts by, in an attribute."""
        if self.order is None:
            return None
        return repr(float(self.order)) if math.isfinite(self.order) else "last"


class Table(NamedTuple):
    """A table: caption, titles of the columns, rows whose first cell is their title."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
