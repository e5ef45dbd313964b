# SPDX-License-Identifier: Apache-2.0
"""The overlay picture: slices, colours, legend."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from PIL import Image

from fastproto.data.anatomy import COLOURS, organ
from fastproto.errors import OutputError
from fastproto.segmentation import draw_overlay, write_overlay
from fastproto.segmentation.overlay import LINE, MARGIN_MM, OPACITY, TILE, _spread, _tile

NAMES = {7: "spleen", 300: "tumour"}


def test_montage_has_a_tile_per_slice_and_a_legend(scan, preprocessing):
    picture = draw_overlay(*scan, preprocessing, NAMES, slices=6, columns=3)
    assert picture.width == 3 * TILE
    assert 2 * TILE < picture.height < 2.5 * TILE
    pixels = np.asarray(picture)
    legend = pixels[2 * TILE :].reshape(-1, 3)
    for colour in (organ("spleen").colour, organ("tumour").colour):
        assert (legend == colour).all(axis=1).any()
    tiles = pixels[: 2 * TILE].astype(int)
    assert (np.ptp(tiles, axis=2) > 50).any(), "no organ is coloured"


def test_nothing_labelled_gives_plain_grey_slices(scan, preprocessing):
    image, label = scan
    empty = dataclasses.replace(label, array=np.zeros_like(label.array))
    pixels = np.asarray(draw_overlay(image, empty, preprocessing, NAMES, slices=3)).astype(int)
    assert pixels[:TILE].max() > 0
    assert np.ptp(pixels[:TILE], axis=2).max() == 0


def test_slices_are_spread_over_the_labelled_extent():
    labels = np.zeros((50, 2, 2), dtype=np.uint8)
    labels[10:31, 0, 0] = 1
    assert _spread(labels, 5) == [10, 15, 20, 25, 30]
    assert _spread(np.zeros((9, 2, 2)), 3) == [0, 4, 8]
    assert _spread(labels[10:12], 5) == [0, 1]


def test_a_small_organ_is_seen_from_near(scan, preprocessing):
    image, label = (dataclasses.replace(volume, spacing=(6.0, 6.0, 4.0)) for volume in scan)
    label = dataclasses.replace(label, array=np.zeros_like(label.array))
    label.array[2, 40, 5] = 7
    pixels = np.asarray(draw_overlay(image, label, preprocessing, NAMES, slices=1)).astype(int)
    where = np.nonzero(np.ptp(pixels[:TILE], axis=2))
    for axis in where:
        assert np.ptp(axis) + 1 == pytest.approx(TILE * 6 / (6 + 2 * MARGIN_MM), abs=1)
        assert axis.mean() == pytest.approx(TILE / 2, abs=1)


def test_organs_are_outlined_and_tinted_over_their_grey_value():
    grey = np.zeros((10, 10), dtype=np.float32)
    grey[5:] = 1
    labels = np.zeros((10, 10), dtype=np.uint8)
    labels[:3] = labels[7:] = 4
    picture = _tile(grey, (0, 1), labels, {4: (200, 100, 0)})
    assert picture[3, 0].tolist() == [0, 0, 0]
    assert picture[6, 0].tolist() == [255, 255, 255]
    assert picture[1, 1].tolist() == [int(OPACITY * 200), int(OPACITY * 100), 0]
    assert picture[8, 1, 2] == int((1 - OPACITY) * 255)
    assert picture[2, 1].tolist() == picture[9, 0].tolist() == [200, 100, 0]


def test_a_long_legend_wraps(scan, preprocessing):
    names = dict.fromkeys(range(1, 9), "an organ")  # two to a line of 256 pixels
    picture = draw_overlay(*scan, preprocessing, names, slices=1, columns=1)
    assert picture.size == (TILE, TILE + 4 * LINE + 14)
    legend = np.asarray(picture)[TILE:]
    for index, colour in enumerate(COLOURS[:8]):
        line = legend[6 + index // 2 * LINE : 6 + (index // 2 + 1) * LINE]
        assert (line == colour).all(axis=2).sum() == 13 * 13


def test_write_overlay_is_atomic(scan, preprocessing, tmp_path):
    path = tmp_path / "scan.png"
    write_overlay(path, *scan, preprocessing, NAMES)
    with Image.open(path) as picture:
        assert picture.format == "PNG"
    assert [entry.name for entry in tmp_path.iterdir()] == ["scan.png"]
    with pytest.raises(OutputError):
        write_overlay(tmp_path, *scan, preprocessing, NAMES)
