# SPDX-License-Identifier: Apache-2.0
"""The main job on synthetic patients: one annotated scan in, patients it never saw out.

`make demo` runs it. Every step is a command that you could type, with the model that comes with the
package and that was never trained on a phantom.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
import time
from pathlib import Path

from fastproto.cli import main as fastproto

ORGANS = {"spleen": 2, "left kidney": 4, "stomach": 7}
AFTERWARDS = """
Pictures: {out}/results/*.png, beside them the label maps. That took {minutes:.1f} minutes.

The same with scans of your own:
  fastproto segment --example ANNOTATED.nii.gz LABELS.nii.gz -i SCANS -o RESULTS

Before that, the model can be trained on them, without a label:
  fastproto train --data SCANS --model base --minutes 60 --out RUN
  fastproto segment --model RUN --example ANNOTATED.nii.gz LABELS.nii.gz -i SCANS -o RESULTS"""


def main() -> None:
    """Run all steps."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo-results"), help="result folder")
    parser.add_argument(
        "--adapt", default="10", help="training steps on the annotated scan (default: %(default)s)"
    )
    args = parser.parse_args()
    started = time.perf_counter()
    annotated, patients, results = (args.out / n for n in ("annotated", "patients", "results"))
    shutil.rmtree(results, ignore_errors=True)

    step("phantom", "--out", annotated, "--patients", 1, "--seed", 1)
    step("phantom", "--out", patients, "--patients", 3, "--seed", 2)
    example = [annotated / part / "ct_000.nii.gz" for part in ("images", "labels")]
    step(
        *("segment", "--example", *example, "--classes", *ORGANS, "--adapt", args.adapt),
        *("-i", patients / "images", "-o", results),
    )
    labels = [f"{name}={value}" for name, value in ORGANS.items()]
    step(
        *("evaluate", "--prediction", results, "--truth", patients, "--labels", *labels),
        *("--json", args.out / "scores.json"),
    )
    minutes = (time.perf_counter() - started) / 60
    print(AFTERWARDS.format(out=args.out, minutes=minutes))


def step(*words: object) -> None:
    """Run one subcommand of the program ``fastproto`` and stop the demo if it fails."""
    arguments = [str(word) for word in words]
    print(f"\n$ fastproto {shlex.join(arguments)}", flush=True)
    if status := fastproto(arguments):
        sys.exit(status)


if __name__ == "__main__":
    main()
