# SPDX-License-Identifier: Apache-2.0
"""Supervoxels of a volume: the pseudo-organs of training without labels.

Felzenszwalb and Huttenlocher's segmentation in 3-D, at several sizes at once. ``SCALE``, ``SIGMA``
and ``EXPONENT`` are those whose supervoxels came nearest to organs in abdominal MR, brain MR and
head-and-neck CT; with a scale above 0, components leak into each other before sizes are looked at.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage
from tqdm import tqdm

from fastproto._files import atomic_write
from fastproto.errors import OutputError, TrainingError, require

logger = logging.getLogger("fastproto")

MIN_VOLUMES = (0.7, 2.0, 6.0, 20.0, 60.0)  # mL
MIN_VOXELS = 100
MAX_SHARE = 1 / 8  # of the body, for a minimum volume
SCALE = 0.0
SIGMA = 0.35  # of the finest spacing
EXPONENT = 3.0

_VERSION = 1  # of the algorithm: kept results of another one are not read
_SLAB_VOXELS = 1 << 23  # 0.6 GB while it is worked on
_WORKERS = 16
_IN_PLANE = ndimage.generate_binary_structure(2, 1)[None]

Spacing = tuple[float, float, float]


@dataclass(frozen=True)
class Supervoxels:
    """Supervoxels of one volume at S minimum volumes; each is a union of those of the one before.

    Attributes:
        finest: [n, h, w] int16, or int32 where there are more than 32767: 0 outside the body,
            supervoxels 1..N without gaps.
        parents: [S, N + 1], same type: the number at each scale of each of the finest, 1..N_s
            without gaps; 0 stays 0 and row 0 changes nothing.
        min_volumes: S minimum volumes in mL, ascending. Pieces that touch no other are kept even
            where they are smaller.
    """

    finest: np.ndarray
    parents: np.ndarray
    min_volumes: tuple[float, ...]


def body_mask(image: np.ndarray) -> np.ndarray:
    """The body: large components of what is no air, their holes filled slice by slice.

    Air ends 3 % of the way from the darkest value to the 99.5th percentile of the whole volume: at
    -113 HU in CT clipped to [-125, 275], just above the noise of air in MR. A component counts that
    has at least a tenth of the voxels of the largest, such as an arm.

    Args:
        image: [n, h, w].

    Returns:
        [n, h, w] bool; all False where everything is air.
    """
    sample = image[:, ::4, ::4].astype(np.float32)
    low = float(sample.min())
    threshold = low + 0.03 * (float(np.percentile(sample, 99.5)) - low)
    components, count = ndimage.label(image > threshold)
    if count == 0:
        return np.zeros(image.shape, dtype=bool)
    sizes = np.bincount(components.ravel())
    sizes[0] = 0
    inside = (sizes >= sizes.max() / 10)[components]
    return ndimage.binary_fill_holes(inside, _IN_PLANE)


def supervoxels(image: np.ndarray, spacing: Spacing) -> Supervoxels:
    """Supervoxels of the body at minimum volumes of 0.7, 2, 6, 20 and 60 mL.

    Of these, those of at least 100 voxels and at most an eighth of the body, or the nearest one.
    Volumes of more than 8 million voxels are worked on in slabs along the slices, whose borders no
    supervoxel crosses.

    Args:
        image: [n, h, w] floating point, any range; slices in order.
        spacing: Slice, row and column distance in mm.

    Raises:
        ArgumentError: Another shape, NaN or infinity, or an unusable spacing.
        TrainingError: The package was installed without native code.
    """
    native = _native()
    image = _checked(image, spacing)
    voxel = math.prod(spacing) / 1000
    body = body_mask(image)
    inside = np.count_nonzero(body)
    least, most = MIN_VOXELS * voxel, inside * voxel * MAX_SHARE
    volumes = [v for v in MIN_VOLUMES if least <= v <= most]
    volumes = volumes or [max(least, min(MIN_VOLUMES[0], most))]
    sizes = [max(1, min(math.ceil(v / voxel), image.size)) for v in volumes]

    low, high = np.percentile(image[body], (1, 99)) if inside else (0.0, 1.0)
    slabs = min(math.ceil(image.size / _SLAB_VOXELS), len(image))
    finest: list[np.ndarray] = []
    parents = [np.zeros((len(sizes), 1), np.int32)]
    found = np.zeros((len(sizes), 1), np.int32)  # so far, at each scale
    for part, mask in zip(np.array_split(image, slabs), np.array_split(body, slabs), strict=True):
        unit = _unit(part, mask, low, high, spacing)
        labels = native.supervoxels(unit, mask, spacing, SCALE, sizes, EXPONENT)
        table = np.zeros((len(sizes), labels[0].max() + 1), np.int32)
        for row, label in zip(table, labels, strict=True):
            row[labels[0]] = label
        finest.append(np.where(mask, labels[0] + found[0], 0))
        parents.append(table[:, 1:] + found)
        found += table.max(axis=1, keepdims=True)
    dtype = np.int16 if found[0] <= np.iinfo(np.int16).max else np.int32
    return Supervoxels(
        np.concatenate(finest, dtype=dtype, casting="unsafe"),
        np.concatenate(parents, axis=1, dtype=dtype, casting="unsafe"),
        tuple(volumes),
    )


def cached_supervoxels(
    image: np.ndarray, spacing: Spacing, folder: str | os.PathLike[str]
) -> Supervoxels:
    """``supervoxels``, read from ``folder`` where they were kept before, else kept there.

    A file's name is a hash of the voxels, the spacing and the algorithm's version. A file that
    cannot be used is made again; one that cannot be written is a warning. The folder is made if
    missing.
    """
    image = _checked(image, spacing)
    digest = hashlib.blake2b(f"{_VERSION} {image.shape} {spacing}".encode(), digest_size=16)
    digest.update(image.data)
    key = digest.hexdigest()
    path = Path(folder) / f"supervoxels-{key}.npz"
    if kept := _read(path, key):
        return kept
    made = supervoxels(image, spacing)
    try:
        with atomic_write(path) as temporary:
            np.savez_compressed(temporary, key=np.array(key), **vars(made))
    except OutputError as error:
        logger.warning("supervoxels are not kept: %s", error)
    return made


def all_supervoxels(
    volumes: Mapping[str, tuple[np.ndarray, Spacing]],
    folder: str | os.PathLike[str],
    *,
    progress: bool = True,
) -> dict[str, Supervoxels]:
    """Supervoxels of many volumes, several at a time: one on each core, 16 at most.

    The work is done in threads: almost all of it runs without Python's lock, and nothing is copied.

    Args:
        volumes: Image [n, h, w] and spacing (mm) of each case; a float16 image becomes float32
            only while it is worked on.
        folder: Where they are kept from run to run, see ``cached_supervoxels``.
        progress: Show a bar.

    Returns:
        By case, in the order of ``volumes``. One that failed is left out, and the log says why.

    Raises:
        TrainingError: The package was installed without native code.
    """
    _native()

    found: dict[str, Supervoxels] = {}
    pool = concurrent.futures.ThreadPoolExecutor(min(cores(), _WORKERS))
    try:
        cases = {
            pool.submit(cached_supervoxels, *volume, folder): case
            for case, volume in volumes.items()
        }
        done = concurrent.futures.as_completed(cases)
        hidden = None if progress else True  # None: shown on a terminal
        for future in tqdm(
            done, "supervoxels", len(cases), unit="scan", leave=False, disable=hidden
        ):
            try:
                found[cases[future]] = future.result()
            except Exception as error:
                logger.warning("%s is left out, it has no supervoxels: %s", cases[future], error)
    finally:
        pool.shutdown(cancel_futures=True)
    return {case: found[case] for case in volumes if case in found}


def _native() -> Any:
    try:
        from fastproto import _C
    except ImportError as error:
        raise TrainingError(
            "supervoxels",
            found="a package that was installed without native code",
            allowed="one built with a C++ compiler",
            fix="Reinstall fastproto where a C++ compiler is found, or train on labels.",
        ) from error
    return _C


def cores() -> int:
    """Processor cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _checked(image: np.ndarray, spacing: Spacing) -> np.ndarray:
    """The image as contiguous float32."""
    valid = len(spacing) == 3 and all(math.isfinite(s) and s > 0 for s in spacing)
    allowed = "three finite numbers above 0 (mm)"
    require(valid, "spacing", found=f"{spacing}", allowed=allowed)
    valid = image.ndim == 3 and image.size > 0
    require(valid, "image", found=f"shape {image.shape}", allowed="[n, h, w], not empty")
    image = np.ascontiguousarray(image, np.float32)
    finite = np.isfinite(image).all()
    require(finite, "image", found="NaN or infinity", allowed="finite numbers")
    return image


def _unit(
    image: np.ndarray, body: np.ndarray, low: float, high: float, spacing: Spacing
) -> np.ndarray:
    """Intensities from 0 (``low``) to 1 (``high``), smoothed within the body."""
    scaled = np.clip((image - np.float32(low)) / np.float32(max(high - low, 1e-6)), 0, 1)
    sigma = [SIGMA * min(spacing) / s for s in spacing]
    weight = ndimage.gaussian_filter(body.astype(np.float32), sigma)
    smooth = ndimage.gaussian_filter(scaled * body, sigma)
    return np.divide(smooth, weight, out=smooth, where=body)


def _read(path: Path, key: str) -> Supervoxels | None:
    """What was kept; None where there is nothing, or nothing that can be used."""
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as stored:
            volumes = tuple(stored["min_volumes"].tolist())
            kept = Supervoxels(stored["finest"], stored["parents"], volumes)
            return kept if str(stored["key"]) == key else None
    except Exception as error:  # a damaged archive raises nearly anything
        logger.info("%s is made again: %s", path, error)
        return None
