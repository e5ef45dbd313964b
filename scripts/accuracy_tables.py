# SPDX-License-Identifier: Apache-2.0
"""Tables of accuracy, from the records of cross-validations and ablations."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from page_tables import NO_RECORD, Row, cell, newest, provenance, table

# Protocol, method and variant of a cross-validation's result, and what its column is called.
COLUMNS = {
    ("whole", "fastproto", "network + prior"): "network + prior",
    ("whole", "adapted", "network + prior"): "adapted network + prior",
    ("whole", "fastproto", "network"): "network alone",
    ("whole", "adapted", "network"): "adapted network alone",
    ("whole", "registration", "box"): "prior alone: box",
    ("whole", "registration", "affine"): "affine",
    ("whole", "registration", "deformable"): "deformable",
    ("whole", "prototypes", "network + prior"): "prototypes + prior",
    ("whole", "one-scan", "network + prior"): "one-scan network + prior",
    ("ep1", "fastproto", "network"): "EP1",
    ("ep1", "prototypes", "network"): "EP1, prototypes",
}


def by_column(record: Row) -> dict[tuple[str, str, str], Row]:
    """Results of a cross-validation by the keys of ``COLUMNS``."""
    return {(row["protocol"], row["method"], row["variant"]): row for row in record["results"]}


def summary(results: Path) -> str:
    """Mean Dice of whole volumes per data set: ours, and what one would do without us."""
    lines = []
    for record in newest(results, "*crossval-"):
        found = {key: row["mean"]["dice"]["mean"] for key, row in by_column(record).items()}
        ours = "adapted" if ("whole", "adapted", "network") in found else "fastproto"
        keys = [(ours, "network + prior"), (ours, "network")]
        keys += [("registration", "deformable"), ("registration", "affine")]
        dice = [cell(found.get(("whole", *key))) for key in keys]
        lines.append([f"{record['data']}, {record['model']}", str(len(unseen(record))), *dice])
    columns = ["data, model", "unseen patients", "**fastproto**", "network alone"]
    columns += ["deformable registration", "affine registration"]
    return table("", columns, lines) or NO_RECORD


def crossval(results: Path) -> str:
    """Dice on organs and patients that training never saw, per data set, beside other methods."""
    blocks: list[str] = []
    quoted: set[str] = set()
    for record in newest(results, "*crossval-"):
        found = by_column(record)
        used = {title: found[key] for key, title in COLUMNS.items() if key in found}
        scores = [{o["organ"]: o["dice"]["mean"] for o in row["organs"]} for row in used.values()]
        organs = dict.fromkeys(organ for score in scores for organ in score)
        rows = [[organ, *(cell(score.get(organ)) for score in scores)] for organ in organs]
        rows.append(["**mean**"])
        for dice in (row["mean"]["dice"] for row in used.values()):
            spread = "" if dice["std"] is None else f" ± {cell(dice['std'])}"
            rows[-1].append(f"**{cell(dice['mean'])}**{spread}")
        blocks += [table(title_of(record), ["organ", *used], rows), provenance(record)]
        if record["quoted"] and record["data"] not in quoted:
            quoted.add(record["data"])
            columns = ["quoted, not measured here", "setting 1", "setting 2", "source"]
            rows = [
                [row["method"], cell(row["setting_1"]), cell(row["setting_2"]), row["source"]]
                for row in record["quoted"]
            ]
            blocks.append(table(f"{record['data']}: published", columns, rows))
    return "\n\n".join(blocks) or NO_RECORD


def title_of(record: Row) -> str:
    """What was trained and tested, in one line."""
    training, minutes = record["training"], list(record["training_minutes"].values())
    how = f"model {record['model']}"
    if training:
        share = training["label_fraction"]
        labels = "without labels" if share == 0 else f"{share:.0%} of the episodes from labels"
        mean = sum(minutes) / len(minutes) if minutes else 0
        how = f"{training['encoder']} at {training['image_size']} px, {labels}, {mean:.0f} minutes"
    one = record["annotated"]
    one = one if isinstance(one, str) else " or ".join(one)
    return f"{record['data']}: {how}; {len(unseen(record))} unseen patients, annotated: {one}"


def unseen(record: Row) -> set[str]:
    """The patients that were segmented; of several annotated scans each is tested with others."""
    tests = {case for cases in record["tests"].values() for case in cases}
    one = record["annotated"]
    return tests - set(one) if isinstance(one, list) and len(one) == 1 else tests


def ablation(record: Row) -> Iterator[str]:
    """Dice of the network alone, without adaptation, after each change of the training recipe."""
    for data in dict.fromkeys(row["data"] for row in record["rows"]):
        tests = record["tests"][data]
        rows: dict[str, list[str]] = {}
        for row in record["rows"]:
            if row["data"] == data:
                line = rows.setdefault(row["name"], [row["name"], *["-"] * 6])
                first = 4 if row["timed"] else 1
                line[first : first + 3] = [str(row["steps"]), cell(row["ep1"]), cell(row["whole"])]
        timed = f"in {record['minutes'] * 60:.0f} s: steps"
        columns = [tests["data"], "steps", "EP1", "whole", timed, "EP1", "whole"]
        without = f"{len(tests['test_cases'])} patients, who test it"
        yield table(f"{tests['data']}: trained without {without}", columns, rows.values())


def inference(record: Row) -> Iterator[str]:
    """Dice on training patients with one step of inference changed at a time."""
    pair = f"{record['annotated']} to {', '.join(record['queries'])}"
    title = f"{record['data']}: model {record['model']}, {pair}"
    rows = [[name, f"{dice:.3f}"] for name, dice in record["dice"].items()]
    yield table(title, ["whole volumes, not adapted", "Dice"], rows)
