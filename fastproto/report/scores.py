# SPDX-License-Identifier: Apache-2.0
"""The JSON of `evaluate`, for a page: a box per organ and metric, every case a dot."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastproto.data.label_table import read_json
from fastproto.errors import InputError, require
from fastproto.evaluation.metrics import METRICS
from fastproto.report.plots import Dot, boxes
from fastproto.report.tables import Cell, Table

_ALLOWED = "a file that `fastproto evaluate --json` wrote"


def read_scores(path: Path) -> dict[str, Any]:
    """What `evaluate --json` wrote.

    Raises:
        InputError: It is no such file.
    """
    scores = read_json(path, _ALLOWED, InputError)
    rows = scores.get("rows")
    names = {"case", "organ", "status"}
    fits = isinstance(rows, list) and rows and isinstance(scores.get("definitions"), dict)
    fits = fits and all(isinstance(row, dict) and names <= row.keys() for row in rows or ())
    fits = fits and all(
        isinstance(row.get(metric.name), (int, float, type(None)))
        for row in rows or ()
        for metric in METRICS
    )
    require(fits, path, found="JSON of something else", allowed=_ALLOWED, error=InputError)
    return scores


def scores_contents(scores: Mapping[str, Any], links: Mapping[str, str]) -> dict[str, Any]:
    """What the page's template shows.

    Args:
        scores: As `read_scores` gives them.
        links: Case -> id of the part of the page that shows it.
    """
    rows, tolerance = scores["rows"], scores.get("nsd_tolerance_mm", 0.0)
    organs = list(dict.fromkeys(row["organ"] for row in rows))
    columns = [metric.column(tolerance) for metric in METRICS]
    plots, table = [], []
    for metric, column in zip(METRICS, columns, strict=True):
        groups = {
            organ: [
                Dot(
                    row[metric.name],
                    f"{row['case']}, {organ}: {metric.text(row[metric.name])}",
                    links.get(row["case"]),
                )
                for row in rows
                if row["organ"] == organ and row.get(metric.name) is not None
            ]
            for organ in organs
        }
        plots.append(boxes(column, groups))
    for row in rows:
        numbers = [
            Cell.number(row.get(metric.name), ".2f" if metric.unit else ".3f") for metric in METRICS
        ]
        status = Cell(row["status"], warning=row["status"] in ("missed", "spurious"))
        case = Cell(row["case"], link=links.get(row["case"]))
        table.append([case, Cell(row["organ"]), *numbers, status])
    not_measured = dict(scores.get("failed") or {})
    not_measured |= dict.fromkeys(scores.get("not_predicted") or (), "no prediction")
    return {
        "plots": plots,
        "table": Table("Every case", ("case", "organ", *columns, "status"), table),
        "definitions": {metric.title: metric.definition for metric in METRICS},
        "not_measured": not_measured,
        "linked": any(row["case"] in links for row in rows),
    }
