# SPDX-License-Identifier: Apache-2.0
"""Peak resident memory of training and of segmenting, each in a process of its own; file sizes.

    python scripts/measure_memory.py --write   # prints, and writes benchmarks/results

Training: steps on one 256 x 256 episode (1 way, 1 shot, all three losses, Adam, ResNet-34).
Segmenting: `fastproto segment` of CT volumes of 512 x 512 with 50, 100 and 200 slices.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import records

if TYPE_CHECKING:
    from fastproto.nn.base import FewShotModel


def train_steps(precision: str) -> None:
    """Three optimiser steps on a random episode."""
    import torch

    from fastproto._memory import return_large_buffers
    from fastproto.losses import EpisodeLoss
    from fastproto.nn import FewShotUNet
    from fastproto.training.episodes import Episode

    return_large_buffers()  # as fastproto.training.train does
    model = FewShotUNet().train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    masks = torch.zeros(1, 1, 256, 256, dtype=torch.long)
    masks[..., 80:170, 90:180] = 1
    episode = Episode(
        support_images=torch.randn(1, 1, 3, 256, 256),
        support_masks=masks,
        query_images=torch.randn(1, 1, 3, 256, 256),
        query_masks=masks,
        num_classes=2,
        description="random",
    )
    loss = EpisodeLoss()
    for _ in range(3):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            total, _, _ = loss(model, episode)
        total.backward()
        optimizer.step()
        optimizer.zero_grad()


def segment(slices: int) -> None:
    """Register one slab of a synthetic CT and segment a volume of ``slices`` slices."""
    import numpy as np
    import torch

    from fastproto.cli import main as program
    from fastproto.data import Preprocessing, Volume, write_volume
    from fastproto.nn import FewShotUNet

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        grid = ((0.8, 0.8, 2.0), (0.0, 0.0, 0.0), (1.0, 0, 0, 0, 1, 0, 0, 0, 1))

        def write(path: Path, array: np.ndarray) -> None:
            write_volume(path, array, like=Volume(array, *grid))

        for count, stem in ((8, "support"), (slices, "query")):
            rng = np.random.default_rng(0)
            array = np.full((count, 512, 512), -1000, dtype=np.int16)
            for plane in array:
                plane[100:400, 80:430] = rng.integers(-50, 150, (300, 350))
            write(folder / f"{stem}.nii.gz", array)
        mask = np.zeros((8, 512, 512), dtype=np.uint8)
        mask[2:6, 200:300, 200:300] = 1
        write(folder / "mask.nii.gz", mask)
        preprocessing = Preprocessing("ct", mean=20.0, std=60.0).to_dict()
        FewShotUNet().save(
            folder / "model.safetensors", extra={"preprocessing": {"ct": preprocessing}}
        )
        del array, mask
        command = f"""
            segment --model {folder}/model.safetensors --adapt 0
            --example {folder}/support.nii.gz {folder}/mask.nii.gz
            -i {folder}/query.nii.gz -o {folder}/out.nii.gz
        """
        status = program(command.split())
        if status:
            sys.exit(status)


def network_size(model: FewShotModel) -> dict[str, float]:
    """Parameters, and megabytes of the saved file."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "model.safetensors"
        model.save(path)
        size = path.stat().st_size
    return {"parameters": sum(p.numel() for p in model.parameters()), "file_mb": size / 1e6}


CASES = {
    **{f"train {name}": partial(train_steps, name) for name in ("float32", "bfloat16")},
    **{f"segment {count} slices": partial(segment, count) for count in (50, 100, 200)},
}


def main() -> None:
    """Measure every case in a process of its own."""
    parser = records.arguments(__doc__)
    parser.add_argument("--case", choices=CASES, help="run one case here and print its peak")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results")
    args = parser.parse_args()
    if args.case:
        CASES[args.case]()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    from fastproto.evaluation.report import machine, versions
    from fastproto.nn import FewShotUNet, PrototypeNet

    peaks = {}
    for case in CASES:
        command = [sys.executable, __file__, "--case", case]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        peaks[case] = round(float(output.splitlines()[-1]))
        print(f"{case:<20} {peaks[case]:>6} MiB", flush=True)
    networks = {
        "FewShotUNet, ResNet-34": network_size(FewShotUNet()),
        "baseline, ResNet-101": network_size(PrototypeNet()),
    }
    if args.write:
        path = records.RESULTS / f"{records.today()}-memory.json"
        records.write(
            path,
            command="python scripts/measure_memory.py --write",
            machine=machine(),
            versions=versions("torch", "python"),
            peak_resident_mib=peaks,
            networks=networks,
        )
        print(f"Result: {path}")


if __name__ == "__main__":
    main()
