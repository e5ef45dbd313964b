# SPDX-License-Identifier: Apache-2.0
"""Slices of a scan and its label map, small enough for a page that holds hundreds of scans."""

from __future__ import annotations

import base64
import io
import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from fastproto.data.geometry import PLANES, canonical
from fastproto.data.intensity import CT_WINDOW, body_box, guess_modality
from fastproto.data.volume import Volume

# Slices of a plane and pixels of their longest side, from the best on: as many scans share a page,
# so good are its pictures.
QUALITIES = ((48, 288), (40, 224), (28, 176), (18, 144), (12, 112), (8, 96))
MOST_BYTES = 2_000_000  # of one scan, however few there are
PAGE_BYTES = 27_000_000  # of all scans
MARGIN_MM = 20.0  # of slices beyond what is labelled
_BLOCK = 8  # JPEG's: a slice of a strip begins at one, so that it takes nothing of its neighbour


def encode(
    scan: Volume | None, label: Volume, values: Sequence[int], scans: int = 1
) -> list[dict[str, Any]]:
    """Three planes of a scan for the page's script, as good as ``scans`` of them leave room for.

    Args:
        scan: The scan, or None where it is not known: then there are only labels.
        label: Its label map, on the same grid.
        values: Label values; in the pictures they are 1, 2, ... in this order.
        scans: How many scans the page will hold.

    Returns:
        A record per plane: ``plane``, ``numbers`` (of its slices, from 1) of ``total``, ``first``
        (the slice with the most organs, an index), ``rows``, ``cols``, ``pitch`` (rows from one
        slice to the next in the image), ``mm`` (height and width), ``image`` (base64 of a JPEG, ""
        without a scan) and ``labels`` (base64 of zlib-compressed bytes, [slices, rows, cols]).
    """
    seen, grey = canonical(label), None
    begins, shape = (0, 0, 0), seen.array.shape
    if scan is not None:
        whole = canonical(scan)
        modality = guess_modality(scan)
        box = _union(body_box(whole.array, whole.spacing[::-1], modality), seen.array)
        seen, whole = _crop(seen, box), _crop(whole, box)
        begins = 0, box[0].start, box[1].start
        window = CT_WINDOW if modality == "ct" else _range(whole.array)
        grey = whole, window
    index = np.zeros(max(int(seen.array.max()), *values, 0) + 1, np.uint8)
    index[list(values)] = np.arange(1, len(values) + 1)
    room = min(MOST_BYTES, PAGE_BYTES // scans)
    for slices, pixels in QUALITIES:
        planes = [
            _plane(name, seen, index, grey, slices, pixels, begins[2 - axis], shape[2 - axis])
            for name, ((axis, _), *_) in PLANES.items()
        ]
        if sum(len(plane["image"]) + len(plane["labels"]) for plane in planes) <= room:
            break
    return planes


def _plane(
    name: str,
    label: Volume,
    index: np.ndarray,
    grey: tuple[Volume, tuple[float, float]] | None,
    slices: int,
    pixels: int,
    begins: int,
    total: int,
) -> dict[str, Any]:
    """One plane at one quality; ``label`` begins so many slices into the scan's ``total``."""
    seen = canonical(label, name)
    spacing = np.array(seen.spacing[::-1])
    size = spacing[1:] * seen.array.shape[1:]
    occupied = np.flatnonzero([section.any() for section in seen.array])
    numbers = _spread(occupied, len(seen.array), MARGIN_MM / spacing[0], slices)
    shape = np.minimum(np.ceil(pixels * size / size.max()).astype(int), seen.array.shape[1:])
    rows, cols = (int(length) for length in shape)
    nearest = [
        ((np.arange(n) + 0.5) * m / n).astype(int)
        for n, m in zip(shape, seen.array.shape[1:], strict=True)
    ]
    labels = index[seen.array[np.ix_(numbers, *nearest)]]
    organs = [np.bincount(section.ravel(), minlength=1)[1:] for section in labels]
    most = [np.count_nonzero(each) + each.sum() / labels[0].size for each in organs]
    pitch, image = rows, ""
    if grey is not None:
        volume, window = grey
        pitch = -(-rows // _BLOCK) * _BLOCK
        image = _strip(canonical(volume, name).array, window, numbers, (rows, cols), pitch)
    return {
        "plane": name,
        "numbers": [begins + number + 1 for number in numbers],
        "total": total,
        "first": int(np.argmax(most)) if labels.any() else len(numbers) // 2,
        "rows": rows,
        "cols": cols,
        "pitch": pitch,
        "mm": [round(float(length), 1) for length in size],
        "image": image,
        "labels": _text(zlib.compress(labels.tobytes(), 9)),
    }


def _strip(
    array: np.ndarray,
    window: tuple[float, float],
    numbers: Sequence[int],
    shape: tuple[int, int],
    pitch: int,
) -> str:
    """Slices below each other as one JPEG, in base64."""
    (rows, cols), (low, high) = shape, window
    strip = np.empty((len(numbers), pitch, cols), np.uint8)
    for number, target in zip(numbers, strip, strict=True):
        section = (array[number].astype(np.float32) - low) * np.float32(255 / (high - low))
        picture = Image.fromarray(section.clip(0, 255).astype(np.uint8))
        target[:rows] = np.asarray(picture.resize((cols, rows), Image.Resampling.BILINEAR))
        target[rows:] = target[rows - 1]
    buffer = io.BytesIO()
    Image.fromarray(strip.reshape(-1, cols)).save(buffer, "JPEG", quality=70, optimize=True)
    return _text(buffer.getvalue())


def _spread(occupied: np.ndarray, total: int, margin: float, most: int) -> list[int]:
    """At most so many slices, evenly over the labelled ones and a margin, or over all."""
    first, last = 0, total - 1
    if occupied.size and total > most:
        first = max(0, int(occupied[0] - margin))
        last = min(total - 1, int(np.ceil(occupied[-1] + margin)))
    wanted = min(most, last - first + 1)
    return np.linspace(first, last, wanted).round().astype(int).tolist()


def _range(array: np.ndarray) -> tuple[float, float]:
    """From black to white of what has no unit."""
    steps = tuple(slice(None, None, -(-length // 64)) for length in array.shape)
    low, high = np.percentile(array[steps].astype(np.float32), [0.5, 99.5])
    return float(low), float(high if high > low else low + 1)


def _union(box: tuple[int, int, int, int], labels: np.ndarray) -> tuple[slice, slice]:
    """Rows and columns of a box, and of every label."""
    sides = []
    for start, stop, axes in ((*box[:2], (0, 2)), (*box[2:], (0, 1))):
        hit = np.flatnonzero(labels.any(axis=axes))
        if hit.size:
            start, stop = min(start, int(hit[0])), max(stop, int(hit[-1]) + 1)
        sides.append(slice(start, stop))
    return sides[0], sides[1]


def _crop(volume: Volume, box: tuple[slice, slice]) -> Volume:
    return replace(volume, array=volume.array[:, box[0], box[1]])  # its origin is not read here


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
