# SPDX-License-Identifier: Apache-2.0
"""Whether an installed package does its main job: `make smoke` runs it where only the wheel is.

The native CPU kernel gives what plain PyTorch gives, the base model is there, and an organ of one
synthetic patient is found in another, from the command line.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import fastproto
from fastproto.op import backends

DICE = 0.8  # phantoms are easy


def main() -> None:
    """Run all checks; the first that fails ends it."""
    package = Path(fastproto.__file__).resolve().parent
    assert "site-packages" in package.parts, f"{package} is no installed package"
    available = {name: reason for name, can_run, reason in backends.describe() if can_run}
    assert any("native" in name for name in available), backends.describe()
    torch.manual_seed(0)
    feat, protos = torch.randn(1, 2, 64, 16, 16), torch.randn(40, 64)
    offsets = torch.tensor([0, 30, 40], dtype=torch.int32)
    native, plain = (
        fastproto.proto_attention(feat, protos, offsets, backend=backend)
        for backend in ("native", "reference")
    )
    torch.testing.assert_close(native, plain)
    with tempfile.TemporaryDirectory() as folder:
        dice = first_organ(Path(folder))
    assert dice > DICE, f"Dice {dice:.2f} of a phantom's liver"
    print(f"fastproto {fastproto.__version__} does its job with torch {torch.__version__}")


def first_organ(folder: Path) -> float:
    """Dice of the liver in a second phantom, learned from the first."""
    data, result = folder / "phantom", folder / "ct_001.nii.gz"
    example = [data / part / "ct_000.nii.gz" for part in ("images", "labels")]
    program("phantom", "--out", data, "--patients", 2)
    program(
        *("segment", "--example", *example, "--classes", "liver", "--adapt", 0),
        *("-i", data / "images" / "ct_001.nii.gz", "-o", result),
    )
    program(
        *("evaluate", "--prediction", result, "--truth", data / "labels" / "ct_001.nii.gz"),
        *("--labels", "liver=1", "--json", folder / "scores.json"),
    )
    scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    return float(scores["overall"]["dice"])


def program(*words: object) -> None:
    """Run the installed program, not the module: a broken entry point is noticed."""
    executable = Path(sys.executable).parent / "fastproto"
    subprocess.run([str(executable), *map(str, words)], check=True)


if __name__ == "__main__":
    main()
