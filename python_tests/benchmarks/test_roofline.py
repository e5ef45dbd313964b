# SPDX-License-Identifier: Apache-2.0
"""The model of the least work, against numbers counted by hand."""

from __future__ import annotations

import pytest
import roofline
from roofline import Ceilings, Size, Work

# As measured on one: a copy, and a product of 8192 x 8192 matrices of random numbers.
H200 = Ceilings(4.3e12, {"bfloat16": 788e12})


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
    assert H200.expected_seconds(work, "bfloat16") * 1e6 == pytest.approx(microseconds, rel=0.03)
    assert H200.bound(work, "bfloat16") == bound


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


def test_bytes_and_products_of_the_passes() -> None:
    size = bag(256)
    maps, protos, row = 512 * 256 * 2, 256 * 512 * 2, 256 * 4
    plain, saved = roofline.forward(size), roofline.forward(size, save=True)
    assert saved == plain + Work(maps + row + 2 * row + 2 * row, 0)
    backward = roofline.backward(size)
    assert backward.bytes == 5 * maps + 2 * protos + row + 2 * row + 2 * row
    assert (plain.flops, backward.flops) == (2 * size.product, 5 * size.product)
    assert roofline.work(size, "both") == saved + backward
    assert roofline.forward(bag(0)) == Work(3 * maps, 0)  # an empty bag moves its maps alone
    assert [bag(1, s).sum_bytes for s in (2, 4, 8)] == [4, 4, 8]


def test_float32_takes_the_faster_of_two_ways() -> None:
    rates = {"float32": 50e12, "tf32": 390e12}
    assert Ceilings(4e12, rates).rate("float32") == 130e12
    assert Ceilings(4e12, rates | {"tf32": 60e12}).rate("float32") == 50e12
    assert Ceilings(4e12, {"float32": 50e12}).rate("float32") == 50e12


@pytest.mark.parametrize(("what", "products"), [("forward", 2), ("backward", 5), ("both", 7)])
def test_counts_of_the_tables(what: str, products: int) -> None:
    """Forward two matrix products; backward five: the scores again, and four gradients."""
    bounds = (0, 600, 603, 853, 893, 1021, 1033, 1433, 1523)
    size = roofline.size_of(bounds, 4, 2, 256, 512, 4)
    assert size.prototypes == 1523
    assert roofline.work(size, what).flops == 2 * products * 2 * 256 * 1523 * 512
