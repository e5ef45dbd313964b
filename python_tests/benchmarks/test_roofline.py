# SPDX-License-Identifier: Apache-2.0
"""The model of the least work, against numbers counted by hand."""

from __future__ import annotations

import itertools

import pytest
import roofline
from roofline import Ceilings, Size, Work


def bag(count: int, value_bytes: int = 2) -> Size:
    """One image, one class, D = 512, 16 x 16 pixels."""
    return roofline.size_of((0, count), 1, 1, 256, 512, value_bytes)


@pytest.mark.parametrize(
    ("count", "mflop", "megabytes", "microseconds", "bound"),
    [
        (16, 8.4, 0.80, 0.19, "bytes"),
        (64, 33.6, 0.85, 0.20, "bytes"),
        (256, 134.2, 1.05, 0.24, "bytes"),
        (430, 225.4, 1.23, 0.29, "products"),  # the ridge: both take as long
        (1024, 536.9, 1.83, 0.68, "products"),
        (4096, 2147.5, 4.98, 2.7, "products"),
    ],
)
def test_forward_of_a_bag_on_an_h200(
    count: int, mflop: float, megabytes: float, microseconds: float, bound: str
) -> None:
    work = roofline.forward(bag(count))
    assert work.flops / 1e6 == pytest.approx(mflop, abs=0.05)
    assert work.bytes / 1e6 == pytest.approx(megabytes, abs=0.006)
    seconds = roofline.expected_seconds(work, "bfloat16")
    assert seconds * 1e6 == pytest.approx(microseconds, rel=0.03)
    assert roofline.bound(work, "bfloat16") == bound


def test_bags_add_up() -> None:
    many = roofline.size_of(tuple(range(0, 513 * 256, 256)), 512, 1, 256, 512, 2)
    for what in ("forward", "backward", "both"):
        one, all_bags = roofline.work(bag(256), what), roofline.work(many, what)
        assert all_bags == Work(512 * one.bytes, 512 * one.flops)


def test_images_share_the_prototypes_and_classes_the_image() -> None:
    size = roofline.size_of((0, 30, 40), 1, 8, 256, 512, 4)
    assert size == Size(8, 16, 40, 320, 256, 512, 4)
    work = roofline.forward(size)
    assert work.bytes == 4 * (8 * 512 * 256 + 40 * 512 + 16 * 1024 * 256)
    assert work.flops == 4 * 8 * 40 * 256 * 512


def test_flags_of_the_forward() -> None:
    size = bag(256)
    maps = 512 * 256 * 2
    plain = roofline.forward(size)
    assert plain.bytes - roofline.forward(size, concat=False).bytes == maps
    saved = roofline.forward(size, save=True)
    assert saved.bytes - plain.bytes == maps + 256 * 4 + 2 * 256 * 4 + 2 * 256 * 4
    assert saved.flops == plain.flops


def test_kernels_of_the_backward() -> None:
    size = bag(256)
    maps, protos, row = 512 * 256 * 2, 256 * 512 * 2, 256 * 4
    query, of_protos = roofline.backward_query(size), roofline.backward_protos(size)
    assert query.bytes == 5 * maps + protos + 2 * row + 2 * row + 2 * row
    assert of_protos.bytes == 2 * maps + 2 * protos + 2 * row + 2 * row + 2 * row
    assert (query.flops, of_protos.flops) == (3 * size.product, 4 * size.product)
    both = roofline.backward(size)
    assert both.flops == 5 * size.product  # as the tables of the CPU count
    assert both.bytes == query.bytes - row + protos
    assert roofline.backward(size, concat=False).bytes == both.bytes - maps
    assert roofline.proto_stats(size) == Work(protos + 2 * row, 0)


def test_an_empty_bag_moves_its_maps_alone() -> None:
    assert roofline.forward(bag(0)) == Work(3 * 512 * 256 * 2, 0)


def test_float64_sums_in_float64() -> None:
    assert [bag(1, s).sum_bytes for s in (2, 4, 8)] == [4, 4, 8]


def test_float32_takes_the_faster_of_two_ways() -> None:
    rates = {"float32": 50e12, "tf32": 390e12}
    assert Ceilings(4e12, rates).rate("float32") == 130e12
    assert Ceilings(4e12, rates | {"tf32": 60e12}).rate("float32") == 50e12
    assert Ceilings(4e12, {"float32": 50e12}).rate("float32") == 50e12


def test_work_of_an_unknown_pass() -> None:
    with pytest.raises(ValueError, match="allowed: forward, backward, both"):
        roofline.work(bag(1), "sideways")


@pytest.mark.parametrize(("what", "products"), [("forward", 2), ("backward", 5), ("both", 7)])
def test_counts_of_the_tables(what: str, products: int) -> None:
    """Forward two matrix products; backward five: the scores again, and four gradients."""
    bounds = (0, 600, 603, 853, 893, 1021, 1033, 1433, 1523)
    size = roofline.size_of(bounds, 4, 2, 256, 512, 4)
    assert size.prototypes == sum(b - a for a, b in itertools.pairwise(bounds))
    assert roofline.work(size, what).flops == 2 * products * 2 * 256 * 1523 * 512
