# SPDX-License-Identifier: Apache-2.0
"""From a volume to the network's slices and back.

A volume is seen in canonical orientation through views of its array: nothing is copied but the
slices asked for. Slices become square images of one size by linear maps along rows and columns, so
millimetres keep their proportions and the way back is the same geometry read the other way round.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from fastproto.data.geometry import PLANES, FieldOfView, ImageAxis, canonical, view_of_axes
from fastproto.data.intensity import CT_WINDOW, body_box, clipped_moments, normalisation
from fastproto.data.volume import Volume, blocks, check_same_grid
from fastproto.defaults import PLANE
from fastproto.errors import LabelError, require


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
    plane: Literal["axial", "coronal", "sagittal"] = PLANE

    def __post_init__(self) -> None:
        modality, image_size, mean, std = self.modality, self.image_size, self.mean, self.std
        require(modality in ("ct", "mr"), "modality", found=repr(modality), allowed='"ct" or "mr"')
        require(self.plane in PLANES, "plane", found=repr(self.plane), allowed=", ".join(PLANES))
        whole = isinstance(image_size, int) and image_size >= 1
        require(whole, "image_size", found=repr(image_size), allowed="an integer above 0")
        given = [value for value in (mean, std) if value is not None and math.isfinite(value)]
        for_ct = len(given) == 2 and given[1] > 0
        require(
            for_ct if modality == "ct" else (mean, std) == (None, None),
            "mean, std",
            found=f"{mean, std}",
            allowed="two finite numbers for CT, std above 0; None for MR: each volume has its own",
            fix='For CT, compute them from the training set with Preprocessing.fit(volumes, "ct").',
        )

    @classmethod
    def fit(
        cls,
        volumes: Iterable[Volume],
        modality: Literal["ct", "mr"],
        image_size: int = 256,
        *,
        crop: bool = True,
        plane: Literal["axial", "coronal", "sagittal"] = PLANE,
    ) -> Preprocessing:
        """Preprocessing for a training set; ``volumes`` may be a generator, one is held at a time.

        CT: mean and deviation of all voxels after clipping. MR: the volumes are not looked at.

        Raises:
            ArgumentError: No volumes, or a training set that is constant after clipping.
        """
        if modality != "ct":
            return cls(modality, image_size, crop=crop, plane=plane)
        parts = (block for volume in volumes for block in blocks(volume.array))
        count, mean, variance = clipped_moments(parts, *CT_WINDOW)
        require(
            variance >= 1e-6,
            "volumes",
            found=f"{count} voxels, all of {mean:g} HU after clipping to {CT_WINDOW}",
            allowed="CT volumes in Hounsfield units",
        )
        return cls(modality, image_size, mean, math.sqrt(variance), crop, plane)

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
        usable = "modality" in fields and known.issuperset(fields)
        found = f"fields {sorted(fields)}"
        require(usable, "preprocessing", found=found, allowed=f"{sorted(known)}, with a modality")
        return cls(**fields)

    def prepare(self, volume: Volume, view: FieldOfView | None = None) -> PreparedVolume:
        """Find the volume's orientation, body and intensity statistics; no slice is made yet.

        Args:
            volume: The scan.
            view: The part of every slice that becomes the image; None for the body, or for the
                whole slice without ``crop``.
        """
        return PreparedVolume(self, volume, view)


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
        self._normalise = normalisation(volume.array, preprocessing.mean, preprocessing.std)

        _, rows, columns = self.shape
        if view is None:
            box = (0, rows, 0, columns)
            if preprocessing.crop:
                box = body_box(self._seen.array, self.spacing, preprocessing.modality)
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
        self._rows = ImageAxis(rows, self.spacing[1], view.row, self.pixel_size, size)
        self._columns = ImageAxis(columns, self.spacing[2], view.column, self.pixel_size, size)

    def at(self, view: FieldOfView, image_size: int | None = None) -> PreparedVolume:
        """The same volume, seen elsewhere or in another size; nothing is computed again."""
        size = image_size or self.image_size
        other = copy.copy(self)
        other._look(dataclasses.replace(self.preprocessing, image_size=size), view)
        return other

    def at_most_native(self) -> PreparedVolume:
        """The same view at an image size that makes no pixel finer than the scan's own."""
        native = math.ceil(self.view.side / min(self.spacing[1:]) - 1e-6)
        return self.at(self.view, max(1, min(native, self.image_size)))

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
        require(
            label.array.dtype.kind in "biu" and label.array.min() >= 0,
            label.name,
            error=LabelError,
            found=lambda: f"{label.array.dtype} voxels from {label.array.min():g}",
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
        shape = tuple(slices.shape)
        require(
            len(shape) == 4 and (shape[0], *shape[2:]) == (stop - start, size, size),
            "slices",
            found=f"shape {shape}",
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
        order, flips = view_of_axes(self.volume.direction, self.preprocessing.plane)
        fits = array.shape[-3:] == self.shape
        require(fits, "array", found=f"shape {array.shape}", allowed=f"(..., {self.shape})")
        leading = array.ndim - 3
        stored = [*range(leading), *(leading + axis for axis in np.argsort(order))]
        index: Any = (..., *flips)
        return np.ascontiguousarray(array[index].transpose(stored))

    def to_canonical(self, array: np.ndarray) -> np.ndarray:
        """[Z, Y, X] in the axes of the file -> a view [n, h, w], writable where ``array`` is."""
        order, flips = view_of_axes(self.volume.direction, self.preprocessing.plane)
        return array.transpose(order)[flips]

    def _check_range(self, start: int, stop: int) -> None:
        allowed = f"a range within 0 to {len(self)}"
        inside = 0 <= start <= stop <= len(self)
        require(inside, "start, stop", found=f"{start}, {stop}", allowed=allowed)
