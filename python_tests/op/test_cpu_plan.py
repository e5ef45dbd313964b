# SPDX-License-Identifier: Apache-2.0
"""How the CPU forward is cut into tasks: a pure function."""

from __future__ import annotations

import pytest

from fastproto import _C


@pytest.mark.parametrize("threads", [1, 2, 4, 8, 16])
def test_one_image_and_one_class_occupy_every_thread(threads: int) -> None:
    *_, tasks = _C.cpu_forward_plan(images=1, ways=1, dim=512, pixels=256, threads=threads)
    assert tasks % threads == 0


def test_much_work_comes_in_the_widest_tiles() -> None:
    assert _C.cpu_forward_plan(64, 2, 512, 256, 8)[:2] == (64, 2)


@pytest.mark.parametrize("pixels", [1, 49, 63, 65, 200, 256, 4096])
@pytest.mark.parametrize("threads", [1, 3, 16])
def test_tasks_cover_every_pixel_once(pixels: int, threads: int) -> None:
    width, strips, tasks = _C.cpu_forward_plan(3, 2, 512, pixels, threads)
    tiles, rest = divmod(tasks, 3 * 2)
    assert rest == 0
    assert (tiles - 1) * width * strips < pixels <= tiles * width * strips


@pytest.mark.parametrize(("dim", "item"), [(512, 8), (1024, 4), (2048, 4), (4096, 4)])
def test_wide_vectors_get_narrow_strips(dim: int, item: int) -> None:
    width, strips, _ = _C.cpu_forward_plan(8, 1, dim, 4096, 2, item)
    assert strips == 1
    assert width * dim * item <= 64 * 512 * 4 or width == 16
