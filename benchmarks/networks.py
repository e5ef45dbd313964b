# SPDX-License-Identifier: Apache-2.0
"""The networks that are compared, ready to run, and the memory of one in a process of its own.

    python benchmarks/networks.py unet inference 16 cpu float32

prints the peak of resident memory in MiB, beyond what Python and its libraries take.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from peak_memory import resident
from torch.nn.utils import clip_grad_norm_

from fastproto import FewShotUNet
from fastproto._memory import return_large_buffers
from fastproto.losses import EpisodeLoss
from fastproto.nn import PrototypeNet, Prototypes, winograd

SIZE = 256  # pixels
NETWORKS = {"unet": FewShotUNet, "baseline": PrototypeNet}
"""ResNet-34 with decoder; ResNet-101 at output stride 8 with its scores enlarged."""

PROTOTYPES = (1000, 1140)
"""Ends of the bags of background and organ, as of five annotated slices."""


@contextmanager
def direct_convolutions() -> Iterator[None]:
    """Every convolution as PyTorch computes it."""
    with mock.patch.object(winograd, "_LEAST_CHANNELS", sys.maxsize):
        yield


def make(
    name: str,
    what: str,
    batch: int,
    device: str,
    dtype: torch.dtype,
    *,
    size: int = SIZE,
    **options: Any,
) -> Callable[[], None]:
    """A call that does the work and waits for the device.

    Args:
        name: One of ``NETWORKS``. For inference with " eager" the network as it is, under autocast
            for half types, and with " direct" besides that no convolution of ours; without, it is
            `for_inference`. For training with " recomputing" the decoder keeps less, and " direct"
            is as before.
        what: "inference" (two classes) or "training" (a whole step, cross entropy alone).
        batch: Images, or episodes of a support and a query.
        device: "cpu" or "cuda".
        dtype: Of the arithmetic.
        size: Side of the images in pixels.
        options: Of the network, instead of its defaults.
    """
    torch.manual_seed(0)
    kind, _, form = name.partition(" ")
    model = NETWORKS[kind](**options).to(device)
    if form != "direct" or what == "training":
        model = model.to(memory_format=torch.channels_last)
    work = _inference if what == "inference" else _training
    run = work(model, form, batch, dtype, size)

    def call() -> None:
        run()
        if device == "cuda":
            torch.cuda.synchronize()

    return call


def _masks(*shape: int) -> torch.Tensor:
    masks = torch.zeros(*shape, dtype=torch.long)
    masks[..., shape[-2] // 3 : shape[-2] * 2 // 3, shape[-1] // 3 : shape[-1] * 2 // 3] = 1
    return masks


def _inference(
    model: torch.nn.Module, form: str, batch: int, dtype: torch.dtype, size: int
) -> Callable[[], None]:
    model.eval()
    device = next(model.parameters()).device
    images = torch.randn(1, batch, 3, size, size, device=device)
    bounds = torch.tensor([0, *PROTOTYPES], dtype=torch.int32, device=device)
    protos = torch.randn(PROTOTYPES[-1], model.encoder.channels[-1], device=device).relu()
    prototypes = Prototypes(protos, bounds, 2)
    if form:

        @torch.inference_mode()
        def run() -> None:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                if form == "direct":
                    with direct_convolutions():
                        model.segment(images, prototypes)
                else:
                    model.segment(images, prototypes)

        return run
    fast = model.for_inference(dtype)
    images, prototypes = images.to(dtype), prototypes.to(dtype=dtype)

    @torch.inference_mode()
    def run_fast() -> None:
        fast.segment(images, prototypes)

    return run_fast


def _training(
    model: torch.nn.Module, form: str, batch: int, dtype: torch.dtype, size: int
) -> Callable[[], None]:
    model.train()
    if isinstance(model, FewShotUNet):
        model.decoder.recompute = "off" if not form else "on"
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    loss = EpisodeLoss(align=0, cycle=0)
    masks = _masks(batch, 1, size, size).to(device)
    episode = SimpleNamespace(
        support_images=torch.randn(batch, 1, 3, size, size, device=device),
        support_masks=masks,
        query_images=torch.randn(batch, 1, 3, size, size, device=device),
        query_masks=masks,
        num_classes=2,
    )

    def step() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            total, _, _ = loss(model, episode)
        total.backward()
        clip_grad_norm_(list(model.parameters()), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def direct() -> None:
        with direct_convolutions():
            step()

    return direct if form == "direct" else step


def peak_mib(name: str, what: str, batch: int, device: str, dtype: torch.dtype) -> int:
    """Peak memory of two calls with everything they need, in a process of its own."""
    command = [sys.executable, __file__, name, what, str(batch), device, str(dtype)[6:]]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(result.stdout)


def main() -> None:
    """Measure what the command line says."""
    name, what, batch, device, dtype = sys.argv[1:]
    return_large_buffers()  # as the program does
    before = resident("VmHWM") if device == "cpu" else 0
    call = make(name, what, int(batch), device, getattr(torch, dtype))
    for _ in range(2):
        call()
    if device == "cpu":
        print((resident("VmHWM") - before) // 2**20)
    else:
        print(torch.cuda.max_memory_allocated() // 2**20)


if __name__ == "__main__":
    main()
