# SPDX-License-Identifier: Apache-2.0
"""From a volume to the network's slices and back.

A volume is seen in canonical orientation through views of its array: nothing is copied but the
slices asked for. Slices become square images of one size by linear maps along rows and columns, so
millimetres keep their proportions and the way back is the same geometry read the other way round.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import scipy.ndimage
import torch

from fastproto.data.volume import Volume, blocks, check_same_grid
from fastproto.errors import ArgumentError, LabelError

# Where slices, rows and columns grow: (world axis, sign) with world axes 0 = left, 1 = posterior,
# 2 = superior. Coronal and sagittal pictures have the head on top.
_PLANES = {
    "axial": ((2, 1), (1, 1), (0, 1)),
    "coronal": ((1, 1), (2, -1), (0, 1)),
    "sagittal": ((0, 1), (2, -1), (1, 1)),
}
CT_WINDOW = (-125.0, 275.0)
MR_CLIPPED_FRACTION = 0.005

_CT_BODY_HU = -500.0
_CT_AIR_HU = -200.0
_MR_BODY_FRACTION = 0.1
_BODY_MARGIN_MM = 5.0
_BODY_GRID = 128


def guess_modality(volume: Volume) -> Literal["ct", "mr"]:
    """What the values look like: CT where one in a thousand voxels lies below -200, as air does."""
    step = max(1, round((volume.array.size / 1e6) ** (1 / 3)))
    sample = volume.array[::step, ::step, ::step].astype(np.float32)
    return "ct" if float(np.percentile(sample, 0.1)) < _CT_AIR_HU else "mr"


@dataclass(frozen=True)
class Preprocessing:
    """What is done to every volume before the network sees it; saved with the model.

    CT is clipped to [-125, 275] HU and normalised with ``mean`` and ``std`` of the training set
    (see ``fit``). MR is clipped at the value that 99.5 % of the volume's voxels do not exceed and
    then normalised with its own mean and deviation; a constant volume becomes 0 everywhere.

    Attributes:
        modality: "ct" or "mr".
        image_size: Side of the network's square images in pixels.
        mean, std: Of the clipped training set, in HU. CT needs both, MR takes neither.
        crop: Fit the field of view to the body instead of the whole slice.
        plane: The slices' plane.
    """

    modality: Literal["ct", "mr"]
    image_size: int = 256
    mean: float | None = None
    std: float | None = None
    crop: bool = True
    plane: Literal["axial", "coronal", "sagittal"] = "axial"

    def __post_init__(self) -> None:
        if self.modality not in ("ct", "mr"):
            raise ArgumentError("modality", found=repr(self.modality), allowed='"ct" or "mr"')
        if self.plane not in _PLANES:
            raise ArgumentError("plane", found=repr(self.plane), allowed=", ".join(_PLANES))
        if not isinstance(self.image_size, int) or self.image_size < 1:
            raise ArgumentError(
                "image_size", found=repr(self.image_size), allowed="an integer above 0"
            )
        given = self.mean, self.std
        if self.modality == "mr" and given != (None, None):
            raise ArgumentError(
                "mean, std", found=f"{given}", allowed="None for MR: each volume has its own"
            )
        if self.modality == "ct" and not _are_statistics(*given):
            raise ArgumentError(
                "mean, std",
                found=f"{given}",
                allowed="two finite numbers for CT, std above 0",
                fix='Compute them from the training set with Preprocessing.fit(volumes, "ct").',
            )

    @classmethod
    def fit(
        cls,
        volumes: Iterable[Volume],
        modality: Literal["ct", "mr"],
        image_size: int = 256,
        *,
        crop: bool = True,
        plane: Literal["axial", "coronal", "sagittal"] = "axial",
    ) -> Preprocessing:
        """Preprocessing for a training set; ``volumes`` may be a generator, one is held at a time.

        CT: mean and deviation of all voxels after clipping. MR: the volumes are not looked at.

        Raises:
            ArgumentError: No volumes, or a training set that is constant after clipping.
        """
        if modality != "ct":
            return cls(modality, image_size, crop=crop, plane=plane)
        count, total, squares = 0, 0.0, 0.0
        for volume in volumes:
            for block in blocks(volume.array):
                values = np.clip(block, *CT_WINDOW, dtype=np.float64)
                count += values.size
                total += values.sum()
                squares += np.square(values).sum()
        mean = total / count if count else 0.0
        variance = squares / count - mean**2 if count else 0.0
        if variance < 1e-6:
            raise ArgumentError(
                "volumes",
                found=f"{count} voxels, all of {mean:g} HU after clipping to {CT_WINDOW}",
                allowed="CT volumes in Hounsfield units",
            )
        return cls(modality, image_size, float(mean), math.sqrt(variance), crop, plane)

    def to_dict(self) -> dict[str, Any]:
        """The fields, as JSON takes them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Preprocessing:
        """The inverse of ``to_dict``.

        Raises:
            ArgumentError: Missing, unknown or unusable fields.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if "modality" not in fields or not known.issuperset(fields):
            raise ArgumentError(
                "preprocessing", found=f"fields {sorted(fields)}", allowed=f"{sorted(known)}"
            )
        return cls(**fields)

    def prepare(self, volume: Volume, view: FieldOfView | None = None) -> PreparedVolume:
        """Find the volume's orientation, body and intensity statistics; no slice is made yet.

        Args:
            volume: The scan.
            view: The part of every slice that becomes the image; None for the body, or for the
                whole slice without ``crop``.
        """
        return PreparedVolume(self, volume, view)


class FieldOfView(NamedTuple):
    """A square in the slices of a volume.

    Attributes:
        row: Of its centre, in pixels of the canonical slice.
        column: The same.
        side: In mm.
    """

    row: float
    column: float
    side: float


class PreparedVolume:
    """The slices of one volume, made when they are asked for.

    Attributes:
        preprocessing: How it was prepared.
        volume: The volume as read; the only copy of its voxels.
        shape: Slices, rows and columns (n, h, w) in canonical orientation.
        spacing: Their distances (slice, row, column) in mm.
        view: The part of every slice that the network sees.
        pixel_size: Side of a pixel of the network's images in mm.
    """

    def __init__(
        self, preprocessing: Preprocessing, volume: Volume, view: FieldOfView | None = None
    ):
        self.volume = volume
        self._seen = canonical(volume, preprocessing.plane)
        self.shape = self._seen.array.shape
        self.spacing = self._seen.spacing[::-1]
        self._normalise = _normalisation(preprocessing, volume.array)

        _, rows, columns = self.shape
        if view is None:
            box = (0, rows, 0, columns)
            if preprocessing.crop:
                box = _body_box(self._seen.array, self.spacing, preprocessing.modality)
            height, width = (box[1] - box[0]) * self.spacing[1], (box[3] - box[2]) * self.spacing[2]
            view = FieldOfView(
                (box[0] + box[1] - 1) / 2, (box[2] + box[3] - 1) / 2, max(height, width)
            )
        self._look(preprocessing, view)

    def _look(self, preprocessing: Preprocessing, view: FieldOfView) -> None:
        """Set what the images show, and at which size."""
        size = preprocessing.image_size
        _, rows, columns = self.shape
        self.preprocessing = preprocessing
        self.view = view
        self.pixel_size = view.side / size
        self._rows = _Axis(rows, self.spacing[1], view.row, self.pixel_size, size)
        self._columns = _Axis(columns, self.spacing[2], view.column, self.pixel_size, size)

    def at(self, view: FieldOfView) -> PreparedVolume:
        """The same volume, seen elsewhere; nothing is computed again."""
        other = copy.copy(self)
        other._look(self.preprocessing, view)
        return other

    def at_most_native(self) -> PreparedVolume:
        """The same view at an image size that makes no pixel finer than the scan's own."""
        native = math.ceil(self.view.side / min(self.spacing[1:]) - 1e-6)
        other = copy.copy(self)
        size = max(1, min(native, self.image_size))
        other._look(dataclasses.replace(self.preprocessing, image_size=size), self.view)
        return other

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def image_size(self) -> int:
        """Side S of the network's square images."""
        return self.preprocessing.image_size

    def images(self, start: int, stop: int) -> torch.Tensor:
        """Slices ``start`` to ``stop`` as the network wants them.

        Returns:
            [n, 1, S, S] float32, normalised; beyond the slice's border it is as dark as air.
        """
        self._check_range(start, stop)
        low, high, mean, scale = self._normalise
        values = self._seen.array[start:stop].astype(np.float32, order="C")
        np.clip(values, low, high, out=values)
        # Relative to the padding value, padding is 0: what the linear maps give outside the slice.
        values -= np.float32(low)
        values *= np.float32(scale)
        images = self._rows.to_image @ torch.from_numpy(values) @ self._columns.to_image.T
        return images.add_((low - mean) * scale).unsqueeze(1)

    def some_images(self, numbers: Sequence[int]) -> torch.Tensor:
        """As ``images``, of slices in any order."""
        return torch.cat([self.images(number, number + 1) for number in numbers])

    @property
    def pixel_positions(self) -> tuple[np.ndarray, np.ndarray]:
        """Where the images' rows and columns lie, [S] each, in rows and columns of the slices."""
        return self._rows.positions, self._columns.positions

    def labels(self, label: Volume) -> torch.Tensor:
        """All slices of a label map on the volume's grid, by nearest voxel.

        The map may be stored with other axes than the volume (as of a DICOM series and its NIfTI
        segmentation), as long as the voxels are the same.

        Returns:
            [n, S, S] uint8, or int64 where a label is above 255; 0 beyond the slice's border.

        Raises:
            GeometryError: The map is on another grid.
            LabelError: The map does not hold integers of 0 and above.
        """
        if label.array.dtype.kind not in "biu" or label.array.min() < 0:
            raise LabelError(
                label.name,
                found=f"{label.array.dtype} voxels from {label.array.min():g}",
                allowed="integers of 0 and above",
                fix="Read it with fastproto.data.read_label.",
            )
        seen = canonical(label, self.preprocessing.plane)
        check_same_grid(self._seen, seen)
        rows, inside_rows = self._rows.nearest
        columns, inside_columns = self._columns.nearest
        dtype = np.uint8 if label.array.max() <= 255 else np.int64
        result = np.empty((len(self), self.image_size, self.image_size), dtype)
        for slice_, target in zip(seen.array, result, strict=True):
            target[...] = slice_[rows[:, None], columns]
        result *= inside_rows[:, None] & inside_columns
        return torch.from_numpy(result)

    def restore(self, slices: torch.Tensor, start: int, stop: int) -> np.ndarray:
        """Bring probabilities of slices ``start`` to ``stop`` back to the volume's own pixels.

        Args:
            slices: [n, C, S, S] on any device. With C > 1, channel 0 is the background.
            start: First slice they belong to.
            stop: One past the last.

        Returns:
            [n, C, h, w] float32, bilinear. Outside the field of view the background has
            probability 1 and everything else 0.
        """
        self._check_range(start, stop)
        size = self.image_size
        if slices.ndim != 4 or slices.shape[0] != stop - start or slices.shape[2:] != (size, size):
            raise ArgumentError(
                "slices",
                found=f"shape {tuple(slices.shape)}",
                allowed=f"({stop - start}, C, {size}, {size})",
            )
        rows = self._rows.to_slice.to(slices.device)
        columns = self._columns.to_slice.to(slices.device)
        restored = rows @ slices.float() @ columns.T
        if slices.shape[1] > 1:
            restored[:, 0] += 1 - torch.outer(rows.sum(1), columns.sum(1))
        return restored.cpu().numpy()

    def to_volume_array(self, array: np.ndarray) -> np.ndarray:
        """[..., n, h, w] in canonical orientation -> [..., Z, Y, X] in the axes of the file."""
        order, flips = _view_of_axes(self.volume.direction, self.preprocessing.plane)
        if array.shape[-3:] != self.shape:
            raise ArgumentError(
                "array", found=f"shape {array.shape}", allowed=f"(..., {self.shape})"
            )
        leading = array.ndim - 3
        stored = [*range(leading), *(leading + axis for axis in np.argsort(order))]
        index: Any = (..., *flips)
        return np.ascontiguousarray(array[index].transpose(stored))

    def to_canonical(self, array: np.ndarray) -> np.ndarray:
        """[Z, Y, X] in the axes of the file -> a view [n, h, w], writable where ``array`` is."""
        order, flips = _view_of_axes(self.volume.direction, self.preprocessing.plane)
        return array.transpose(order)[flips]

    def _check_range(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= len(self):
            raise ArgumentError(
                "start, stop", found=f"{start}, {stop}", allowed=f"a range within 0 to {len(self)}"
            )


class _Axis:
    """Rows or columns: where a slice's pixels lie in the square image, and the other way round.

    Args:
        length: Pixels of the slice.
        spacing: Their distance in mm.
        centre: The pixel that the field of view is centred on.
        pixel_size: Of the image, in mm.
        image_size: Pixels of the image.
    """

    def __init__(
        self,
        length: int,
        spacing: float,
        centre: float,
        pixel_size: float,
        image_size: int,
    ):
        middle = (image_size - 1) / 2
        ratio = pixel_size / spacing
        # Of the image's pixels, in pixels of the slice.
        self.positions = positions = centre + (np.arange(image_size) - middle) * ratio
        self.to_image = linear_weights(positions, length, ratio)
        self.to_slice = linear_weights(
            middle + (np.arange(length) - centre) / ratio, image_size, 1 / ratio
        )
        index = np.floor(positions + 0.5).astype(np.int64)
        # Index for every image pixel, and whether it lies within the slice.
        self.nearest = index.clip(0, length - 1), (index >= 0) & (index < length)


def linear_weights(positions: np.ndarray, length: int, step: float) -> torch.Tensor:
    """Linear interpolation at ``positions`` as a matrix [len(positions), length].

    Where neighbouring positions are more than one pixel apart, the triangle widens with them, so
    nothing between them is skipped. Positions outside the pixels give a row of zeros.
    """
    distance = np.abs(positions[:, None] - np.arange(length))
    weights = np.clip(1 - distance / max(step, 1.0), 0, None)
    outside = (positions < -0.5) | (positions > length - 0.5)
    weights[outside] = 0
    weights[~outside] /= weights[~outside].sum(axis=1, keepdims=True)
    return torch.from_numpy(weights.astype(np.float32))


def canonical(volume: Volume, plane: str = "axial") -> Volume:
    """The same voxels in canonical order, as a view of the array.

    Oblique volumes take the nearest axes; nothing is resampled.

    Args:
        volume: Any orientation.
        plane: "axial": slices towards superior, rows towards posterior, columns towards left (LPS).
            "coronal": posterior, inferior, left. "sagittal": left, inferior, posterior.
    """
    order, flips = _view_of_axes(volume.direction, plane)
    axes = np.array(volume.direction).reshape(3, 3)
    spacing, size = np.array(volume.spacing), np.array(volume.array.shape[::-1])
    origin = np.array(volume.origin)
    columns = []
    for axis, flip in zip(reversed(order), reversed(flips), strict=True):
        column = axes[:, 2 - axis]
        if flip.step == -1:
            origin = origin + column * spacing[2 - axis] * (size[2 - axis] - 1)
            column = -column
        columns.append(column)
    return Volume(
        array=volume.array.transpose(order)[flips],
        spacing=tuple(volume.spacing[2 - axis] for axis in reversed(order)),
        origin=tuple(origin.tolist()),
        direction=tuple(np.stack(columns, axis=1).ravel().tolist()),
        path=volume.path,
    )


def _view_of_axes(
    direction: tuple[float, ...], plane: str
) -> tuple[tuple[int, ...], tuple[slice, ...]]:
    """How [Z, Y, X] becomes [slice, row, column]: the transposition, then the flips."""
    axes = np.array(direction).reshape(3, 3)
    nearest = max(
        itertools.permutations(range(3)),
        key=lambda stored: sum(abs(axes[world, stored[world]]) for world in range(3)),
    )
    order, flips = [], []
    for world, sign in _PLANES[plane]:
        order.append(2 - nearest[world])
        along = axes[world, nearest[world]] * sign > 0
        flips.append(slice(None, None, 1 if along else -1))
    return tuple(order), tuple(flips)


def _are_statistics(mean: float | None, std: float | None) -> bool:
    if mean is None or std is None:
        return False
    return math.isfinite(mean) and math.isfinite(std) and std > 0


def _normalisation(
    preprocessing: Preprocessing, array: np.ndarray
) -> tuple[float, float, float, float]:
    """(low, high, mean, scale): clip to [low, high], subtract the mean, multiply by the scale."""
    if preprocessing.mean is not None and preprocessing.std is not None:
        return (*CT_WINDOW, preprocessing.mean, 1 / preprocessing.std)
    low = float(array.min())
    high = upper_value(array, 1 - MR_CLIPPED_FRACTION)
    # Sums relative to the lowest value: a constant volume gives a deviation of exactly 0.
    total = squares = 0.0
    for block in blocks(array):
        values = np.clip(block, low, high, dtype=np.float64)
        values -= low
        total += values.sum()
        squares += np.square(values).sum()
    mean = total / array.size
    deviation = math.sqrt(max(squares / array.size - mean**2, 0.0))
    return low, high, low + mean, 1 / deviation if deviation > 0 else 0.0


def upper_value(array: np.ndarray, fraction: float) -> float:
    """The smallest value that ``fraction`` of the voxels do not exceed, exact in float32.

    ``numpy.quantile(array, fraction, method="inverted_cdf")`` without the sorted copy: float32
    numbers, read as integers, keep their order, so two counts over 16 bits each find the value.

    Args:
        array: Finite numbers of any shape.
        fraction: Within (0, 1].
    """
    rank = max(math.ceil(fraction * array.size), 1)
    found = 0
    for shift in (16, 0):
        counts = np.zeros(1 << 16, np.int64)
        for block in blocks(array):
            keys = _ordered(block)
            if shift == 0:
                keys = keys[keys >> 16 == found]
            counts += np.bincount((keys >> shift) & 0xFFFF, minlength=1 << 16)
        cumulative = np.cumsum(counts)
        digit = int(np.searchsorted(cumulative, rank))
        rank -= int(cumulative[digit - 1]) if digit else 0
        found = found << 16 | digit
    bits = found ^ 0x80000000 if found >> 31 else found ^ 0xFFFFFFFF
    return float(np.uint32(bits).view(np.float32))


def _ordered(block: np.ndarray) -> np.ndarray:
    """Flat uint32 keys in the order of the values as float32."""
    bits = np.ascontiguousarray(block, dtype=np.float32).ravel().view(np.uint32)
    return bits ^ np.where(bits >> 31, np.uint32(0xFFFFFFFF), np.uint32(0x80000000))


def _body_box(
    array: np.ndarray, spacing: tuple[float, ...], modality: str
) -> tuple[int, int, int, int]:
    """Rows and columns [top, bottom, left, right) of the body in any slice, with a margin of 5 mm.

    It is found on a grid of at most 128 voxels a side, see ``body_mask``. A volume without
    foreground keeps its whole slices.
    """
    steps = tuple(-(-length // _BODY_GRID) for length in array.shape)
    body = body_mask(array[tuple(slice(None, None, step) for step in steps)], modality)
    box = []
    for axis in (1, 2):
        if not body.any():
            box += [0, array.shape[axis]]
            continue
        hit = np.flatnonzero(body.any(axis=tuple({0, 1, 2} - {axis})))
        margin = round(_BODY_MARGIN_MM / spacing[axis])
        # Between two coarse voxels the body may begin or end anywhere.
        first = (hit[0] - 1) * steps[axis] + 1 - margin
        last = (hit[-1] + 1) * steps[axis] + margin
        box += [max(int(first), 0), min(int(last), array.shape[axis])]
    return box[0], box[1], box[2], box[3]


def body_mask(array: np.ndarray, modality: str) -> np.ndarray:
    """Which voxels are body, as bool of the same shape; for a coarse view of a volume.

    CT: above -500 HU. MR: above a tenth of the way from the 0.5 % to the 99.5 % value. Pieces
    smaller than a quarter of the largest (the table, noise) do not count.
    """
    coarse = array.astype(np.float32)
    if modality == "ct":
        threshold = _CT_BODY_HU
    else:
        low, high = np.percentile(coarse, [0.5, 99.5])
        threshold = low + _MR_BODY_FRACTION * (high - low)
    pieces, count = scipy.ndimage.label(coarse > threshold)
    sizes = np.bincount(pieces.ravel(), minlength=count + 1)
    sizes[0] = 0
    return (sizes >= max(0.25 * sizes.max(), 1))[pieces]
