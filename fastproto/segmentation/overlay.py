# SPDX-License-Identifier: Apache-2.0
"""One picture that shows whether a segmentation is plausible: slices with coloured organs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import binary_erosion

from fastproto._files import atomic_write
from fastproto.data.anatomy import organ_colours
from fastproto.data.geometry import SIDES, FieldOfView, canonical
from fastproto.data.preprocessing import PreparedVolume, Preprocessing
from fastproto.data.volume import Volume
from fastproto.segmentation.distance import extent

OPACITY = 0.35  # within an organ's outline
TILE = 256  # pixels per slice
LINE = 22  # height of a line of text in pixels
MARGIN_MM = 30.0  # around what is labelled

Colours: TypeAlias = "dict[int, tuple[int, ...]]"  # by label value
Font: TypeAlias = "ImageFont.FreeTypeFont | ImageFont.ImageFont"


def write_overlay(
    path: str | Path,
    image: Volume,
    label: Volume,
    preprocessing: Preprocessing,
    names: dict[int, str],
    *,
    slices: int = 12,
    columns: int = 4,
) -> None:
    """Write `draw_overlay` to a PNG file, atomically.

    Raises:
        OutputError: ``path`` cannot be written.
    """
    picture = draw_overlay(image, label, preprocessing, names, slices=slices, columns=columns)
    with atomic_write(path) as temporary:
        picture.save(temporary, format="PNG")


def draw_overlay(
    image: Volume,
    label: Volume,
    preprocessing: Preprocessing,
    names: dict[int, str],
    *,
    slices: int = 12,
    columns: int = 4,
) -> Image.Image:
    """Draw a montage of slices, each organ in its colour, above a legend with their names.

    The slices are spread evenly over the extent of the labels, or over the whole volume where
    nothing is labelled, ``slices`` at most and ``columns`` to a row. They appear as the network
    sees them, in canonical orientation, with true proportions and the plane and grey values of the
    preprocessing, but nearer: all show the same square, which holds every organ and `MARGIN_MM`
    around them. R, L, A, P: the patient's right, left, front and back. ``label`` is on the grid of
    ``image``; ``names`` go by its values.
    """
    preprocessing = dataclasses.replace(preprocessing, image_size=TILE)
    prepared = preprocessing.prepare(image)
    prepared = prepared.at(_near(prepared, canonical(label, preprocessing.plane).array))
    label_map = prepared.labels(label).numpy()
    shown = _spread(label_map, slices)
    grey = prepared.some_images(shown)[:, 0].numpy()
    grey_range = np.percentile(grey, (1, 99))  # of all: an empty slice's noise stays dark
    colours = organ_colours(names)
    right, left = SIDES[preprocessing.plane]

    columns = min(columns, len(shown))
    rows = -(-len(shown) // columns)
    font = ImageFont.load_default(14)
    legend = _legend(names, colours, columns * TILE, font)
    picture = Image.new("RGB", (columns * TILE, rows * TILE + legend.height))
    for position, index in enumerate(shown):
        tile = Image.fromarray(_tile(grey[position], grey_range, label_map[index], colours))
        caption = f"{index + 1} / {len(prepared)}"
        draw = ImageDraw.Draw(tile)
        for x, y, anchor, text in (
            (6, 4, "la", caption),
            (6, TILE // 2, "lm", right),
            (TILE - 6, TILE // 2, "rm", left),
        ):
            draw.text((x, y), text, "white", font, anchor, stroke_width=1, stroke_fill="black")
        picture.paste(tile, (position % columns * TILE, position // columns * TILE))
    picture.paste(legend, (0, rows * TILE))
    return picture


def _spread(label_map: np.ndarray, number: int) -> list[int]:
    """Up to ``number`` slice indices, evenly over the labelled slices of ``[n, S, S]``."""
    occupied = np.flatnonzero([labels.any() for labels in label_map])
    first, last = (occupied[0], occupied[-1]) if len(occupied) else (0, len(label_map) - 1)
    return np.unique(np.linspace(first, last, number).round().astype(int)).tolist()


def _near(prepared: PreparedVolume, labels: np.ndarray) -> FieldOfView:
    """The square around every label of ``[n, h, w]``, no larger than what the network sees."""
    shadow: np.ndarray = np.any(labels, axis=0)
    if not shadow.any():
        return prepared.view
    first, last = extent(shadow)
    side = ((last + 1 - first) * prepared.spacing[1:]).max() + 2 * MARGIN_MM
    if side >= prepared.view.side:
        return prepared.view
    row, column = (first + last) / 2
    return FieldOfView(row, column, side)


def _tile(
    grey: np.ndarray, grey_range: Sequence[float], labels: np.ndarray, colours: Colours
) -> np.ndarray:
    """One slice ``[S, S]`` as RGB ``[S, S, 3]`` uint8, organs outlined and tinted."""
    low, high = grey_range
    grey = (grey - low) / max(high - low, 1e-6)
    picture = np.repeat(np.clip(grey * 255, 0, 255)[..., None], 3, axis=2)
    for value, colour in colours.items():
        organ = labels == value
        picture[organ] = (1 - OPACITY) * picture[organ] + OPACITY * np.array(colour)
        picture[organ & ~binary_erosion(organ)] = colour
    return picture.astype(np.uint8)


def _legend(names: dict[int, str], colours: Colours, width: int, font: Font) -> Image.Image:
    """Coloured squares with the organs' names, in as many lines as ``width`` needs."""
    legend = Image.new("RGB", (width, 14 + LINE * len(names)))  # more lines than it has in the end
    draw = ImageDraw.Draw(legend)
    left, top = 8, 6
    for value, name in names.items():
        length = 18 + int(font.getlength(name)) + 16
        if left > 8 and left + length > width:
            left, top = 8, top + LINE
        draw.rectangle((left, top + 4, left + 12, top + 16), fill=colours[value])
        draw.text((left + 18, top + 2), name, fill="white", font=font)
        left += length
    return legend.crop((0, 0, width, top + LINE + 8 if names else 8))
