# SPDX-License-Identifier: Apache-2.0
"""`fastproto segment` on a folder of very many scans, one of them huge and one broken.

    python scripts/load_campaign.py --write                          # 500 scans, up to an hour
    python scripts/load_campaign.py --scans 12 --large 128 128 30    # a quarter of a minute

The small scans are phantoms of 64 x 64 x 10 voxels, the huge one is a phantom as well, each voxel
repeated, so that it is small on disk and 3 GB in memory; the model is an untrained ResNet-18. Fails
where the broken scan stops the others or is not named, where the exit code hides it, where a result
is missing, or where the last scans take longer, or the process grows, beyond what is allowed below.
"""

from __future__ import annotations

import gzip
import math
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import records

PATIENTS = 2
SHAPE = (10, 64, 64)  # of a small scan, z first
LINE = re.compile(r"(\S+)\.nii\.gz -> ")
SLOWER = 1.25  # the last tenth of the small scans to the first
GROWTH_MIB = 100  # from the first tenth to the last, apart from the huge scan's
COPIES = 7  # of the huge scan's voxels, that may be in memory at once


def main() -> int:
    """Make the folder, segment it, judge; 1 where something is wrong."""
    parser = records.arguments(__doc__)
    parser.add_argument("--scans", type=int, default=500)
    parser.add_argument("--large", type=int, nargs=3, default=(1024, 1024, 1500), metavar="N")
    parser.add_argument("--folder", type=Path, help="for the scans (default: a temporary one)")
    parser.add_argument("--write", action="store_true", help="a record in benchmarks/results")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name).resolve()
        huge, broken = make_folder(folder, args.scans, tuple(args.large))
        found = segment(folder)
        record, faults = judge(folder, found, args.scans, huge, broken, math.prod(args.large))
    for name, value in record.items():
        print(f"{name}: {value}")
    for fault in faults:
        print(f"wrong: {fault}")
    if args.write:
        records.write_campaign("load", ("torch", "numpy"), **record, wrong=faults)
    return 1 if faults else 0


def make_folder(folder: Path, scans: int, size: tuple[int, ...]) -> tuple[str, str]:
    """A task and a folder of scans; the names of the huge and of the broken one."""
    import torch

    from fastproto.cli import main as program
    from fastproto.data import Preprocessing, read_volume
    from fastproto.data.phantom import write_phantom
    from fastproto.nn import FewShotUNet

    phantom = write_phantom(folder / "phantom", patients=PATIENTS, modality="mr", shape=SHAPE)
    torch.manual_seed(0)
    preprocessing = Preprocessing("mr", image_size=32).to_dict()
    model = FewShotUNet(encoder="resnet18")
    model.save(folder / "model.safetensors", {"preprocessing": {"mr": preprocessing}})
    images = sorted((phantom / "images").iterdir())
    label = phantom / "labels" / images[0].name
    how = "--labels spine=5 --adapt 0 --prior box --slices 3"
    learn = f"learn --model {folder}/model.safetensors --image {images[0]} --label {label}"
    if program([*learn.split(), *how.split(), "-o", str(folder / "organs.task")]):
        raise SystemExit("the example cannot be learned")
    (folder / "scans").mkdir()
    huge, broken = f"scan_{2 * scans // 3:04d}", f"scan_{scans // 3:04d}"
    for number in range(scans):
        target = folder / "scans" / f"scan_{number:04d}.nii.gz"
        content = images[number % PATIENTS].read_bytes()
        if target.name.startswith(huge):
            write_huge(target, read_volume(images[0]), size)
        else:
            target.write_bytes(content[: len(content) // 2] if broken in target.name else content)
    return huge, broken


def write_huge(path: Path, volume: Any, size: tuple[int, ...]) -> None:
    """A volume with every voxel repeated up to ``size`` (x, y, z), written slice by slice."""
    import nibabel as nib

    repeats = [wanted // here for wanted, here in zip(size, volume.array.shape[::-1], strict=True)]
    size = tuple(
        here * times for here, times in zip(volume.array.shape[::-1], repeats, strict=True)
    )
    axes = np.eye(4)
    axes[:3, :3] = np.reshape(volume.direction, (3, 3)) * volume.spacing / repeats
    axes[:3, 3] = volume.origin
    header = nib.Nifti1Header()
    header.set_data_shape(size)
    header.set_data_dtype(np.int16)
    header.set_sform(np.diag([-1, -1, 1, 1]) @ axes, 1)
    header.set_qform(np.diag([-1, -1, 1, 1]) @ axes, 1)
    header["magic"], header["vox_offset"] = b"n+1", 352
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(header.binaryblock + bytes(4))
        for plane in volume.array:
            wide = plane.repeat(repeats[1], axis=0).repeat(repeats[0], axis=1).astype("<i2")
            for _ in range(repeats[2]):
                file.write(wide.tobytes())


def segment(folder: Path) -> dict[str, Any]:
    """Run the program: its processor time and memory when each scan was done, peak and end."""
    command = f"segment --model {folder}/model.safetensors --task {folder}/organs.task"
    command += f" -i {folder}/scans -o {folder}/results --no-overlay"
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "fastproto", *command.split()],
        cwd=folder,  # not the sources, whose package has no native library
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    said: list[str] = []
    assert process.stdout is not None
    assert process.stderr is not None
    errors = process.stderr
    listener = threading.Thread(target=lambda: said.extend(errors))
    listener.start()
    done: dict[str, tuple[float, float]] = {}
    started = time.perf_counter()
    peak = 0.0
    for line in process.stdout:
        if match := LINE.search(line):
            memory = memory_mib(process.pid)
            peak = max(peak, memory["VmHWM"])
            done[Path(match[1]).name] = processor_seconds(process.pid), memory["VmRSS"]
    status = process.wait()
    listener.join()
    seconds = time.perf_counter() - started
    return {
        "done": done,
        "seconds": seconds,
        "peak_mib": peak,
        "status": status,
        "said": "".join(said),
    }


def memory_mib(process: int) -> dict[str, float]:
    """Resident memory of a process now (VmRSS) and at its highest (VmHWM)."""
    text = Path(f"/proc/{process}/status").read_text(encoding="ascii")
    return {name: int(kib) / 1024 for name, kib in re.findall(r"(Vm\w+):\s+(\d+) kB", text)}


def processor_seconds(process: int) -> float:
    """What a process has used; unlike the clock's, what others do does not change it."""
    fields = Path(f"/proc/{process}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def judge(
    folder: Path, found: dict[str, Any], scans: int, huge: str, broken: str, voxels: int
) -> tuple[dict[str, Any], list[str]]:
    """What is recorded, and what is wrong."""
    names = list(found["done"])
    ends, memory = np.array(list(found["done"].values())).T
    took = dict(zip(names, np.diff(ends, prepend=0), strict=True))
    small = np.array([took[name] for name in names[1:] if name != huge])  # the first also imports
    tenth = max(len(small) // 10, 3)
    first, last = (float(np.median(part)) for part in (small[:tenth], small[-tenth:]))
    at = names.index(huge)
    early, late = memory[min(tenth, at - 1)], memory[min(at + tenth, len(names) - 1)]
    grown = {"before": float(memory[at - 1] - early), "after": float(memory[-1] - late)}
    bound = COPIES * voxels * 2 / 2**20 + float(early) + GROWTH_MIB
    last_line = found["said"].strip().splitlines()[-1:] or [""]
    written = sorted(path.name for path in (folder / "results").glob("*.nii.gz"))
    record = {
        "scans": scans,
        "huge_voxels": voxels,
        "huge_mib": round(voxels * 2 / 2**20),
        "huge_processor_seconds": round(float(took[huge]), 1),
        "clock_seconds": round(found["seconds"], 1),
        "processor_seconds_per_scan": {
            "first_tenth": round(first, 4),
            "last_tenth": round(last, 4),
        },
        "slope_ms_per_100_scans": round(1e5 * float(np.polyfit(range(len(small)), small, 1)[0]), 2),
        "resident_mib": {
            "first_tenth": round(float(early)),
            "last": round(float(memory[-1])),
        },
        "grown_mib": {name: round(value, 1) for name, value in grown.items()},
        "peak_mib": round(found["peak_mib"]),
        "bound_mib": round(bound),
        "exit_status": found["status"],
        "summary": last_line[0],
    }
    checks = {
        "another exit status than 2": found["status"] == 2,
        "a summary without '1 of N scans failed'": f"1 of {scans} scans failed" in found["said"],
        "the broken scan is not named": f"{broken}.nii.gz" in found["said"],
        "scans without a result": len(written) == scans - 1 and f"{broken}.nii.gz" not in written,
        "the last scans take longer than the first": last <= SLOWER * first + 0.02,
        "memory grows with the number of scans": max(grown.values()) <= GROWTH_MIB,
        "more memory than the bound": found["peak_mib"] <= bound,
    }
    return record, [fault for fault, fine in checks.items() if not fine]


if __name__ == "__main__":
    sys.exit(main())
