# SPDX-License-Identifier: Apache-2.0
"""What the choice of kernels asks of a GPU."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch


@dataclasses.dataclass(frozen=True)
class Chip:
    """The device.

    Attributes:
        capability: Compute capability times ten, e.g. 90; 0 where it is not NVIDIA's.
        multiprocessors: How many programs run side by side, about.
        shared_memory: Bytes a program may have.
    """

    capability: int
    multiprocessors: int
    shared_memory: int


SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes a program may have, by compute capability (CUDA C++ programming guide)."""
H200 = Chip(90, 132, SHARED_MEMORY[90])


def chip_of(device: torch.device) -> Chip:
    """That of a CUDA device, of the current one where it has no index; an H200 where none is there.

    The last is for fake tensors and for people who ask what would run.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        return H200
    return _chip(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _chip(index: int) -> Chip:
    properties: Any = torch.cuda.get_device_properties(index)
    is_nvidia = torch.version.hip is None
    return Chip(
        10 * properties.major + properties.minor if is_nvidia else 0,
        properties.multi_processor_count,
        getattr(properties, "shared_memory_per_block_optin", 64 * 1024),
    )
