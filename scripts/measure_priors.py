# SPDX-License-Identifier: Apache-2.0
"""What the place of an organ alone is worth: organs of one annotated scan carried over to others.

Training patients only. For every kind of prior: Dice of `Prior.label_map` over the whole volume,
what share of the organ lies within some millimetres of where it is expected, what share of the
rest of the scan does, the blur that suits `Prior.probability`, and the CPU time of `locate` on one
thread.

    python scripts/measure_priors.py --data ROOT --out benchmarks/results/DATE-priors.json
"""

from __future__ import annotations

import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import records
import SimpleITK as sitk
import torch

from fastproto.data import open_dataset, read_label, read_volume
from fastproto.data.preprocessing import canonical
from fastproto.evaluation.metrics import dice
from fastproto.evaluation.report import versions
from fastproto.segmentation.prior import KINDS, Atlas, locate

REACHES_MM = (5, 10, 20, 30, 40)
BLURS_MM = (1, 1.5, 2, 3, 4, 6, 8, 12)
FLOOR = 1e-3
EDGES_MM = np.arange(-100, 501, 0.5)
MEAN = f"mean_{dice.name}"
FIGURES = (dice.name, "share_within", "share_of_rest")  # of an organ
# Folder, label values, annotated patient -> others.
IXI = [f"IXI0{n}" for n in ("13-HH-1212", "14-HH-1236", "15-HH-1258", "33-HH-1259")]
HIPPOCAMPI = [f"hippocampus_{n}" for n in ("004", "006", "008", "011")]
SETS: list[tuple[str, list[int], dict[str, list[str]]]] = [
    ("ixi_brain_mr", [4, 6, 7, 8], {"IXI012-HH-1211": IXI}),
    ("openkbp_hn_ct", [1, 2, 3, 4, 5, 6, 7], {"pt_100": ["pt_112", "pt_59", "pt_60"]}),
    (
        "chaos_t2_mr",
        [1, 2, 3, 4],
        {"chaos_21": ["chaos_33", "chaos_38"], "chaos_34": ["chaos_22", "chaos_39"]},
    ),
    ("msd_hippocampus_mr", [1, 2], {"hippocampus_001": HIPPOCAMPI}),
]


def main() -> None:
    """Measure, print and write."""
    args = records.arguments(__doc__, data="folder of the data sets", out=None).parse_args()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    torch.set_num_threads(1)
    results = [measure(args.data, *each) for each in SETS]
    records.write(
        args.out,
        command="python scripts/measure_priors.py --data ROOT --out FILE",
        machine=f"{platform.machine()}, 1 thread, CPU seconds of a shared machine",
        versions=versions("fastproto", "torch", "SimpleITK", "python", "cpu_level"),
        reaches_mm=REACHES_MM,
        blurs_mm=BLURS_MM,
        sets=results,
    )


def measure(root: Path, folder: str, values: list[int], pairs: dict[str, list[str]]) -> Any:
    """All kinds on one data set."""
    dataset = open_dataset(root / folder)
    files = {case.id: (case.image, case.label) for case in dataset.cases}
    modality = dataset.modality
    rows: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for annotated, queries in pairs.items():
        image, label = files[annotated]
        atlas = Atlas.make(read_volume(image), read_label(label), values, modality, KINDS[-1])
        for query in queries:
            volume, truth = read_volume(files[query][0]), read_label(files[query][1])
            for kind in KINDS:
                row = {"annotated": annotated, "query": query}
                rows[kind].append(row | one(atlas, volume, truth, kind))
    result: dict[str, Any] = {"data": dataset.name, "kinds": {}}
    for kind, cases in rows.items():
        organs = {
            dataset.labels[value]: {
                **{name: mean([case[name][index] for case in cases]) for name in FIGURES},
                "best_blur_mm": best_blur([case["loss"][index] for case in cases]),
            }
            for index, value in enumerate(values)
        }
        result["kinds"][kind] = summary = {
            MEAN: mean([case[dice.name] for case in cases], overall=True),
            "seconds": mean([case["seconds"] for case in cases]),
            "organs": organs,
            "cases": cases,
        }
        print(f"{folder} {kind}: {summary[MEAN]}, {summary['seconds']} s", flush=True)
        for organ, row in organs.items():
            score, within, rest, blur = row.values()
            print(f"  {organ}: {score}, within {within}, rest {rest}, blur {blur}", flush=True)
    return result


def one(atlas: Atlas, volume: Any, truth: Any, kind: str) -> dict[str, Any]:
    """One scan: figures per organ, in the order of the atlas."""
    begin = time.process_time()
    prior = locate(atlas, volume, kind)
    seconds = time.process_time() - begin
    found, seen = prior.label_map(), canonical(truth).array
    # Voxels by their distance from where the organ is expected, outside of it and inside.
    counts = np.zeros((2, len(atlas.values), len(EDGES_MM) - 1))
    for index, labels in enumerate(seen):
        distance = prior.signed_distance(index, index + 1)[0].numpy().clip(-99, 499)
        for organ, value in enumerate(atlas.values):
            for side, voxels in enumerate((labels != value, labels == value)):
                counts[side, organ] += np.histogram(distance[organ][voxels], EDGES_MM)[0]
    upto = np.searchsorted(EDGES_MM, REACHES_MM)
    reached, within = (part.cumsum(axis=-1)[:, upto - 1] for part in counts)
    sizes, others = counts[1].sum(axis=-1), counts[0].sum(axis=-1)
    middles = (EDGES_MM[1:] + EDGES_MM[:-1]) / 2
    losses = []
    for blur in BLURS_MM:
        logit = (-middles / blur).clip(np.log(FLOOR), None)
        losses.append(np.logaddexp(0, -logit) @ counts[1].T + np.logaddexp(0, logit) @ counts[0].T)
    return {
        dice.name: [mean(dice(found == v, truth.array == v), 4) for v in atlas.values],
        "share_within": mean([within / sizes[:, None]], 4),
        "share_of_rest": mean([reached / others[:, None]], 4),
        "loss": mean([np.array(losses).T / sizes[:, None]], 4),
        "quality": mean(prior.quality, 4),
        "fallback": prior.fallback,
        "seconds": mean(seconds, 2),
    }


def best_blur(losses: Any) -> float:
    """The blur at which the prior's probabilities have the least cross entropy."""
    return BLURS_MM[int(np.mean(losses, axis=0).argmin())]


def mean(numbers: Any, digits: int = 3, *, overall: bool = False) -> Any:
    """Over the first axis or over all, rounded; a number stays one."""
    array = np.asarray(numbers, dtype=float)
    averaged = array.mean() if overall else array.mean(axis=0) if array.ndim else array
    rounded = np.round(averaged, digits)
    return None if rounded.ndim == 0 and np.isnan(rounded) else rounded.tolist()


if __name__ == "__main__":
    main()
