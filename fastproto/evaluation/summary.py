# SPDX-License-Identifier: Apache-2.0
"""Summing up a cross-validation: per protocol, method and organ, with the spread by annotation.

A value is first averaged over the queries of one annotated scan; the mean and the standard
deviation (n - 1) then run over the annotated scans. So the deviation says how much depends on which
patient was annotated.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastproto.evaluation.measure import METRICS, mean_and_std, number_text, text_table
from fastproto.evaluation.protocol import PROTOCOLS

TITLES = {
    "ep1": "EP1: three annotated slices, the organ's extent is given, one organ at a time",
    "ep2": "EP2: one annotated slice, the organ's slices alone count, one organ at a time",
    "whole": "Whole volumes: every slice counts, all organs at once",
}
_Teacher = tuple[int, str]  # fold and annotated case


def summarise(units: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Results of every protocol, method and variant.

    Args:
        units: Lines of ``results.jsonl``.

    Returns:
        Entries of ``protocol``, ``method``, ``variant``, ``organs`` (entries of ``organ``, ``n``,
        ``missed`` and, per metric, ``mean`` and ``std``), ``mean`` (the same over organs) and
        ``dice_by_annotated``. Beyond Dice, metrics are those of whole volumes. NaN: not defined.
    """
    groups: dict[tuple[str, str, str], list[tuple[_Teacher, Mapping[str, Any]]]] = {}
    for unit in units:
        for row in unit["rows"]:
            key = unit["protocol"], unit["method"], row["variant"]
            groups.setdefault(key, []).append(((unit["fold"], unit["annotated"]), row))
    order = sorted(groups, key=lambda key: PROTOCOLS.index(key[0]))  # stable
    return [
        {"protocol": key[0], "method": key[1], "variant": key[2], **_summary(groups[key])}
        for key in order
    ]


def _summary(rows: Sequence[tuple[_Teacher, Mapping[str, Any]]]) -> dict[str, Any]:
    metrics = [metric for metric in METRICS if metric in rows[0][1]]
    names = list(dict.fromkeys(row["organ"] for _, row in rows))
    organs: list[dict[str, Any]] = []
    by_teacher: dict[str, dict[_Teacher, list[float]]] = {metric: {} for metric in metrics}
    for name in names:
        own = [(teacher, row) for teacher, row in rows if row["organ"] == name]
        entry: dict[str, Any] = {"organ": name}
        entry["n"] = sum(row["dice"] is not None for _, row in own)
        entry["missed"] = sum(row.get("status") == "missed" for _, row in own)
        for metric in metrics:
            values: dict[_Teacher, list[float]] = {}
            for teacher, row in own:
                if row[metric] is not None:
                    values.setdefault(teacher, []).append(row[metric])
            means = {teacher: sum(found) / len(found) for teacher, found in values.items()}
            entry[metric] = mean_and_std(means.values())
            for teacher, value in means.items():
                by_teacher[metric].setdefault(teacher, []).append(value)
        organs.append(entry)
    mean = {}
    for metric in metrics:
        of_organs = mean_and_std(organ[metric]["mean"] for organ in organs)["mean"]
        teachers = [sum(found) / len(found) for found in by_teacher[metric].values()]
        mean[metric] = {"mean": of_organs, "std": mean_and_std(teachers)["std"]}
    return {
        "organs": organs,
        "mean": mean,
        "dice_by_annotated": {
            f"{case} (fold {fold})": sum(found) / len(found)
            for (fold, case), found in by_teacher["dice"].items()
        },
    }


def summary_text(summary: Mapping[str, Any]) -> str:
    """The summary of a cross-validation as tables to print."""
    parts = [f"{summary['data']}: Dice, mean ± standard deviation over annotated scans"]
    for protocol in PROTOCOLS:
        results = [entry for entry in summary["results"] if entry["protocol"] == protocol]
        if not results:
            continue
        names = dict.fromkeys(organ["organ"] for entry in results for organ in entry["organs"])
        table = [["", *names, "mean"]]
        for entry in results:
            known = {organ["organ"]: organ["dice"] for organ in entry["organs"]}
            cells = [_cell(known.get(name), "dice") for name in names]
            table.append([_name(entry), *cells, _cell(entry["mean"]["dice"], "dice")])
        parts += [TITLES[protocol], text_table(table)]
        if protocol == "whole":
            table = [["mean of organs", "HD95 [mm]", "ASSD [mm]", "NSD @ 2 mm", "missed"]]
            for entry in results:
                missed = sum(organ["missed"] for organ in entry["organs"])
                count = f"{missed} of {sum(organ['n'] for organ in entry['organs'])}"
                cells = [_cell(entry["mean"][metric], metric) for metric in METRICS[1:]]
                table.append([_name(entry), *cells, count])
            parts.append(text_table(table))
    if summary["quoted"]:
        table = [["quoted, not measured here", "setting 1", "setting 2", "source"]]
        for row in summary["quoted"]:
            cells = [f"{row[name]:.2f}" for name in ("setting_1", "setting_2")]
            table.append([row["method"], *cells, row["source"]])
        parts.append(text_table(table))
    return "\n\n".join(parts) + "\n"


def _name(entry: Mapping[str, Any]) -> str:
    return f"{entry['method']}: {entry['variant']}"


def _cell(value: Mapping[str, float] | None, metric: str) -> str:
    if value is None:
        return "-"
    spread = "" if math.isnan(value["std"]) else f" ± {number_text(value['std'], metric)}"
    return number_text(value["mean"], metric) + spread
