# SPDX-License-Identifier: Apache-2.0
"""Resident memory of segmenting and of training, measured in a process of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, pathlib, types
import torch
from fastproto._memory import return_large_buffers
from fastproto.losses import EpisodeLoss
from fastproto.nn import FewShotUNet

def peak():
    # Not ru_maxrss: a child's begins with what its parent, pytest, has.
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024

return_large_buffers()  # as the program does: what the heap keeps differs from run to run
model = FewShotUNet().eval()
images = torch.randn(1, 4, 3, 256, 256)
masks = torch.zeros(1, 4, 256, 256, dtype=torch.long)
masks[..., 60:160, 80:200] = 1
before = peak()
with torch.inference_mode():
    prototypes = model.encode_support(images[:, :1], masks[:, :1]).trim()
    model.segment(images, prototypes)
segment = peak() - before

model.train()
optimizer = torch.optim.Adam(model.parameters())
episode = types.SimpleNamespace(
    support_images=images[:, :1], support_masks=masks[:, :1],
    query_images=images[:, 1:2], query_masks=masks[:, 1:2], num_classes=2,
)
for _ in range(2):
    optimizer.zero_grad()
    EpisodeLoss()(model, episode)[0].backward()
    optimizer.step()
print(json.dumps({"segment": segment, "train": peak()}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="there is no /proc")
def test_resident_memory(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=tmp_path,  # not the sources: the installed package
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    peak = json.loads(result.stdout)  # MiB
    assert peak["segment"] < 320  # on top of the network: four images, two classes
    assert peak["train"] < 1400  # the largest maps kept, as this little batch allows
