# SPDX-License-Identifier: Apache-2.0
"""Writes the tables in README.md and docs from the newest result files in benchmarks/results.

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``; no number is typed by hand.

    python scripts/update_tables.py               # this repository
    python scripts/update_tables.py --root COPY   # another folder that holds the same files
"""

from __future__ import annotations

import argparse
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from operator import itemgetter
from pathlib import Path

from accuracy_tables import ablation, by_column, crossval, inference, summary
from page_tables import NO_RECORD, Columns, Row, newest, provenance, replace_table, table

ROOT = Path(__file__).resolve().parent.parent
VERDICTS = {True: "yes", False: "**no**", None: "-"}
Table = Callable[[Path], str]
Blocks = Callable[[Row], Iterable[str]]


def network_records(results: Path) -> list[Row]:
    """The newest record of every machine that measured the whole network."""
    records = [*newest(results, "cpu"), *newest(results, "network")]
    records = sorted((r for r in records if r.get("network")), key=itemgetter("date"))
    return list({r["network"][-1]["device"] + r["machine"]: r for r in records}.values())


def gpu_records(results: Path) -> list[Row]:
    """The newest record of every GPU: those that say which one."""
    return [record for record in newest(results, "") if "gpu" in record]


def every_record(results: Path) -> str:
    """When, on which machine, with which versions and by which command each was measured."""
    blocks = []
    for record in sorted(newest(results, ""), key=itemgetter("file")):
        versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
        lines = [f"## {record['file'].removesuffix('.json')}", record.get("what", "")]
        lines.append(f"{record['machine']}; {versions}")
        lines.append(f"`{record['command']}`" if "command" in record else "")
        blocks.append("\n\n".join(line for line in lines if line))
    return "\n\n".join(blocks) or NO_RECORD


def robustness(results: Path) -> str:
    """What the campaigns of mutated files, killed commands and many scans found, a line each."""
    lines = []
    for record in newest(results, "fuzz-formats"):
        counts = sum((Counter(each["counts"]) for each in record["formats"].values()), Counter())
        failed = sum(len(each["failures"]) for each in record["formats"].values())
        lines.append(
            "* **Mutated files** (NIfTI, NRRD, MetaImage, DICOM with its segmentations): of "
            f"{counts.total():,} {counts['refused']:,} were refused, {counts['equal']:,} read as "
            f"an independent program reads them, {failed} wrongly. {provenance(record)}"
        )
    for record in newest(results, "kill"):
        ends = record["ends"].values()
        tries, early = (sum(row[name] for row in ends) for name in ("tries", "ended early"))
        failed = sum(len(row.get("failures", ())) for row in ends)
        lines.append(
            f"* **Commands that end early** (killed, interrupted, on a full disk, two at once): of "
            f"{tries} runs {early} ended before they were done; {failed} left half a result, or "
            f"another one after they were resumed or repeated. {provenance(record)}"
        )
    for record in newest(results, "load"):
        first, last = record["processor_seconds_per_scan"].values()
        lines.append(
            f"* **A folder of {record['scans']} scans**, one broken and one of "
            f"{record['huge_mib'] / 1024:.1f} GiB: the others are segmented, the broken one is "
            f"named. Small ones take {last:.2f} s at the end, {first:.2f} s at the beginning; the "
            f"huge one takes at most {record['peak_mib'] / 1024:.1f} GiB of memory. "
            f"{provenance(record)}"
        )
    return "\n".join(lines).replace("(provenance", "(docs/provenance") or NO_RECORD


def of_each(records: str | Callable[[Path], list[Row]], blocks: Blocks) -> Table:
    """What every record, or every one of that name, gives, and where it comes from."""

    def fill(results: Path) -> str:
        found: list[str] = []
        for record in newest(results, records) if isinstance(records, str) else records(results):
            own = [block for block in blocks(record) if block]
            found += [*own, provenance(record)] if own else []
        return "\n\n".join(found) or NO_RECORD

    return fill


def digits(value: float | None) -> str:
    """Three significant digits, without an exponent; three decimals below 1."""
    if value is None:
        return "-"
    decimals = max(0, 3 - len(str(int(value)))) if value >= 1 else 3
    return f"{value:.{decimals}f}"


def shown(key: str, form: str) -> Callable[[Row], str]:
    """A column: the value of ``key``, or a dash."""
    return lambda row: format(row[key], form) if key in row else "-"


def least(key: str, *names: str) -> Callable[[Row], str]:
    """A column: the least of the named times that there are, or a dash."""
    return lambda row: digits(
        min((row[key][name] for name in names if name in row.get(key, {})), default=None)
    )


def memory(record: Row) -> Iterator[str]:
    """Peak resident memory, and the size of both networks."""
    peaks = [[case, f"{mib} MiB"] for case, mib in record["peak_resident_mib"].items()]
    yield table("", ["", "peak resident memory"], peaks, "ll").replace("|  |", "| |", 1)
    sizes = [
        [name, f"{size['parameters'] / 1e6:.2f} M", f"{size['file_mb']:.1f} MB"]
        for name, size in record["networks"].items()
    ]
    yield table("", ["network", "parameters", "file"], sizes, "lll")


SPEED: Columns = {
    "ms": lambda case: digits(case["ms"]["native"]),
    "fastest peer": itemgetter("fastest_peer"),
    "its ms": lambda case: digits(case["ms"][case["fastest_peer"]]),
    "ratio": shown("peer_over_native", ".2f"),
    "GFLOP/s": lambda case: digits(case["native_gflops"]),
    "of matmul": shown("of_matmul", ".0%"),
    "of FMA loop": shown("of_fma_loop", ".0%"),
}


def speed(record: Row, dtype: str, all_threads: bool = True) -> Iterator[str]:
    """One bag: native beside the fastest peer, by pass and size; on all threads or on fewer."""
    cases = [c for c in record["cases"] if c["dtype"] == dtype and c["size"] != "mixed"]
    counts = sorted({case["threads"] for case in cases})
    for threads in counts[-1:] if all_threads else counts[:-1][:1]:
        for what in ("forward", "backward", "both"):
            chosen = [c for c in cases if (c["what"], c["threads"]) == (what, threads)]
            title = f"{what}, {dtype}, {threads} thread{'s' * (threads > 1)}"
            yield table(title, {"size": itemgetter("size")} | SPEED, chosen)


def mixed_bags(record: Row) -> Iterator[str]:
    """Bags of different sizes: one call of ours beside the peers' loops."""
    columns: Columns = {"": "{what}, {dtype}, {threads} t".format_map, **SPEED}
    yield table("mixed bags", columns, [c for c in record["cases"] if c["size"] == "mixed"])


def op_memory(record: Row) -> Iterator[str]:
    """Memory beyond inputs and results."""
    for first in record["memory"][:1]:
        names = [key.removesuffix("_needed") for key in first if key.endswith("_needed")]
        columns = ["size", "pass", *(f"{n}: {k}" for n in names for k in ("call", "kept"))]
        keys = [f"{name}_{kind}" for name in names for kind in ("needed", "kept")]
        rows = [
            [row["size"], row["what"], *(f"{row[key] / 2**20:.1f}" for key in keys)]
            for row in record["memory"]
        ]
        yield table(f"MiB, float32, {first['threads']} threads", columns, rows)


def network(record: Row) -> Iterator[str]:
    """The whole network beside the baseline."""
    rows = record["network"]
    label = "{what}, {batch} at once, {dtype}, {device}, {network}"
    columns: Columns = {"milliseconds": label.format_map}
    columns |= {name: least("ms", name) for name in dict.fromkeys(n for r in rows for n in r["ms"])}
    columns["MiB, unet"] = lambda row: str(row.get("peak_mib", {}).get("unet", "-"))
    columns["MiB, baseline"] = lambda row: str(row.get("peak_mib", {}).get("baseline", "-"))
    yield table(f"the whole network, {rows[0]['threads']} threads on a CPU", columns, rows)


RATIOS = (
    ("inference 2x faster than the ResNet-101 baseline", "inference", "ms", 2.0),
    ("training 40 % faster", "training", "ms", 1.4),
    ("inference in half the memory", "inference", "peak_mib", 2.0),
    ("training in half the memory", "training", "peak_mib", 2.0),
)
"""Of the ResNet-34 U-Net: the promise, the pass, what is measured, and the baseline's over ours."""


def promises(results: Path) -> str:
    """What the source document promised, line by line; a line that does not hold says so."""
    rows = [row for record in network_records(results) for row in record["network"]]
    if not rows:
        return NO_RECORD
    lines: list[list[str]] = []

    def add(promise: str, measured: str | None = None, holds: bool | None = None) -> None:
        lines.append([promise, measured or "not measured", VERDICTS[holds if measured else None]])

    for promise, what, key, least in RATIOS:
        how = "{:.2f} times as fast" if key == "ms" else "the baseline takes {:.2f} times as much"
        ratios, texts = [], []
        for row in rows:
            values = row.get(key, {})
            theirs = [value for name, value in values.items() if name.startswith("baseline")]
            if row["what"] == what and row["batch"] == 1 and theirs:
                ratios.append(min(theirs) / values["unet"])
                texts.append(f"{how.format(ratios[-1])} ({row['dtype']}, {row['device']})")
        add(promise, "; ".join(texts), min(ratios, default=0) >= least)
    single = [row for row in rows if row["what"] == "inference" and row["batch"] == 1]
    slowest = max((row["ms"]["unet"] for row in single if row["device"] != "cpu"), default=None)
    add("under 100 ms an image on a GPU", slowest and f"{slowest:.1f} ms", (slowest or 0) < 100)
    training = [row for row in rows if row["what"] == "training" and "peak_mib" in row]
    most = max((row["peak_mib"]["unet"] for row in training), default=None)
    add("training under 4 GB", most and f"{most} MiB", (most or 0) * 2**20 < 4e9)
    for record in newest(results, "memory"):
        ours, theirs = record["networks"].values()
        share, size = ours["parameters"] / theirs["parameters"], ours["file_mb"]
        add("half the parameters", f"{share:.2f} of the baseline's", share <= 0.5)
        add("about 84 MB", f"{size:.1f} MB (84 is the encoder alone)", size <= 85)
    for record in newest(results, "crossval-chaos"):
        dice = {key: row["mean"]["dice"]["mean"] for key, row in by_column(record).items()}
        ours, scores = (dice.get(("ep1", how, "network")) for how in ("fastproto", "prototypes"))
        if ours and scores:
            text = f"{ours / scores - 1:.0%} (CHAOS, EP1, same encoder)"
            promise = "8 to 12 % better Dice than enlarged prototype scores"
            add(promise, text, ours / scores - 1 >= 0.08)
    add("Dice at least 95 % of the ResNet-101 baseline's")
    return table("", ["promised of the ResNet-34 U-Net", "measured", "holds"], lines, "lll")


GPU: Columns = {
    "us": lambda case: least("us", case["ours"])(case),
    "fastest peer": lambda case: case.get("fastest_peer", "-"),
    "its us": lambda case: least("us", case.get("fastest_peer", ""))(case),
    "ratio": shown("peer_over_ours", ".2f"),
    "expected us": shown("expected_us", ".2f"),
    "over expected": shown("measured_over_expected", ".2f"),
    "GB/s": shown("gb_per_s", ".0f"),
    "of copy": shown("of_copy", ".0%"),
    "TFLOP/s": shown("tflops", ".1f"),
    "of matmul": shown("of_matmul", ".0%"),
    "wall us": lambda case: least("wall_us", case["ours"])(case),
    "eager's wall us": least("wall_us", "eager", "eager_nchw"),
}
GPU_CEILINGS: Columns = {
    "rate": itemgetter("rate"),
    "": lambda row: f"{digits(row['median'])} {row['unit']}",
    "measurements": lambda row: str(len(row["measurements"])),
}


def gpu(record: Row) -> Iterator[str]:
    """A GPU: ours beside the fastest peer and what the machine could reach, by type and pass."""
    cases = record["cases"]
    for dtype in dict.fromkeys(case["dtype"] for case in cases):
        for what in ("forward", "backward", "both"):
            chosen = [case for case in cases if (case["dtype"], case["what"]) == (dtype, what)]
            title = f"{record['gpu']['name']}: {what}, {dtype}, {record['ours']}"
            yield table(title, {"size": itemgetter("size")} | GPU, chosen)
    names = dict.fromkeys(name for case in cases for name in case["us"])
    ours = [name for name in names if name.partition(" ")[0] in ("native", "triton")]
    if len(ours) > 1:
        columns: Columns = {"setting": itemgetter("setting"), "pass": itemgetter("what")}
        columns |= {name: least("us", name) for name in ours}
        yield table("our backends, microseconds", columns, cases)
    yield table("what the machine reaches", GPU_CEILINGS, record["ceilings"])
    rows = [[c["check"], c["result"], c["detail"].replace("|", "/")] for c in record["checks"]]
    yield table("checks", ["", "result", ""], rows)
    gaps = [f"Failed: {row['what']}: {row['error']}" for row in record["failed"]]
    if record["left_out"]:
        settings = ", ".join(row["setting"] for row in record["left_out"])
        gaps.insert(0, f"Left out ({record['left_out'][0]['why']}): {settings}.")
    yield "\n".join(f"* {line}".replace("|", "/") for line in gaps)


def gpu_goals(record: Row) -> Iterator[str]:
    """What was aimed for on a GPU, and what was reached, line by line."""
    rows = []
    for row in record["goals"]:
        missing = row["reached"] is None
        reached = "not measured" if missing else f"{row['reached']} {row['unit']} ({row['at']})"
        rows.append([row["backend"], row["goal"], row["wanted"], reached, VERDICTS[row["met"]]])
    title = f"{record['gpu']['name']}: bfloat16, D = 512, 16 x 16 pixels"
    yield table(title, ["backend", "goal", "wanted", "reached", "met"], rows, "llrrl")


def single(title: str, key: str, columns: Columns) -> Blocks:
    """One table of the rows of ``key``."""
    return lambda record: [table(title, columns, record[key])]


CEILINGS: Columns = {
    "rate": itemgetter("rate"),
    "threads": shown("threads", ""),
    "GFLOP/s": lambda row: digits(row["gflops"]),
    "range": lambda row: " to ".join(digits(f(row["measurements"])) for f in (min, max)),
    "measurements": lambda row: str(len(row["measurements"])),
}
OVERHEAD: Columns = {"call": itemgetter("call"), "microseconds": shown("us", ".1f")}
CPU: dict[str, Blocks] = {
    "ceilings": single("the machine", "ceilings", CEILINGS),
    **{t: functools.partial(speed, dtype=t) for t in ("float32", "bfloat16", "float16")},
    "float32-one-thread": functools.partial(speed, dtype="float32", all_threads=False),
    "mixed-bags": mixed_bags,
    "op-memory": op_memory,
    "overhead": single("one thread", "overhead", OVERHEAD),
}
PAGES: dict[str, dict[str, Table]] = {
    "README.md": {"summary": summary, "promises": promises, "robustness": robustness},
    "docs/provenance.md": {"records": every_record},
    "docs/results.md": {"results": crossval},
    "docs/training.md": {
        "ablation": of_each("ablation", ablation),
        "inference": of_each("inference", inference),
    },
    "docs/performance.md": {
        **{name: of_each("cpu", blocks) for name, blocks in CPU.items()},
        "network": of_each(network_records, network),
        "memory": of_each("memory", memory),
        "promises": promises,
        "gpu-goals": of_each(gpu_records, gpu_goals),
        "gpu": of_each(gpu_records, gpu),
    },
}


def main() -> None:
    """Fill every table of every page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of README.md and docs")
    root = parser.parse_args().root
    for page, tables in PAGES.items():
        for name, write in tables.items():
            replace_table(root / page, name, write(root / "benchmarks" / "results"))


if __name__ == "__main__":
    main()
