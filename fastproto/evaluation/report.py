# SPDX-License-Identifier: Apache-2.0
"""What was measured, summed up: as tables to print and as JSON.

Label maps: an organ's mean and standard deviation (n - 1) run over the patients in whom it was
measured; the overall mean is the mean of the organs' means, so an organ seen in few patients
weighs as much as one seen in all. A missed organ counts with shares of 0; it has no distance, so
distances are averaged without it and the number of misses stands beside them.

Cross-validation: a value is first averaged over the queries of one annotated scan; mean and
deviation then run over the annotated scans, so the deviation says how much depends on which
patient was annotated.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fastproto._files import write_text
from fastproto.evaluation.metrics import METRICS, dice
from fastproto.evaluation.settings import PROTOCOLS

COUNTS = ("n", "missed", "spurious")
_Teacher = tuple[int, str]  # fold and annotated case


@dataclasses.dataclass(frozen=True)
class Report:
    """What `evaluate_folder` found.

    Attributes:
        rows: Rows of `evaluate_case` with their ``case``.
        nsd_tolerance: Tolerance of the NSD in mm.
        z_margin: Which slices counted, see `evaluate_case`.
        spacing: Size of a voxel in mm along (x, y, z), per case.
        unknown_labels: Label values in a prediction that have no name, per case.
        failed: Why a case could not be measured, per case: a damaged file, another grid.
        not_predicted: Cases of the truth without a prediction.
        not_compared: Files beside the predictions without a truth.
    """

    rows: list[dict[str, Any]]
    nsd_tolerance: float
    z_margin: int | None
    spacing: dict[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
    unknown_labels: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    failed: dict[str, str] = dataclasses.field(default_factory=dict)
    not_predicted: list[str] = dataclasses.field(default_factory=list)
    not_compared: list[str] = dataclasses.field(default_factory=list)

    def per_organ(self) -> list[dict[str, Any]]:
        """Mean and standard deviation of every metric over the patients, one entry per organ."""
        return self._summaries("label", "organ")

    def per_patient(self) -> list[dict[str, Any]]:
        """Mean and standard deviation of every metric over the organs, one entry per patient."""
        return self._summaries("case")

    def overall(self) -> dict[str, float]:
        """Mean over the organs of each metric's mean over the patients."""
        return {
            m.name: mean_and_std(organ[m.name]["mean"] for organ in self.per_organ())["mean"]
            for m in METRICS
        }

    def to_text(self) -> str:
        """The report as tables to print."""
        slices = "every slice"
        if self.z_margin is not None:
            slices = f"slices of the organ in the truth, {self.z_margin} beyond on either side"
        overall = self.overall()
        last = ["mean of organs", *[""] * len(COUNTS), *(m.text(overall[m.name]) for m in METRICS)]
        organs, patients = self.per_organ(), self.per_patient()
        zero = " and ".join(f"{metric.title} 0" for metric in METRICS if not metric.unit)
        notes = [f"{metric.name.upper()}: {metric.definition}" for metric in METRICS]
        notes += [
            "mean ± standard deviation (n - 1) over patients, below over organs; n: measured, "
            "missed and spurious ones included",
            f"missed: only in the truth, spurious: only in the prediction; both count with {zero} "
            "and have no distance",
        ]
        notes += [
            f"{case}: the prediction has labels without a name: {', '.join(map(str, values))}"
            for case, values in self.unknown_labels.items()
        ]
        notes += [f"not measured: {case} ({why})" for case, why in self.failed.items()]
        if self.not_predicted:
            notes.append(f"no prediction for: {', '.join(self.not_predicted)}")
        if self.not_compared:
            notes.append(f"no truth for: {', '.join(self.not_compared)}")
        parts = [
            f"{len(patients)} patient(s), {len(organs)} organ(s), {slices}",
            text_table([*self._table("organ", "organ", organs), last]),
            text_table(self._table("patient", "case", patients)),
            "\n".join(notes),
        ]
        return "\n\n".join(parts) + "\n"

    def to_json(self) -> str:
        """The report as JSON; what was not measurable is null."""
        content = {
            "definitions": {metric.name: metric.definition for metric in METRICS},
            "nsd_tolerance_mm": self.nsd_tolerance,
            "z_margin": self.z_margin,
            "overall": self.overall(),
            "organs": self.per_organ(),
            "patients": self.per_patient(),
            "rows": self.rows,
            "spacing_xyz_mm": self.spacing,
            "unknown_labels": self.unknown_labels,
            "failed": self.failed,
            "not_predicted": self.not_predicted,
            "not_compared": self.not_compared,
            "versions": versions("fastproto", "numpy", "scipy", "SimpleITK", "python"),
        }
        return json_text(content, indent=1)

    def write_json(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`to_json` to a file.

        Raises:
            OutputError: The file cannot be written.
        """
        write_text(path, self.to_json())

    def _summaries(self, *keys: str) -> list[dict[str, Any]]:
        groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for row in self.rows:
            groups.setdefault(tuple(row[key] for key in keys), []).append(row)
        summaries = []
        for values, rows in groups.items():
            statuses = [row["status"] for row in rows]
            counts = (len(rows) - statuses.count("absent"), *map(statuses.count, COUNTS[1:]))
            summary = dict(zip((*keys, *COUNTS), (*values, *counts), strict=True))
            summary |= {m.name: mean_and_std(row[m.name] for row in rows) for m in METRICS}
            summaries.append(summary)
        return summaries

    def _table(self, title: str, key: str, entries: list[dict[str, Any]]) -> list[list[str]]:
        table = [[title, *COUNTS, *(metric.column(self.nsd_tolerance) for metric in METRICS)]]
        for entry in entries:
            counts = [str(entry[count]) for count in COUNTS]
            table.append([entry[key], *counts, *(m.spread(entry[m.name]) for m in METRICS)])
        return table


def summarise(units: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Results of every protocol, method and variant in the lines of a ``results.jsonl``.

    Returns:
        Entries of ``protocol``, ``method``, ``variant``, ``organs`` (entries of ``organ``, ``n``,
        ``missed`` and, per metric, ``mean`` and ``std``), ``mean`` (the same over organs) and the
        first metric by annotated scan. The others are those of whole volumes. NaN: not defined.
    """
    groups: dict[tuple[str, ...], list[tuple[_Teacher, Mapping[str, Any]]]] = {}
    for unit in units:
        for row in unit["rows"]:
            key = unit["protocol"], unit["method"], row["variant"]
            groups.setdefault(key, []).append(((unit["fold"], unit["annotated"]), row))
    order = sorted(groups, key=lambda key: list(PROTOCOLS).index(key[0]))  # stable
    names = ("protocol", "method", "variant")
    return [dict(zip(names, key, strict=True)) | _summary(groups[key]) for key in order]


def _summary(rows: Sequence[tuple[_Teacher, Mapping[str, Any]]]) -> dict[str, Any]:
    metrics = [metric.name for metric in METRICS if metric.name in rows[0][1]]
    organs: list[dict[str, Any]] = []
    taught: dict[str, list[tuple[_Teacher, float]]] = {metric: [] for metric in metrics}
    for name in dict.fromkeys(row["organ"] for _, row in rows):
        own = [(teacher, row) for teacher, row in rows if row["organ"] == name]
        entry: dict[str, Any] = {"organ": name}
        entry["n"] = sum(row[dice.name] is not None for _, row in own)
        entry["missed"] = sum(row.get("status") == "missed" for _, row in own)
        for metric in metrics:
            means = _means((teacher, row[metric]) for teacher, row in own)
            entry[metric] = mean_and_std(means.values())
            taught[metric] += means.items()
        organs.append(entry)
    mean = {}
    for metric in metrics:
        of_organs = mean_and_std(organ[metric]["mean"] for organ in organs)["mean"]
        std = mean_and_std(_means(taught[metric]).values())["std"]
        mean[metric] = {"mean": of_organs, "std": std}
    by_annotated = {
        f"{case} (fold {fold})": value for (fold, case), value in _means(taught[dice.name]).items()
    }
    return {"organs": organs, "mean": mean, f"{dice.name}_by_annotated": by_annotated}


def _means(values: Iterable[tuple[_Teacher, float | None]]) -> dict[_Teacher, float]:
    """The mean of what is defined, for each annotated scan."""
    groups: dict[_Teacher, list[float]] = {}
    for teacher, value in values:
        if value is not None:
            groups.setdefault(teacher, []).append(value)
    return {teacher: sum(found) / len(found) for teacher, found in groups.items()}


def summary_text(summary: Mapping[str, Any]) -> str:
    """The summary of a cross-validation as tables to print."""
    parts = [f"{summary['data']}: {dice.title}, mean ± standard deviation over annotated scans"]
    for protocol, title in PROTOCOLS.items():
        results = {
            f"{entry['method']}: {entry['variant']}": entry
            for entry in summary["results"]
            if entry["protocol"] == protocol
        }
        if not results:
            continue
        names = dict.fromkeys(organ["organ"] for e in results.values() for organ in e["organs"])
        table = [["", *names, "mean"]]
        for name, entry in results.items():
            known = {organ["organ"]: dice.spread(organ[dice.name]) for organ in entry["organs"]}
            cells = [known.get(organ, "-") for organ in names]
            table.append([name, *cells, dice.spread(entry["mean"][dice.name])])
        parts += [title, text_table(table)]
        if protocol == "whole":
            others = [metric for metric in METRICS if metric is not dice]
            table = [["mean of organs", *(metric.column() for metric in others), "missed"]]
            for name, entry in results.items():
                missed, n = (sum(organ[k] for organ in entry["organs"]) for k in ("missed", "n"))
                cells = [metric.spread(entry["mean"][metric.name]) for metric in others]
                table.append([name, *cells, f"{missed} of {n}"])
            parts.append(text_table(table))
    if summary["quoted"]:
        table = [["quoted, not measured here", "setting 1", "setting 2", "source"]]
        for row in summary["quoted"]:
            cells = [f"{row[name]:.2f}" for name in ("setting_1", "setting_2")]
            table.append([row["method"], *cells, row["source"]])
        parts.append(text_table(table))
    return "\n\n".join(parts) + "\n"


def mean_and_std(values: Iterable[float]) -> dict[str, float]:
    """Mean and standard deviation (n - 1) of what is not NaN; NaN where there is too little."""
    measured = np.array([value for value in values if not math.isnan(value)])
    return {
        "mean": float(measured.mean()) if measured.size else math.nan,
        "std": float(measured.std(ddof=1)) if measured.size > 1 else math.nan,
    }


def without_nan(value: Any) -> Any:
    """The same as JSON can say it: None for every NaN."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON that ends with its line; null for every NaN."""
    return json.dumps(without_nan(value), indent=indent, allow_nan=False) + "\n"


def versions(*names: str) -> dict[str, str]:
    """Of packages, of "python", and the "cpu_level" of the kernels that run."""
    special: dict[str, Callable[[], object]] = {
        "python": platform.python_version,
        "cpu_level": lambda: importlib.import_module("fastproto.op.library").cpu_level(),
    }
    return {
        name: str(special[name]() if name in special else importlib.import_module(name).__version__)
        for name in names
    }


def machine(device: str = "cpu") -> str:
    """Where something was measured."""
    import torch

    name = f"{platform.machine()}, {torch.get_num_threads()} threads"
    return f"{torch.cuda.get_device_name()}, {name}" if device.startswith("cuda") else name


def text_table(rows: list[list[str]]) -> str:
    """Rows of text with aligned columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    lines.insert(1, "-" * (sum(widths) + 2 * (len(widths) - 1)))
    return "\n".join(lines)


# Published results on CHAOS T2-SPIR, to stand beside measured ones: mean Dice over liver, both
# kidneys and spleen by EP1, as others tell it. The papers differ in the annotated scan, in which
# slices setting 2 drops and in the checkpoint chosen, so their numbers are hardly comparable even
# with each other. All start from ImageNet or COCO weights, train for 30 000 steps or more and use
# all 20 patients. Method, setting 1, setting 2, source:
_PONET = "PONet's table (Neurocomputing 2025) as transcribed in a survey"
_CRAPNET = "CRAPNet's table (WACV 2023) as transcribed by others"
_QUOTED: tuple[tuple[str, float, float, str], ...] = (
    ("SSL-PANet", 0.632, 0.549, _CRAPNET),
    ("SSL-ALPNet", 0.788, 0.730, _PONET),
    ("ADNet++", 0.810, 0.737, _PONET),
    ("Q-Net", 0.810, 0.686, _PONET),
    ("CAT-Net", 0.752, 0.752, _PONET),
    ("RPT", 0.824, 0.795, _PONET),
    ("PONet", 0.860, 0.811, _PONET),
)


def quoted(dataset: str) -> list[dict[str, str | float]]:
    """Published results on a data set of this name; none but for CHAOS."""
    if "chaos" not in dataset.casefold():
        return []
    names = ("method", "setting_1", "setting_2", "source")
    return [dict(zip(names, row, strict=True)) for row in _QUOTED]
