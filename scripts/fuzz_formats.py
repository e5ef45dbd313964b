# SPDX-License-Identifier: Apache-2.0
"""Mutated files of every image format: refused by an InputError, or read as others read them.

    python scripts/fuzz_formats.py --write                     # 10 000 of each, in an hour
    python scripts/fuzz_formats.py --formats seg --write       # anew in the record of today
    python scripts/fuzz_formats.py --formats nrrd --only 1234  # one case again, its files kept

Every case is named by the seed, the format and its index. Whatever is neither refused nor equal to
the independent reading (nibabel, pynrrd, pydicom, for MetaImage a reader of the tests' own) is a
failure: other values, another place, a foreign exception, a crash, more than ten seconds.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import records

sys.path.append(str(Path(__file__).resolve().parents[1] / "python_tests"))

from support.fuzz import FORMATS, campaign
from support.fuzz.judge import RIGHT, judge
from support.fuzz.mutate import PRISTINE

CHUNK = 2500


def main() -> int:
    """Run, print and record; 1 where a case failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--cases", type=int, default=10_000, metavar="N", help="of each format")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="processes at once (default: 2)")
    parser.add_argument("--only", type=int, metavar="INDEX", help="this case alone; keep its files")
    parser.add_argument("--show", type=int, default=20, metavar="N", help="failures to print")
    parser.add_argument("--write", action="store_true", help="a record in benchmarks/results")
    args = parser.parse_args()
    if args.only is not None:
        return repeat(args.formats[0], args.seed, args.only)
    started = time.perf_counter()
    found = {name: run(name, args) for name in args.formats}
    failed = sum(len(entry["failures"]) for entry in found.values())
    if args.write:
        readers = ("numpy", "nibabel", "nrrd", "pydicom")
        settings = {"seed": args.seed, "cases": args.cases, "pristine": PRISTINE}
        before = records.RESULTS / f"{records.today()}-fuzz-formats.json"
        record = json.loads(before.read_text("utf-8")) if before.exists() else {}
        kept = record["formats"] if settings.items() <= record.items() else {}
        seconds = round(time.perf_counter() - started)
        records.write_campaign(
            "fuzz-formats",
            readers,
            **settings,
            seconds=seconds,
            of_an_earlier_run=[name for name in kept if name not in found],
            formats={name: {**kept, **found}[name] for name in FORMATS if name in {*kept, *found}},
        )
    return 1 if failed else 0


def run(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """All cases of one format."""
    cases = [(name, index) for index in range(args.cases)]
    chunks = [cases[start : start + CHUNK] for start in range(0, args.cases, CHUNK)]
    with ThreadPoolExecutor(args.jobs) as pool:
        found = list(pool.map(lambda chunk: campaign.run(chunk, args.seed)[name], chunks))
    counts = sum((result.counts for result in found), Counter[str]())
    failures = [failure for result in found for failure in result.failures]
    listed = ", ".join(f"{number} {kind}" for kind, number in counts.most_common())
    print(f"{name}: {listed}", flush=True)
    for failure in failures[: args.show]:
        done = "; ".join(failure["done"])
        print(
            f"  --seed {args.seed} --formats {name} --only {failure['index']}: "
            f"{failure['kind']}: {failure['why']} [{done}]",
            flush=True,
        )
    slowest = max(result.slowest_s for result in found)
    return {"counts": dict(counts), "slowest_s": slowest, "failures": failures}


def repeat(name: str, seed: int, index: int) -> int:
    """Judge one case in this process, and leave its files where they can be looked at."""
    case = campaign.make(name, seed, index)
    folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-{index}-"))
    campaign.write(case, folder)
    print(f"{folder / case.target}: {'; '.join(case.done) or 'a good file'}", flush=True)
    verdict = judge(case, FORMATS[name], folder)
    print(f"{verdict.kind}: {verdict.why}")
    return 0 if verdict.kind in RIGHT else 1


if __name__ == "__main__":
    sys.exit(main())
