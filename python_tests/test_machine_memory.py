# SPDX-License-Identifier: Apache-2.0
"""How much memory the machine, or the container, is taken to have."""

from __future__ import annotations

import pytest
import torch

from fastproto import _memory
from fastproto.errors import ResourceError


@pytest.mark.parametrize(
    ("limit", "expected"), [("max\n", 2**60), ("1048576\n", 2**20), (None, 2**60)]
)
def test_a_container_may_have_less_than_its_machine(limit, expected, tmp_path, monkeypatch) -> None:
    if limit is not None:
        (tmp_path / "memory.max").write_text(limit)
    monkeypatch.setattr(_memory, "_CGROUP", tmp_path)
    monkeypatch.setattr(_memory.os, "sysconf", lambda name: 2**30)
    assert _memory.machine_memory() == expected


@pytest.mark.parametrize(("error", "said"), [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
     "memory on the GPU: 2.00 GiB were wanted; allowed"),
    (RuntimeError("CUDA error: out of memory"), "memory on the GPU: more was wanted; allowed"),
    (MemoryError("Unable to allocate 3.00 GiB for an array"),
     "memory: 3.00 GiB were wanted beyond the "),
    (RuntimeError("could not create a primitive"), "memory: more was wanted beyond the "),
])  # fmt: skip
def test_what_the_machine_has_is_said_of_its_own_memory(error: Exception, said: str) -> None:
    with pytest.raises(ResourceError) as caught, _memory.enough_memory("scan"):
        raise error
    assert f"scan: found too little {said}" in str(caught.value)


def test_another_error_is_left_alone() -> None:
    with pytest.raises(RuntimeError, match="descriptor"), _memory.enough_memory("scan"):
        raise RuntimeError("could not create a primitive descriptor for a convolution")
