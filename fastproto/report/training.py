# SPDX-License-Identifier: Apache-2.0
"""The folder of a training, for a page: its curves, and what was trained on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from fastproto.data.label_table import read_json
from fastproto.errors import CheckpointError, require
from fastproto.losses import PARTS
from fastproto.nn.weights import read_safetensors
from fastproto.report.plots import curves
from fastproto.report.tables import Cell, Table
from fastproto.training.log import read_log

_ALLOWED = "the folder of a `fastproto train`"
_SHOWN = (  # of the configuration, with what it is called
    ("encoder", "encoder"),
    ("image_size", "image size [pixels]"),
    ("batch", "episodes a step"),
    ("label_fraction", "share of episodes from labels"),
    ("start", "went on from"),
)


def training_contents(folder: Path) -> dict[str, Any]:
    """What the page's template shows.

    Raises:
        CheckpointError: There is no training in the folder, or a file of it is damaged.
    """
    config = read_json(folder / "config.json", _ALLOWED, CheckpointError)
    log = read_log(folder)
    steps = [record for record in log if "loss" in record]
    found, fix = "a training without any step", "Wait for its first step."
    require(steps, folder, found=found, allowed=_ALLOWED, fix=fix, error=CheckpointError)
    model = folder / "model.safetensors"
    extra = read_safetensors(model)[1].get("extra", {}) if model.is_file() else {}

    def line(name: str) -> list[tuple[float, float]]:
        return [(r["step"], r[name]) for r in log if isinstance(r.get(name), (int, float))]

    losses = {"loss": line("loss")}
    losses |= {n: line(n) for n in PARTS if any(value for _, value in line(n))}
    losses = {name: points for name, points in losses.items() if points}
    plots = [curves("Loss and its parts by step", losses, ylabel="loss")]
    plots.append(
        curves("Learning rate by step", {"rate": line("learning_rate")}, ylabel="learning rate")
    )
    validated = [point for point in line("validation_dice") if not math.isnan(point[1])]
    facts = _facts(config, extra, steps)
    if validated:
        plots.append(
            curves("Validation Dice by step", {"Dice": validated}, ylabel="validation Dice")
        )
        facts["validation Dice"] = f"{validated[-1][1]:.3f} at the end, at most "
        facts["validation Dice"] += f"{max(dice for _, dice in validated):.3f}"
    settings = [[Cell(name), Cell(json.dumps(value))] for name, value in config.items()]
    return {
        "plots": plots,
        "facts": facts,
        "cases": extra.get("training_cases", []),
        "settings": Table("Every option", ("option", "value"), settings),
    }


def _facts(
    config: dict[str, Any], extra: dict[str, Any], steps: list[dict[str, Any]]
) -> dict[str, str]:
    """What was trained on, and how long."""
    folders = config.get("data", ())
    facts = {"data": ", ".join(folders if isinstance(folders, list) else [str(folders)])}
    if extra:
        facts |= {
            "data set": str(extra.get("dataset", "-")),
            "modality": ", ".join(extra.get("preprocessing", ())).upper(),
            "training cases": str(len(extra.get("training_cases", ()))),
            "validation cases": ", ".join(extra.get("validation_cases", ()))
            or "the training cases, where they have labels",
            "organs learned from": ", ".join(extra.get("classes", {}).values())
            or "none: no label was used",
            "organs held out": ", ".join(extra.get("holdout", {}).values()) or "none",
        }
    facts |= {title: str(config[name]) for name, title in _SHOWN if config.get(name) is not None}
    minutes = sum(record.get("seconds", 0.0) for record in steps) / 60
    facts["trained"] = f"{steps[-1]['step']} steps in {minutes:.1f} minutes"
    facts["loss"] = f"{steps[-1]['loss']:.3f} at the end, {steps[0]['loss']:.3f} at the beginning"
    return facts
