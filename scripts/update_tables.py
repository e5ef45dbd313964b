# SPDX-License-Identifier: Apache-2.0
"""Writes the tables in README.md and docs from the newest result files in benchmarks/results.

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``; no number is typed by hand.

    python scripts/update_tables.py               # this repository
    python scripts/update_tables.py --root COPY   # another folder that holds the same files
"""

from __future__ import annotations

import argparse
import functools
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NO_RECORD = "No record in `benchmarks/results` yet."


def newest(results: Path, name: str) -> list[dict[str, Any]]:
    """The newest record of each result whose name begins with ``name``, a pattern of glob."""
    latest: dict[str, Path] = {}
    for path in sorted(results.glob(f"????-??-??-{name}*.json")):
        latest[path.stem[11:]] = path
    return [
        json.loads(path.read_text(encoding="utf-8")) | {"file": path.name}
        for path in latest.values()
    ]


def provenance(record: dict[str, Any]) -> str:
    """One line: where the numbers come from."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return (
        f"<sub>{record['date']}, {record['machine']}, {versions}; `{record['command']}`; "
        f"`benchmarks/results/{record['file']}`</sub>"
    )


def cell(value: float | None) -> str:
    """A number for a table, or a dash where it is not defined."""
    return "-" if value is None else f"{value:.2f}"


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the numbers among ``values``."""
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers else None


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


def crossval(results: Path) -> str:
    """Dice on organs and patients that training never saw, per data set, beside other methods."""
    blocks = []
    quoted: set[str] = set()
    for record in newest(results, "*crossval-"):
        found = {
            (entry["protocol"], entry["method"], entry["variant"]): entry
            for entry in record["results"]
        }
        used = {key: title for key, title in COLUMNS.items() if key in found}
        organs = dict.fromkeys(o["organ"] for key in used for o in found[key]["organs"])
        rows = []
        for organ in organs:
            scores = [{o["organ"]: o["dice"] for o in found[key]["organs"]} for key in used]
            rows.append([organ, *(cell(s.get(organ, {}).get("mean")) for s in scores)])
        rows.append(["**mean**"])
        for key in used:
            dice = found[key]["mean"]["dice"]
            spread = "" if dice["std"] is None else f" ± {cell(dice['std'])}"
            rows[-1].append(f"**{cell(dice['mean'])}**{spread}")
        blocks += [table(title_of(record), ["organ", *used.values()], rows), provenance(record)]
        if record["quoted"] and record["data"] not in quoted:
            quoted.add(record["data"])
            columns = ["quoted, not measured here", "setting 1", "setting 2", "source"]
            rows = [
                [row["method"], cell(row["setting_1"]), cell(row["setting_2"]), row["source"]]
                for row in record["quoted"]
            ]
            blocks.append(table(f"{record['data']}: published", columns, rows))
    return "\n\n".join(blocks) or NO_RECORD


def title_of(record: dict[str, Any]) -> str:
    """What was trained and tested, in one line."""
    training, minutes = record["training"], record["training_minutes"]
    how = f"model {record['model']}"
    if training:
        share = training["label_fraction"]
        labels = "without labels" if share == 0 else f"{share:.0%} of the episodes from labels"
        how = (
            f"{training['encoder']} at {training['image_size']} px, {labels}, "
            f"{mean(minutes.values()) or 0:.0f} minutes"
        )
    tests = {case for cases in record["tests"].values() for case in cases}
    one = record["annotated"]
    if isinstance(one, list):
        if len(one) == 1:  # of several, each is tested with the others
            tests -= set(one)
        one = " or ".join(one)
    return f"{record['data']}: {how}; {len(tests)} unseen patients, annotated: {one}"


def ablation(results: Path) -> str:
    """Dice of the network alone, without adaptation, after each change of the training recipe."""
    blocks = []
    for record in newest(results, "ablation"):
        for data in dict.fromkeys(row["data"] for row in record["rows"]):
            tests = record["tests"][data]
            rows: dict[str, list[str]] = {}
            for row in record["rows"]:
                if row["data"] == data:
                    cells = rows.setdefault(row["name"], [row["name"], *["-"] * 6])
                    first = 4 if row["timed"] else 1
                    found = [str(row["steps"]), cell(row["ep1"]), cell(row["whole"])]
                    cells[first : first + 3] = found
            timed = f"in {record['minutes'] * 60:.0f} s: steps"
            columns = [tests["data"], "steps", "EP1", "whole", timed, "EP1", "whole"]
            title = (
                f"{tests['data']}: trained without {len(tests['test_cases'])} patients, who test it"
            )
            blocks.append(table(title, columns, rows.values()))
        blocks.append(provenance(record))
    return "\n\n".join(blocks) or NO_RECORD


def inference(results: Path) -> str:
    """Dice on training patients with one step of inference changed at a time."""
    blocks = []
    for record in newest(results, "inference"):
        pair = f"{record['annotated']} to {', '.join(record['queries'])}"
        title = f"{record['data']}: model {record['model']}, {pair}"
        rows = [[name, f"{dice:.3f}"] for name, dice in record["dice"].items()]
        blocks += [table(title, ["whole volumes, not adapted", "Dice"], rows), provenance(record)]
    return "\n\n".join(blocks) or NO_RECORD


def memory(results: Path) -> str:
    """Peak resident memory, and the size of both networks."""
    blocks = []
    for record in newest(results, "memory"):
        lines = ["| | peak resident memory |", "|---|---|"]
        lines += [f"| {case} | {mib} MiB |" for case, mib in record["peak_resident_mib"].items()]
        lines += ["", "| network | parameters | file |", "|---|---|---|"]
        lines += [
            f"| {name} | {size['parameters'] / 1e6:.2f} M | {size['file_mb']:.1f} MB |"
            for name, size in record["networks"].items()
        ]
        blocks.append("\n".join([*lines, "", provenance(record)]))
    return "\n\n".join(blocks) or NO_RECORD


def table(title: str, columns: list[str], rows: Iterable[list[str]]) -> str:
    """A titled table, numbers to the right."""
    lines = [f"**{title}**", "", "| " + " | ".join(columns) + " |"]
    lines.append("|---|" + "---:|" * (len(columns) - 1))
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def digits(value: float) -> str:
    """Three significant digits, without an exponent; three decimals below 1."""
    decimals = max(0, 3 - len(str(int(value)))) if value >= 1 else 3
    return f"{value:.{decimals}f}"


SPEED = ["ms", "fastest peer", "its ms", "ratio", "GFLOP/s", "of matmul", "of FMA loop"]


def speed_cells(case: dict[str, Any]) -> list[str]:
    """One measurement: the columns of ``SPEED``."""
    peer = case["fastest_peer"]
    return [
        digits(case["ms"]["native"]),
        peer,
        digits(case["ms"][peer]),
        f"{case['peer_over_native']:.2f}",
        digits(case["native_gflops"]),
        f"{case['of_matmul']:.0%}",
        f"{case['of_fma_loop']:.0%}",
    ]


def speed(results: Path, dtype: str, all_threads: bool) -> str:
    """One bag: native beside the fastest peer, by pass and size; on all threads or on one."""
    blocks = []
    for record in newest(results, "cpu"):
        cases = [c for c in record["cases"] if c["dtype"] == dtype and c["size"] != "mixed"]
        counts = sorted({case["threads"] for case in cases})
        if not counts or (not all_threads and len(counts) == 1):
            continue
        threads = counts[-1 if all_threads else 0]
        for what in ("forward", "backward", "both"):
            rows = [
                [case["size"], *speed_cells(case)]
                for case in cases
                if case["what"] == what and case["threads"] == threads
            ]
            if rows:
                title = f"{what}, {dtype}, {threads} thread{'s' * (threads > 1)}"
                blocks.append(table(title, ["size", *SPEED], rows))
        blocks.append(provenance(record))
    return "\n\n".join(blocks) or NO_RECORD


def mixed_bags(results: Path) -> str:
    """Bags of different sizes: one call of ours beside the peers' loops."""
    blocks = []
    for record in newest(results, "cpu"):
        rows = [
            [f"{case['what']}, {case['dtype']}, {case['threads']} t", *speed_cells(case)]
            for case in record["cases"]
            if case["size"] == "mixed"
        ]
        if rows:
            blocks += [table("mixed bags", ["", *SPEED], rows), provenance(record)]
    return "\n\n".join(blocks) or NO_RECORD


def op_memory(results: Path) -> str:
    """Memory beyond inputs and results."""
    blocks = []
    for record in newest(results, "cpu"):
        measured = record["memory"]
        if not measured:
            continue
        names = [key.removesuffix("_needed") for key in measured[0] if key.endswith("_needed")]
        columns = ["size", "pass", *(f"{n}: {k}" for n in names for k in ("call", "kept"))]
        rows = [
            [row["size"], row["what"]]
            + [f"{row[f'{n}_{k}'] / 2**20:.1f}" for n in names for k in ("needed", "kept")]
            for row in measured
        ]
        threads = measured[0]["threads"]
        blocks += [table(f"MiB, float32, {threads} threads", columns, rows), provenance(record)]
    return "\n\n".join(blocks) or NO_RECORD


def overhead(results: Path) -> str:
    """Microseconds per call of a problem with next to no arithmetic."""
    blocks = []
    for record in newest(results, "cpu"):
        rows = [[row["call"], f"{row['us']:.1f}"] for row in record["overhead"]]
        if rows:
            blocks += [table("one thread", ["call", "microseconds"], rows), provenance(record)]
    return "\n\n".join(blocks) or NO_RECORD


def ceilings(results: Path) -> str:
    """What the percentages are percentages of."""
    blocks = []
    for record in newest(results, "cpu"):
        rows = []
        for row in record["ceilings"]:
            values = row["measurements"]
            spread = f"{digits(min(values))} to {digits(max(values))}"
            median, count = digits(row["gflops"]), str(len(values))
            rows.append([row["rate"], str(row["threads"]), median, spread, count])
        if rows:
            columns = ["rate", "threads", "GFLOP/s", "range", "measurements"]
            blocks += [table("the machine", columns, rows), provenance(record)]
    return "\n\n".join(blocks) or NO_RECORD


def network_records(results: Path) -> list[dict[str, Any]]:
    """The newest record of every machine that measured the whole network."""
    latest: dict[str, dict[str, Any]] = {}
    for record in sorted(
        [*newest(results, "cpu"), *newest(results, "network")], key=lambda record: record["date"]
    ):
        if record.get("network"):
            latest[record["network"][-1]["device"] + record["machine"]] = record
    return list(latest.values())


def network(results: Path) -> str:
    """The whole network beside the baseline, and what the source document promised of it."""
    blocks = []
    for record in network_records(results):
        rows = record["network"]
        names = list(dict.fromkeys(name for row in rows for name in row["ms"]))
        cells = []
        for row in rows:
            label = f"{row['what']}, {row['batch']} at once, {row['dtype']}, {row['device']}, "
            label += row["network"]
            peaks = [row.get("peak_mib", {}).get(name) for name in ("unet", "baseline")]
            cells.append([label])
            cells[-1] += [digits(row["ms"][name]) if name in row["ms"] else "-" for name in names]
            cells[-1] += ["-" if peak is None else str(peak) for peak in peaks]
        columns = ["milliseconds", *names, "MiB, unet", "MiB, baseline"]
        title = f"the whole network, {rows[0]['threads']} threads on a CPU"
        blocks += [table(title, columns, cells), provenance(record)]
    return "\n\n".join(blocks) or NO_RECORD


def promises(results: Path) -> str:
    """What the source document promised, line by line; a line that does not hold says so."""
    if not network_records(results):
        return NO_RECORD
    lines = ["| promised of the ResNet-34 U-Net | measured | holds |", "|---|---|---|"]

    def add(promise: str, measured: str | None, holds: bool | None) -> None:
        verdict = "-" if holds is None else "yes" if holds else "**no**"
        lines.append(f"| {promise} | {measured or 'not measured'} | {verdict} |")

    rows = [row for record in network_records(results) for row in record["network"]]

    def ratios(what: str, key: str) -> list[tuple[str, float]]:
        found = []
        for row in rows:
            values = row.get(key, {})
            theirs = [value for name, value in values.items() if name.startswith("baseline")]
            if row["what"] == what and row["batch"] == 1 and theirs:
                found.append((f"{row['dtype']}, {row['device']}", min(theirs) / values["unet"]))
        return found

    for promise, what, key, least in (
        ("inference 2x faster than the ResNet-101 baseline", "inference", "ms", 2.0),
        ("training 40 % faster", "training", "ms", 1.4),
        ("inference in half the memory", "inference", "peak_mib", 2.0),
        ("training in half the memory", "training", "peak_mib", 2.0),
    ):
        found = ratios(what, key)
        how = "{:.2f} times as fast" if key == "ms" else "the baseline takes {:.2f} times as much"
        text = "; ".join(f"{how.format(ratio)} ({where})" for where, ratio in found)
        add(promise, text, min(r for _, r in found) >= least if found else None)
    on_gpu = [
        row["ms"]["unet"]
        for row in rows
        if row["what"] == "inference" and row["batch"] == 1 and row["device"] != "cpu"
    ]
    add(
        "under 100 ms an image on a GPU",
        f"{max(on_gpu):.1f} ms" if on_gpu else None,
        max(on_gpu) < 100 if on_gpu else None,
    )
    peaks = [
        row["peak_mib"]["unet"] for row in rows if row["what"] == "training" and "peak_mib" in row
    ]
    add(
        "training under 4 GB",
        f"{max(peaks)} MiB" if peaks else None,
        max(peaks) * 2**20 < 4e9 if peaks else None,
    )
    for record in newest(results, "memory"):
        ours, theirs = record["networks"].values()
        share = ours["parameters"] / theirs["parameters"]
        add("half the parameters", f"{share:.2f} of the baseline's", share <= 0.5)
        size = ours["file_mb"]
        add("about 84 MB", f"{size:.1f} MB (84 is the encoder alone)", size <= 85)
    for record in newest(results, "crossval-chaos"):
        mean_dice = {
            (entry["protocol"], entry["method"], entry["variant"]): entry["mean"]["dice"]["mean"]
            for entry in record["results"]
        }
        ours = mean_dice.get(("ep1", "fastproto", "network"))
        scores = mean_dice.get(("ep1", "prototypes", "network"))
        if ours and scores:
            gain = ours / scores - 1
            promise = "8 to 12 % better Dice than enlarged prototype scores"
            add(promise, f"{gain:.0%} (CHAOS, EP1, same encoder)", gain >= 0.08)
    add("Dice at least 95 % of the ResNet-101 baseline's", None, None)
    return "\n".join(lines)


def gpu_records(results: Path) -> list[dict[str, Any]]:
    """The newest record of every GPU: those that say which one."""
    return [record for record in newest(results, "") if "gpu" in record]


def gpu_gaps(record: dict[str, Any]) -> list[str]:
    """What a record lacks, if anything, in sentences."""
    lines = []
    if record["left_out"]:
        names = ", ".join(row["setting"] for row in record["left_out"])
        lines.append(f"Left out ({record['left_out'][0]['why']}): {names}.")
    lines += [f"Failed: {row['what']}: {row['error']}" for row in record["failed"]]
    return ["\n".join(f"* {line}".replace("|", "/") for line in lines)] if lines else []


def gpu_cells(case: dict[str, Any]) -> list[str]:
    """One measurement: the columns of ``GPU``."""
    ours, peer = case["ours"], case.get("fastest_peer")

    def shown(key: str, form: str) -> str:
        return format(case[key], form) if key in case else "-"

    def time_of(name: str | None, key: str = "us") -> str:
        return digits(case[key][name]) if name in case.get(key, {}) else "-"

    wall = case.get("wall_us", {})
    eager = [wall[name] for name in ("eager", "eager_nchw") if name in wall]
    return [
        time_of(ours),
        peer or "-",
        time_of(peer),
        shown("peer_over_ours", ".2f"),
        shown("expected_us", ".2f"),
        shown("measured_over_expected", ".2f"),
        shown("gb_per_s", ".0f"),
        shown("of_copy", ".0%"),
        shown("tflops", ".1f"),
        shown("of_matmul", ".0%"),
        time_of(ours, "wall_us"),
        digits(min(eager)) if eager else "-",
    ]


GPU = ["us", "fastest peer", "its us", "ratio", "expected us", "over expected", "GB/s", "of copy"]
GPU += ["TFLOP/s", "of matmul", "wall us", "eager's wall us"]


def gpu_backends(record: dict[str, Any]) -> list[str]:
    """Our backends, and families of kernels, side by side, where several were measured."""
    names = [
        name
        for name in dict.fromkeys(name for case in record["cases"] for name in case["us"])
        if name.partition(" ")[0] in ("native", "triton")
    ]
    if len(names) < 2:
        return []
    rows = [
        [case["setting"], case["what"]]
        + [digits(case["us"][name]) if name in case["us"] else "-" for name in names]
        for case in record["cases"]
    ]
    return [table("our backends, microseconds", ["setting", "pass", *names], rows)]


def gpu_checks(record: dict[str, Any]) -> list[str]:
    """What was checked beside, if anything."""
    rows = [
        [row["check"], row["result"], row["detail"].replace("|", "/")] for row in record["checks"]
    ]
    return [table("checks", ["", "result", ""], rows)] if rows else []


def gpu(results: Path) -> str:
    """A GPU: ours beside the fastest peer and what the machine could reach, by type and pass."""
    blocks = []
    for record in gpu_records(results):
        for dtype in dict.fromkeys(case["dtype"] for case in record["cases"]):
            for what in ("forward", "backward", "both"):
                rows = [
                    [case["size"], *gpu_cells(case)]
                    for case in record["cases"]
                    if (case["dtype"], case["what"]) == (dtype, what)
                ]
                if rows:
                    title = f"{record['gpu']['name']}: {what}, {dtype}, {record['ours']}"
                    blocks.append(table(title, ["size", *GPU], rows))
        blocks += gpu_backends(record)
        rows = [
            [row["rate"], f"{digits(row['median'])} {row['unit']}", str(len(row["measurements"]))]
            for row in record["ceilings"]
        ]
        if rows:
            blocks.append(table("what the machine reaches", ["rate", "", "measurements"], rows))
        blocks += [*gpu_checks(record), *gpu_gaps(record), provenance(record)]
    return "\n\n".join(blocks) or NO_RECORD


def gpu_goals(results: Path) -> str:
    """What was aimed for on a GPU, and what was reached, line by line."""
    blocks = []
    for record in gpu_records(results):
        lines = [f"**{record['gpu']['name']}: bfloat16, D = 512, 16 x 16 pixels**", ""]
        lines += ["| backend | goal | wanted | reached | met |", "|---|---|---:|---:|---|"]
        for row in record["goals"]:
            reached, met = "not measured", "-"
            if row["reached"] is not None:
                reached = f"{row['reached']} {row['unit']} ({row['at']})"
                met = "yes" if row["met"] else "**no**"
            cells = [row["backend"], row["goal"], row["wanted"], reached, met]
            lines.append("| " + " | ".join(cells) + " |")
        blocks += ["\n".join(lines), provenance(record)]
    return "\n\n".join(blocks) or NO_RECORD


Table = Callable[[Path], str]
PAGES: dict[str, dict[str, Table]] = {
    "README.md": {"results": crossval, "promises": promises, "memory": memory},
    "docs/training.md": {"ablation": ablation, "inference": inference},
    "docs/performance.md": {
        "ceilings": ceilings,
        "float32": functools.partial(speed, dtype="float32", all_threads=True),
        "float32-one-thread": functools.partial(speed, dtype="float32", all_threads=False),
        "bfloat16": functools.partial(speed, dtype="bfloat16", all_threads=True),
        "float16": functools.partial(speed, dtype="float16", all_threads=True),
        "mixed-bags": mixed_bags,
        "op-memory": op_memory,
        "overhead": overhead,
        "network": network,
        "promises": promises,
        "gpu-goals": gpu_goals,
        "gpu": gpu,
    },
}


def replace_table(page: Path, name: str, content: str) -> None:
    """Put ``content`` between the marks of a table in ``page``; other scripts do, too."""
    pattern = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    text = page.read_text(encoding="utf-8")
    text, count = pattern.subn(lambda m: m[1] + content + "\n" + m[2], text)
    if count != 1:
        raise SystemExit(f"{page}: found {count} tables {name!r}; allowed: one.")
    page.write_text(text, encoding="utf-8")


def main() -> None:
    """Fill every table of every page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of README.md and docs")
    root = parser.parse_args().root
    for page, tables in PAGES.items():
        path = root / page
        for name, write in tables.items():
            replace_table(path, name, write(root / "benchmarks" / "results"))


if __name__ == "__main__":
    main()
