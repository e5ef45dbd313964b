# SPDX-License-Identifier: Apache-2.0
"""The field's rules, counted out on volumes made by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fastproto.errors import ArgumentError
from fastproto.evaluation.protocol import (
    CHUNKS,
    counted_slices,
    episodic_dice,
    folds,
    query_chunks,
    support_slices,
)


def organ(*slices: int, length: int = 16) -> np.ndarray:
    """An organ of four voxels in each of these slices."""
    mask = np.zeros((length, 4, 4), dtype=bool)
    mask[list(slices), :2, :2] = True
    return mask


def test_folds_are_consecutive_and_take_the_next_case_the_last_fold_the_first() -> None:
    cases = [f"c{n:02d}" for n in range(20)]
    found = folds(cases, 5)
    assert found[0] == ["c00", "c01", "c02", "c03", "c04"]
    assert found[3] == ["c12", "c13", "c14", "c15", "c16"]
    assert found[4] == ["c16", "c17", "c18", "c19", "c00"]


def test_every_case_is_in_a_fold_of_its_own_whatever_the_number() -> None:
    cases = [str(n) for n in range(16)]
    found = folds(cases, 5)
    assert [case for fold in found for case in fold[:-1]] == cases
    assert {len(fold) for fold in found} == {4, 5}


@pytest.mark.parametrize("number", [0, 1, 5])
def test_impossible_folds(number: int) -> None:
    with pytest.raises(ArgumentError, match="folds"):
        folds(["a", "b", "c", "d"], number)


def test_support_slices_are_at_a_sixth_a_half_and_five_sixths() -> None:
    twelve = organ(*range(3, 15))
    assert support_slices(twelve, 3) == [5, 9, 13]
    assert support_slices(twelve, 1) == [9]


def test_support_slices_count_the_slices_that_show_the_organ() -> None:
    assert support_slices(organ(0, 1, 2, 10, 11, 12), 3) == [1, 10, 12]
    assert support_slices(organ(4, 9), 3) == [4, 9, 9]
    assert support_slices(organ(7), 3) == [7, 7, 7]


@pytest.mark.parametrize(
    ("margin", "first", "last"), [(0, 4, 8), (2, 2, 10), (5, 0, 13), (50, 0, 15), (None, 0, 15)]
)
def test_the_extent_and_its_margin_count(margin: int | None, first: int, last: int) -> None:
    with_a_gap = organ(4, 5, 8)
    assert counted_slices(with_a_gap, margin).tolist() == list(range(first, last + 1))


def test_nothing_counts_of_an_organ_that_is_absent() -> None:
    assert counted_slices(organ(), 3).size == 0
    assert counted_slices(organ(), None).size == 16


@pytest.mark.parametrize(("first", "last"), [(2, 8), (3, 13), (5, 6), (0, 15), (4, 9)])
def test_query_chunks_are_thirds_of_the_extent_in_the_query(first: int, last: int) -> None:
    numbers = np.arange(16)
    third = (last - first) / 3
    expected = [min(max(math.floor((z - first) / third + 1e-9), 0), 2) for z in numbers]
    assert query_chunks(organ(first, last), numbers, 3).tolist() == expected


def test_chunk_borders_and_what_lies_beyond_them() -> None:
    numbers = np.array([0, 2, 3, 4, 5, 6, 7, 8, 12])
    assert query_chunks(organ(2, 8), numbers, 3).tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2]
    assert query_chunks(organ(5), np.array([4, 5, 6]), 3).tolist() == [1, 1, 1]
    assert query_chunks(organ(2, 8), numbers, 1).tolist() == [0] * 9


class Recorder:
    """Segments six voxels of every slice: four of them are `organ`'s."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, list[int]]] = []

    def __call__(self, support: int, numbers: list[int]) -> np.ndarray:
        self.calls.append((support, numbers))
        found = np.zeros((len(numbers), 4, 4), dtype=bool)
        found[:, :2, :3] = True
        return found


def test_ep1_compares_each_chunk_of_the_query_with_that_of_the_annotated_scan() -> None:
    annotated, query = organ(*range(3, 15)), organ(*range(2, 9))
    segment = Recorder()
    dice = episodic_dice(annotated, query, segment, chunks=CHUNKS["ep1"])
    assert segment.calls == [(5, [2, 3]), (9, [4, 5]), (13, [6, 7, 8])]
    assert dice == pytest.approx(2 * 4 / (4 + 6))


def test_ep2_compares_all_slices_of_the_organ_with_the_middle_one() -> None:
    segment = Recorder()
    episodic_dice(organ(*range(3, 15)), organ(*range(2, 9)), segment, chunks=CHUNKS["ep2"])
    assert segment.calls == [(9, [2, 3, 4, 5, 6, 7, 8])]


def test_dice_is_that_of_all_voxels_together_not_a_mean_over_slices() -> None:
    query = organ(4, 5)
    query[5] = True  # 16 voxels, 6 of them found
    dice = episodic_dice(organ(7), query, Recorder(), chunks=1)
    assert dice == pytest.approx(2 * (4 + 6) / (12 + 20))


def test_slices_beyond_the_organ_count_with_a_margin_alone() -> None:
    query = organ(4, 5)
    scores = [
        episodic_dice(organ(7), query, Recorder(), chunks=3, z_margin=margin)
        for margin in (0, 1, None)
    ]
    assert scores == [pytest.approx(2 * 8 / (8 + 6 * n)) for n in (2, 4, 16)]


def test_an_organ_that_the_query_does_not_show_has_no_dice() -> None:
    segment = Recorder()
    assert math.isnan(episodic_dice(organ(7), organ(), segment, chunks=3))
    assert segment.calls == []
    assert episodic_dice(organ(7), organ(), segment, chunks=3, z_margin=None) == 0
