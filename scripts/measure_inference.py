# SPDX-License-Identifier: Apache-2.0
"""What each step of inference gains, on training patients: Dice with it and without it.

One annotated scan teaches, others are segmented, and the decision is made again and again: without
the prior, without the correction of an organ's place, without the cleaning of pieces and holes,
without the bias, and with the network's scores averaged over shifted fields of view.

    python scripts/measure_inference.py --model RUN --data SET --annotated CASE --queries CASE ... \
        --results FILE.json
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import records
import torch

from fastproto.data import open_dataset, read_label, read_volume
from fastproto.data.preprocessing import FieldOfView, PreparedVolume
from fastproto.data.volume import Volume
from fastproto.evaluation.metrics import dice
from fastproto.evaluation.report import machine, versions
from fastproto.nn.base import FewShotModel
from fastproto.segmentation import learn, load_model, predict, register
from fastproto.segmentation.prior import Prior, locate
from fastproto.segmentation.task import Organ, Task

# Fields of view beside the organ's own: moved by a share of the side, rows and columns.
SHIFTS = [(0.06, 0.0), (-0.06, 0.0), (0.0, 0.06), (0.0, -0.06)]


def main() -> None:
    """Measure one set and add its rows to the record."""
    parser = records.arguments(__doc__, data=None, results=None)
    parser.add_argument("--model", required=True)
    parser.add_argument("--annotated", required=True)
    parser.add_argument("--queries", nargs="+", required=True)
    parser.add_argument("--classes", nargs="+", default=[])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
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
        ignore=dataset.ignore,
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
    records.write(
        args.results,
        machine=machine(),
        versions=versions("fastproto", "torch"),
        command=shlex.join(["python", "scripts/measure_inference.py", *shown(sys.argv[1:])]),
        data=dataset.name,
        model=model.extra.get("name", Path(args.model).name),
        annotated=args.annotated,
        queries=args.queries,
        **{dice.name: {name: round(float(np.mean(scores)), 4) for name, scores in found.items()}},
    )


def variants(model: FewShotModel, task: Task, scan: Volume, prior: Prior) -> dict[str, np.ndarray]:
    """Label maps by what was changed."""
    prepared = task.preprocessing.prepare(scan)
    fusion = predict.FUSIONS[prior.kind]
    alone = replace(fusion, network=1.0, prior=0.0)
    corrected = predict.gather(model, task, prepared, prior)
    with mock.patch.object(predict, "correction", return_value=np.zeros(3)):
        evidence = predict.gather(model, task, prepared, prior)
    mean = shifted(model, task, prepared, prior, corrected)
    unbiased = replace(task, organs=tuple(replace(organ, bias=0.0) for organ in task.organs))

    def settled(
        found: Sequence[predict.Evidence], fusion: predict.Fusion, task: Task = task
    ) -> np.ndarray:
        return predict.decide(task, scan, prepared, prior, found, fusion).labels

    result = {
        "as it is": settled(corrected, fusion),
        "network alone": settled(corrected, alone),
        "places not corrected": settled(evidence, fusion),
        "network alone, places not corrected": settled(evidence, alone),
        "prior alone": settled(evidence, replace(fusion, network=0.0)),
    }
    with mock.patch.object(predict, "clean", lambda mask: mask):
        result["pieces and holes left"] = settled(corrected, fusion)
        result["network alone, pieces and holes left"] = settled(corrected, alone)
    result["network alone, no bias"] = settled(corrected, alone, unbiased)
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
    row_mm, column_mm = prepared.spacing[1:]
    total = [part.scores.clone() for part in evidence]
    count = [torch.ones_like(part.scores) for part in evidence]
    for rows, columns in SHIFTS:

        def moved(
            organ: Organ, own: Prior, rows: float = rows, columns: float = columns
        ) -> FieldOfView:
            view = expected_view(organ, own)
            return view._replace(
                row=view.row + rows * view.side / row_mm,
                column=view.column + columns * view.side / column_mm,
            )

        with mock.patch.object(predict, "expected_view", moved):
            found = predict.gather(model, task, prepared, prior)
        for own, other, sums, number in zip(evidence, found, total, count, strict=True):
            add(sums, number, own, other)
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
