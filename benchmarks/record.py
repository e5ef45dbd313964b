# SPDX-License-Identifier: Apache-2.0
"""From a GPU's measurements to ratios, fractions of the ceilings and goals; writing records."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from baselines import OURS
from roofline import Ceilings, Work

# Plain PyTorch, uncompiled: what the wall times of single calls are compared with.
EAGER = ("eager", "eager_nchw")


def ceilings_of(measured: Mapping[str, Sequence[float]]) -> Ceilings | None:
    """Medians, or None where the copy was not measured."""
    if "copy" not in measured:
        return None
    rates = {name: statistics.median(v) for name, v in measured.items() if name != "copy"}
    return Ceilings(statistics.median(measured["copy"]), rates)


def ceiling_rows(measured: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """For the record: GB/s of the copy, TFLOP/s of the products."""
    rows = []
    for name, values in measured.items():
        scale, unit = (1e9, "GB/s") if name == "copy" else (1e12, "TFLOP/s")
        scaled = [round(value / scale, 1) for value in values]
        median = round(statistics.median(values) / scale, 1)
        rows.append({"rate": name, "unit": unit, "median": median, "measurements": scaled})
    return rows


def complete(case: dict[str, Any], chosen: str, ceilings: Ceilings | None) -> dict[str, Any]:
    """The case with what follows from its times, for the backend ``chosen``."""
    times, work = case["us"], Work(case["bytes"], case["flops"])
    peers = [name for name in times if name.partition(" ")[0] not in OURS]
    derived: dict[str, Any] = {"ours": chosen}
    if peers:
        derived["fastest_peer"] = min(peers, key=lambda name: times[name])
    if chosen in times:
        seconds = times[chosen] * 1e-6
        if peers:
            derived["peer_over_ours"] = round(times[derived["fastest_peer"]] / times[chosen], 3)
        derived |= {
            "gb_per_s": round(work.bytes / seconds / 1e9, 1),
            "tflops": round(work.flops / seconds / 1e12, 2),
        }
        if ceilings is not None:
            derived["of_copy"] = round(work.bytes / seconds / ceilings.bytes_per_second, 4)
    if ceilings is not None and case["dtype"] in ceilings.flops_per_second:
        expected = ceilings.expected_seconds(work, case["dtype"])
        derived |= {
            "expected_us": round(expected * 1e6, 3),
            "bound": ceilings.bound(work, case["dtype"]),
        }
        if chosen in times:
            rate = ceilings.rate(case["dtype"])
            derived["of_matmul"] = round(work.flops / (times[chosen] * 1e-6) / rate, 4)
            derived["measured_over_expected"] = round(times[chosen] * 1e-6 / expected, 2)
    return case | derived


@dataclasses.dataclass(frozen=True)
class Goal:
    """One line of the goals.

    Attributes:
        goal: What is measured.
        key: Of a completed case, or "us", or "wall": eager's wall time over ours, or "triton": the
            Triton backend's time over ours.
        what: The pass.
        sizes: The worst of these counts; all must have been measured.
        wanted: The limit.
        most: Whether it is an upper limit.
        unit: After the number.
    """

    goal: str
    key: str
    what: str
    sizes: tuple[str, ...]
    wanted: float
    most: bool
    unit: str


SMALL = ("1x1", "1x16", "1x64", "1x256")
GOALS = [
    Goal("forward, one image and class, N <= 256, by graph replay", "us", "forward", SMALL, 12, True, "us"),  # noqa: E501
    Goal("the same called from the host, eager PyTorch's time over ours", "wall", "forward", SMALL, 5, False, "x"),  # noqa: E501
    Goal("forward, 512 bags of N = 256, share of the copy bandwidth", "of_copy", "forward", ("512x256",), 70, False, "%"),  # noqa: E501
    Goal("forward, 512 bags of N = 256, fastest peer's time over ours", "peer_over_ours", "forward", ("512x256",), 2, False, "x"),  # noqa: E501
    Goal("forward and backward, 512 bags of N = 256, fastest peer's time over ours", "peer_over_ours", "both", ("512x256",), 2, False, "x"),  # noqa: E501
    Goal("forward and backward, one image and class, N = 256, fastest peer's time over ours", "peer_over_ours", "both", ("1x256",), 2, False, "x"),  # noqa: E501
]  # fmt: skip
"""All of bfloat16, D = 512 and 16 x 16 pixels."""
LARGE = ("512x256", "16x4096")
NATIVE_GOALS = [
    Goal("forward, one image and class, N <= 256, by graph replay", "us", "forward", SMALL, 8, True, "us"),  # noqa: E501
    Goal("forward, 512 bags of N = 256, share of the copy bandwidth", "of_copy", "forward", ("512x256",), 80, False, "%"),  # noqa: E501
    Goal("forward, N = 4096, share of the matrix rate", "of_matmul", "forward", ("16x4096",), 60, False, "%"),  # noqa: E501
    Goal("backward, N = 4096, share of the matrix rate", "of_matmul", "backward", ("16x4096",), 55, False, "%"),  # noqa: E501
    Goal("forward, the Triton backend's time over ours", "triton", "forward", SMALL + LARGE, 1, False, "x"),  # noqa: E501
    Goal("forward and backward, the Triton backend's time over ours", "triton", "both", SMALL + LARGE, 1, False, "x"),  # noqa: E501
]  # fmt: skip
"""Of the native backend, whether users get it or not."""


def compare_goals(
    cases: Sequence[Mapping[str, Any]], chosen: str, goals: Sequence[Goal] = GOALS
) -> list[dict[str, Any]]:
    """Wanted, reached, met; reached is None where a size was not measured."""
    return [_compare(goal, cases, chosen) for goal in goals]


def _compare(goal: Goal, cases: Sequence[Mapping[str, Any]], chosen: str) -> dict[str, Any]:
    values: dict[str, float] = {}
    for case in cases:
        if (case["dtype"], case["what"]) == ("bfloat16", goal.what) and case["size"] in goal.sizes:
            value = _value(goal, case, chosen)
            if value is not None:
                values[case["size"]] = value
    row: dict[str, Any] = {
        "goal": goal.goal,
        "wanted": f"{'<=' if goal.most else '>='} {goal.wanted:g} {goal.unit}",
        "reached": None,
        "met": None,
    }
    missing = [size for size in goal.sizes if size not in values]
    if missing:
        return row | {"not_measured": missing}
    worst = (max if goal.most else min)(values, key=lambda size: values[size])
    reached = values[worst]
    met = reached <= goal.wanted if goal.most else reached >= goal.wanted
    return row | {"reached": round(reached, 2), "unit": goal.unit, "at": worst, "met": met}


def _value(goal: Goal, case: Mapping[str, Any], chosen: str) -> float | None:
    if goal.key == "us":
        return case["us"].get(chosen)
    if goal.key == "wall":
        wall = case.get("wall_us", {})
        eager = [wall[name] for name in EAGER if name in wall]
        return min(eager) / wall[chosen] if eager and chosen in wall else None
    if goal.key == "triton":
        times = case["us"]
        return times["triton"] / times[chosen] if {"triton", chosen} <= set(times) else None
    value = case.get(goal.key)
    return value * 100 if value is not None and goal.unit == "%" else value


def slug(name: str) -> str:
    """A machine's name for the name of a file."""
    words = re.sub(r"\((?:r|tm)\)|[^a-z0-9]+", "-", name.lower())
    return re.sub("-+", "-", words).strip("-")


def tag(name: str) -> str:
    """A GPU's name for the name of a file: "NVIDIA H200" -> "h200"."""
    return slug(name).removeprefix("nvidia-")


def write(path: Path, record: Mapping[str, Any]) -> Path:
    """Replace the file in one step; every row of a list has a line."""
    entries = []
    for key, value in record.items():
        text = json.dumps(value, indent=1).replace("\n", "\n ")
        if isinstance(value, list) and value:
            text = "[\n  " + ",\n  ".join(json.dumps(row) for row in value) + "\n ]"
        entries.append(f" {json.dumps(key)}: {text}")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text("{\n" + ",\n".join(entries) + "\n}\n", encoding="utf-8")
    os.replace(temporary, path)
    return path
