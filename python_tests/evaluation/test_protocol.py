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


def organ(*slices: int) -> np.ndarray:
    """An organ of four voxels in each of these slices, of 16."""
    mask = np.zeros((16, 4, 4), dtype=bool)
    mask[list(slices), :2, :2] = True
    return mask


TWELVE, SEVEN = organ(*range(3, 15)), organ(*range(2, 9))


def test_folds_are_consecutive_and_take_the_next_case_the_last_fold_the_first():
    cases = [f"c{n:02d}" for n in range(20)]
    found = folds(cases, 5)
    assert found[0] == ["c00", "c01", "c02", "c03", "c04"]
    assert found[3] == ["c12", "c13", "c14", "c15", "c16"]
    assert found[4] == ["c16", "c17", "c18", "c19", "c00"]
    uneven = folds(cases[:16], 5)
    assert [case for fold in uneven for case in fold[:-1]] == cases[:16]
    assert {len(fold) for fold in uneven} == {4, 5}
    for number in (0, 1, 5):
        with pytest.raises(ArgumentError, match="folds"):
            folds(cases[:4], number)


@pytest.mark.parametrize(
    ("annotated", "chunks", "expected"),
    [
        (TWELVE, 3, [5, 9, 13]),  # at a sixth, a half and five sixths
        (TWELVE, 1, [9]),
        (organ(0, 1, 2, 10, 11, 12), 3, [1, 10, 12]),  # only slices that show the organ
        (organ(4, 9), 3, [4, 9, 9]),
        (organ(7), 3, [7, 7, 7]),
    ],
)
def test_support_slices_are_the_middles_of_equal_parts(annotated, chunks, expected):
    assert support_slices(annotated, chunks) == expected


@pytest.mark.parametrize(
    ("margin", "first", "last"), [(0, 4, 8), (2, 2, 10), (5, 0, 13), (50, 0, 15), (None, 0, 15)]
)
def test_the_extent_and_its_margin_count(margin, first, last):
    with_a_gap = organ(4, 5, 8)
    assert counted_slices(with_a_gap, margin).tolist() == list(range(first, last + 1))
    assert counted_slices(organ(), margin).size == (16 if margin is None else 0)  # absent


@pytest.mark.parametrize(("first", "last"), [(2, 8), (3, 13), (5, 6), (0, 15), (4, 9)])
def test_query_chunks_are_thirds_of_the_extent_in_the_query(first, last):
    numbers = np.arange(16)
    third = (last - first) / 3
    expected = [min(max(math.floor((z - first) / third + 1e-9), 0), 2) for z in numbers]
    assert query_chunks(organ(first, last), numbers, 3).tolist() == expected


def test_chunk_borders_and_what_lies_beyond_them():
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


@pytest.mark.parametrize(
    ("protocol", "calls"),
    [
        ("ep1", [(5, [2, 3]), (9, [4, 5]), (13, [6, 7, 8])]),
        ("ep2", [(9, [2, 3, 4, 5, 6, 7, 8])]),
    ],
)
def test_each_chunk_of_the_query_is_compared_with_that_of_the_annotated_scan(protocol, calls):
    segment = Recorder()
    dice = episodic_dice(TWELVE, SEVEN, segment, chunks=CHUNKS[protocol])
    assert segment.calls == calls
    assert dice == pytest.approx(2 * 4 / (4 + 6))


def test_dice_is_that_of_all_voxels_together_and_a_margin_counts_slices_beyond():
    query = organ(4, 5)
    for margin, n in {0: 2, 1: 4, None: 16}.items():
        found = episodic_dice(organ(7), query, Recorder(), chunks=3, z_margin=margin)
        assert found == pytest.approx(2 * 8 / (8 + 6 * n))
    query[5] = True  # 16 voxels, 6 of them found: not a mean over slices
    found = episodic_dice(organ(7), query, Recorder(), chunks=1)
    assert found == pytest.approx(2 * (4 + 6) / (12 + 20))


def test_voxels_to_ignore_do_not_count():
    """Without the first row of every slice 2 of 4 voxels are left, of the recorder's 6 one is."""
    plain = episodic_dice(organ(7), SEVEN, Recorder(), chunks=3)
    none = np.zeros_like(SEVEN)
    assert episodic_dice(organ(7), SEVEN, Recorder(), chunks=3, ignored=none) == plain
    row = none.copy()
    row[:, 1:] = True
    truth = SEVEN & ~row
    found = episodic_dice(organ(7), truth, Recorder(), chunks=3, ignored=row)
    recorded = Recorder()(7, [0])[0]
    kept = recorded & ~row[0]
    both = np.count_nonzero(kept & truth[2])
    assert 0 < np.count_nonzero(kept) < np.count_nonzero(recorded)
    assert found == pytest.approx(2 * both / (np.count_nonzero(kept) + 2))


def test_an_organ_that_the_query_does_not_show_has_no_dice():
    segment = Recorder()
    assert math.isnan(episodic_dice(organ(7), organ(), segment, chunks=3))
    assert segment.calls == []
    assert episodic_dice(organ(7), organ(), segment, chunks=3, z_margin=None) == 0
