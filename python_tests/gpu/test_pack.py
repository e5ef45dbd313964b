# SPDX-License-Identifier: Apache-2.0
"""Prototypes packed on a GPU, against the same in plain PyTorch there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("safetensors", reason="fastproto.nn imports safetensors")

from fastproto.nn import class_masks, extract_prototypes

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(2, 3, 20, (3, 4), 5), (1, 1, 3, (19, 17), 3), (1, 2, 512, (16, 16), 3)]


def problem(
    episodes: int, shots: int, dim: int, size: tuple[int, int], classes: int
) -> tuple[Tensor, Tensor]:
    """Features and masks; the last class is nowhere, the one before fills no cell."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(episodes, shots, dim, *size, generator=generator)
    shape = (episodes, shots, 2 * size[0], 2 * size[1])
    labels = torch.randint(0, classes - 1, shape, generator=generator)
    labels[labels == classes - 2] = -1
    labels[:, 0, 0, 0] = classes - 2
    return features, class_masks(labels, classes)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("append_global", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_plain_pytorch(
    backend: str,
    dtype: torch.dtype,
    shape: tuple[int, int, int, tuple[int, int], int],
    append_global: bool,
    channels_last: bool,
    device: str,
) -> None:
    features, masks = (x.to(device) for x in problem(*shape))
    features = features.to(dtype)
    if channels_last:
        features = features.movedim(2, -1).contiguous().movedim(-1, 2)
    features.requires_grad_()
    torch.use_deterministic_algorithms(True)  # fresh memory holds NaN
    results = []
    for name in (backend, "reference"):
        found = extract_prototypes(features, masks, append_global=append_global, backend=name)
        grad = torch.linspace(-1, 1, found.protos.numel(), device=device).to(dtype)
        (grad,) = torch.autograd.grad(found.protos, features, grad.view_as(found.protos))
        results.append((found.offsets, found.protos, grad))
    ours, plain = results
    assert torch.equal(ours[0], plain[0])
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3.2e-2}[dtype]
    torch.testing.assert_close(ours[1], plain[1], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(ours[2], plain[2], rtol=4 * tolerance, atol=4 * tolerance)


def test_the_same_bits_every_time(backend: str, device: str) -> None:
    features, masks = (x.to(device) for x in problem(2, 3, 64, (9, 8), 4))
    features.requires_grad_()
    results = []
    for _ in range(3):
        protos = extract_prototypes(features, masks, append_global=True, backend=backend).protos
        results.append((protos, *torch.autograd.grad(protos.square().sum(), features)))
    for other in results[1:]:
        for found, expected in zip(other, results[0], strict=True):
            assert torch.equal(found, expected)


def test_nothing_is_asked_of_the_device(backend: str, device: str) -> None:
    features, masks = (x.to(device) for x in problem(2, 3, 64, (9, 8), 4))
    extract_prototypes(features, masks, backend=backend)
    torch.cuda.set_sync_debug_mode("error")
    extract_prototypes(features, masks, backend=backend)
