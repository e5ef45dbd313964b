# SPDX-License-Identifier: Apache-2.0
"""What each step of inference gains, on training patients: Dice with it and without it.

One annotated scan teaches, others are segmented, and the decision is made again and again: without
the prior, without the correction of an organ's place, without the cleaning of pieces and holes,
without the bias, and with the network's scores averaged over shifted fields of view.

    python scripts/measure_inference.py --model RUN --data SET --annotated CASE --queries CASE ... \
        --results FILE.json
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from fastproto._version import __version__
from fastproto.data import open_dataset, read_label, read_volume
from fastproto.data.preprocessing import FieldOfView, PreparedVolume
from fastproto.data.volume import Volume
from fastproto.evaluation.metrics import dice
from fastproto.nn.base import FewShotModel
from fastproto.segmentation import learn, load_model, predict, register
from fastproto.segmentation.prior import Prior, locate
from fastproto.segmentation.task import Organ, Task

# Fields of view beside the organ's own: moved by a share of the side, rows and columns.
SHIFTS = [(0.06, 0.0), (-0.06, 0.0), (0.0, 0.06), (0.0, -0.06)]


def main() -> None:
    """Measure one set and add its rows to the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--annotated", required=True)
    parser.add_argument("--queries", nargs="+", required=True)
    parser.add_argument("--classes", nargs="+", default=[])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--results", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, dataset = load_model(args.model), open_dataset(args.data)
    case = dataset.select([args.annotated])[0]
    values = dataset.label_ids(args.classes or dataset.labels)
    task = register(
        model,
        read_volume(case.image),
        read_label(case.label),
        labels=dataset.labels,
        classes=values,
        preprocessing=learn.model_preprocessing(model, dataset.modality),
    )
    found: dict[str, list[float]] = {}
    for query in dataset.select(args.queries):
        scan, truth = read_volume(query.image), read_label(query.label)
        prior = locate(task.atlas, scan)
        for name, labels in variants(model, task, scan, prior).items():
            scores = [dice(labels == value, truth.array == value) for value in values]
            found.setdefault(name, []).append(float(np.mean(scores)))
            print(query.id, name, f"{found[name][-1]:.4f}", flush=True)
    record = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {args.threads} threads",
        "versions": {"fastproto": __version__, "torch": torch.__version__},
        "command": shlex.join(["python", "scripts/measure_inference.py", *shown(sys.argv[1:])]),
        "data": dataset.name,
        "model": model.extra.get("name", Path(args.model).name),
        "annotated": args.annotated,
        "queries": args.queries,
        "dice": {name: round(float(np.mean(scores)), 4) for name, scores in found.items()},
    }
    args.results.write_text(json.dumps(record, indent=1) + "\n")


def variants(model: FewShotModel, task: Task, scan: Volume, prior: Prior) -> dict[str, np.ndarray]:
    """Label maps by what was changed."""
    prepared = task.preprocessing.prepare(scan)
    fusion = predict.FUSIONS[prior.kind]

    def settled(found: Sequence[predict.Evidence], fusion: predict.Fusion) -> np.ndarray:
        return predict.decide(task, scan, prepared, prior, found, fusion).labels

    corrected = predict.gather(model, task, prepared, prior)
    correction, predict.correction = predict.correction, lambda *_: np.zeros(3)
    evidence = predict.gather(model, task, prepared, prior)
    alone = replace(fusion, network=1.0, prior=0.0)
    result = {
        "as it is": settled(corrected, fusion),
        "network alone": settled(corrected, alone),
        "places not corrected": settled(evidence, fusion),
        "network alone, places not corrected": settled(evidence, alone),
        "prior alone": settled(evidence, replace(fusion, network=0.0)),
    }
    predict.correction = correction
    clean, predict.clean = predict.clean, lambda mask: mask
    result["pieces and holes left"] = settled(corrected, fusion)
    result["network alone, pieces and holes left"] = settled(corrected, alone)
    predict.clean = clean
    unbiased = replace(task, organs=tuple(replace(organ, bias=0.0) for organ in task.organs))
    labels = predict.decide(unbiased, scan, prepared, prior, corrected, alone).labels
    result["network alone, no bias"] = labels
    mean = shifted(model, task, prepared, prior, corrected)
    result["shifts averaged"] = settled(mean, fusion)
    result["network alone, shifts averaged"] = settled(mean, alone)
    return result


def shifted(
    model: FewShotModel,
    task: Task,
    prepared: PreparedVolume,
    prior: Prior,
    evidence: Sequence[predict.Evidence],
) -> list[predict.Evidence]:
    """``evidence`` with scores averaged over shifted fields of view."""
    expected_view = predict.expected_view
    total = [part.scores.clone() for part in evidence]
    count = [torch.ones_like(part.scores) for part in evidence]
    for rows, columns in SHIFTS:

        def moved(
            organ: Organ, own: Prior, rows: float = rows, columns: float = columns
        ) -> FieldOfView:
            view = expected_view(organ, own)
            pixel_rows, pixel_columns = prepared.spacing[1:]
            return view._replace(
                row=view.row + rows * view.side / pixel_rows,
                column=view.column + columns * view.side / pixel_columns,
            )

        predict.expected_view = moved
        for index, other in enumerate(predict.gather(model, task, prepared, prior)):
            add(total[index], count[index], evidence[index], other)
    predict.expected_view = expected_view
    return [
        part._replace(scores=sums / number)
        for part, sums, number in zip(evidence, total, count, strict=True)
    ]


def shown(arguments: Sequence[str]) -> list[str]:
    """Paths without the folders of this machine."""
    return [Path(argument).name if "/" in argument else argument for argument in arguments]


def add(
    total: torch.Tensor, count: torch.Tensor, own: predict.Evidence, other: predict.Evidence
) -> None:
    """Add the scores of ``other`` where its box meets that of ``own``."""
    mine, theirs = [], []
    for a, b in zip(own.box, other.box, strict=True):
        start, stop = max(a.start, b.start), min(a.stop, b.stop)
        if start >= stop:
            return
        mine.append(slice(start - a.start, stop - a.start))
        theirs.append(slice(start - b.start, stop - b.start))
    total[tuple(mine)] += other.scores[tuple(theirs)]
    count[tuple(mine)] += 1


if __name__ == "__main__":
    main()
