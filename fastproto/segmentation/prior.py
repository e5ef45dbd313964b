# SPDX-License-Identifier: Apache-2.0
"""Where the organs lie: a spatial prior for a scan, carried over from the annotated one.

An `Atlas` is what a task keeps of the annotated scan for it; `locate` aligns it with another scan.
Organs travel as signed distances to their surface, which stay exact between the voxels of a coarse
grid. As in `alignment`, points are (slice, row, column) in mm along the canonical axes of a scan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy.ndimage
import torch
from torch import Tensor

from fastproto.data.preprocessing import PreparedVolume, canonical
from fastproto.data.volume import Volume, check_same_grid
from fastproto.errors import ArgumentError, LabelError
from fastproto.segmentation.alignment import (
    Alignment,
    Picture,
    align_affine,
    align_boxes,
    align_deformable,
    best_start,
    body_box,
    correlation,
    make_picture,
    volume_box,
)

KINDS = ("box", "affine", "deformable")

_MAP_SIDE = 48  # voxels of a distance map, at most, along each axis
_SEARCH_SIDE = 40  # points along each axis of a query, at which organs are looked for
_BODY_VOXELS = 100_000
_DETAIL_VOXELS = 300_000
_SURROUNDINGS_MM = 25.0


@dataclass(frozen=True, eq=False)
class DistanceMap:
    """Signed distance to an organ's surface in mm, negative inside, on a grid around the organ.

    Attributes:
        values: [a, b, c] float32.
        first: Position of the first grid point in mm.
        step: Distance of grid points in mm, per axis.
    """

    values: np.ndarray
    first: np.ndarray
    step: np.ndarray

    @classmethod
    def of_mask(cls, mask: np.ndarray, spacing: np.ndarray) -> DistanceMap:
        """The map of a mask [n, h, w] in canonical orientation that is not empty."""
        hits = [np.flatnonzero(mask.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
        low = np.array([hit[0] for hit in hits])
        size = np.array([hit[-1] + 1 for hit in hits]) - low
        # Whole voxels are pooled, so that thin parts weigh in; two empty cells on every side.
        pool = -(-size // (_MAP_SIDE - 4))
        cells = -(-size // pool)
        part = np.zeros(cells * pool, np.float32)
        box = tuple(slice(start, start + extent) for start, extent in zip(low, size, strict=True))
        part[tuple(map(slice, size))] = mask[box]
        split = part.reshape(*np.stack([cells, pool], axis=1).ravel())
        share = np.pad(split.mean(axis=(1, 3, 5)), 2)
        inside = share >= min(0.5, share.max())
        step = pool * spacing
        values = np.where(
            inside, -_surface_distance(inside, step), _surface_distance(~inside, step)
        )
        values = values.astype(np.float16).astype(np.float32)  # as in a task file
        return cls(values, (low + (pool - 1) / 2) * spacing - 2 * step, step)

    @property
    def last(self) -> np.ndarray:
        """Position of the last grid point in mm."""
        return self.first + self.step * (np.array(self.values.shape) - 1)

    def at(self, points: np.ndarray) -> np.ndarray:
        """Distances at [..., 3]. Beyond the grid: those at its border and of the way to there."""
        near = points.clip(self.first, self.last)
        index = np.moveaxis((near - self.first) / self.step, -1, 0)
        values = scipy.ndimage.map_coordinates(self.values, index, order=1, mode="nearest")
        return values + np.linalg.norm(points - near, axis=-1).astype(np.float32)

    def on(self, axes: Sequence[np.ndarray]) -> Tensor:
        """Distances at the grid that three rows of positions in mm span, ``[n, h, w]`` float32."""
        result = torch.from_numpy(self.values)
        beyond = []
        for axis, positions in enumerate(axes):
            near = positions.clip(self.first[axis], self.last[axis])
            beyond.append(torch.from_numpy(np.float32((positions - near) ** 2)))
            index = (near - self.first[axis]) / self.step[axis]
            distance = np.abs(index[:, None] - np.arange(self.values.shape[axis]))
            weights = torch.from_numpy(np.clip(1 - distance, 0, None).astype(np.float32))
            result = torch.tensordot(result, weights, dims=([0], [1]))  # the next axis comes first
        far = beyond[0][:, None, None] + beyond[1][:, None] + beyond[2]
        return result.add_(far.sqrt_())


@dataclass(frozen=True, eq=False)
class Atlas:
    """What a task keeps of the annotated scan to find the same organs elsewhere.

    With "affine" and "deformable" it holds ``pictures`` of the patient: that is image content, as
    much patient data as the scan. With "box" it holds the organs' shapes and no image.

    Attributes:
        kind: The most elaborate alignment it can serve: "box", "affine" or "deformable".
        modality: "ct" or "mr".
        plane: The plane of the slices, as in `Preprocessing`.
        values: Label values of the organs.
        maps: A distance map for each of them.
        body: [2, 3] mm, the box of the body.
        slice_spacing: In mm.
        pictures: The body at low resolution and, finer, the organs and what surrounds them; none
            with "box".
    """

    kind: str
    modality: str
    plane: str
    values: tuple[int, ...]
    maps: tuple[DistanceMap, ...]
    body: np.ndarray
    slice_spacing: float
    pictures: tuple[Picture, ...]

    @classmethod
    def make(
        cls,
        image: Volume,
        label: Volume,
        values: Sequence[int],
        modality: str,
        kind: str = "affine",
        *,
        plane: str = "axial",
    ) -> Atlas:
        """Make it from an annotated scan.

        Raises:
            GeometryError: Image and label are on different grids.
            LabelError: A value does not occur.
        """
        _check_kind(kind, KINDS)
        seen, organs = canonical(image, plane), canonical(label, plane)
        check_same_grid(seen, organs)
        spacing = np.array(seen.spacing[::-1])
        maps = []
        for value in values:
            mask = organs.array == value
            if not mask.any():
                raise LabelError(
                    label.name, found=f"no voxel of label {value}", allowed="labels that occur"
                )
            maps.append(DistanceMap.of_mask(mask, spacing))
        body = body_box(seen, modality)
        around = _around(maps).clip(*volume_box(seen))
        pictures = () if kind == "box" else _pictures(seen, modality, (body, around))
        return cls(
            kind, modality, plane, tuple(values), tuple(maps), body, float(spacing[0]), pictures
        )

    def tensors(self) -> dict[str, Tensor]:
        """What is large, for a safetensors file; distances as float16."""
        found = {
            f"distance.{index}": torch.from_numpy(map_.values.astype(np.float16))
            for index, map_ in enumerate(self.maps)
        }
        for index, picture in enumerate(self.pictures):
            found[f"picture.{index}"] = torch.from_numpy(picture.array)
        return found

    def to_dict(self) -> dict[str, Any]:
        """What is small, as JSON takes it."""
        return {
            "kind": self.kind,
            "modality": self.modality,
            "plane": self.plane,
            "values": list(self.values),
            "maps": [[map_.first.tolist(), map_.step.tolist()] for map_ in self.maps],
            "body": self.body.tolist(),
            "slice_spacing": self.slice_spacing,
            "pictures": [[picture.first.tolist(), picture.step] for picture in self.pictures],
        }

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], fields: Mapping[str, Any]) -> Atlas:
        """The inverse of `tensors` and `to_dict`.

        Raises:
            ArgumentError: They do not fit together.
        """
        try:
            maps = [
                DistanceMap(
                    tensors[f"distance.{index}"].float().numpy(), np.array(first), np.array(step)
                )
                for index, (first, step) in enumerate(fields["maps"])
            ]
            pictures = [
                Picture(tensors[f"picture.{index}"].numpy(), np.array(first), float(step))
                for index, (first, step) in enumerate(fields["pictures"])
            ]
            _check_kind(fields["kind"], KINDS)
            atlas = cls(
                fields["kind"],
                fields["modality"],
                fields["plane"],
                tuple(map(int, fields["values"])),
                tuple(maps),
                np.array(fields["body"], dtype=float).reshape(2, 3),
                float(fields["slice_spacing"]),
                tuple(pictures),
            )
            if len(atlas.values) != len(maps) or any(map_.values.ndim != 3 for map_ in maps):
                raise ValueError(f"{len(maps)} distance maps for {len(atlas.values)} organs")
            if len(pictures) != (0 if atlas.kind == "box" else 2):
                raise ValueError(f"{len(pictures)} pictures for kind {atlas.kind}")
        except (KeyError, TypeError, ValueError) as error:
            raise ArgumentError(
                "atlas", found=f"unusable fields ({error})", allowed="what Atlas.to_dict gives"
            ) from error
        return atlas


@dataclass(frozen=True, eq=False)
class Prior:
    """Where the organs of an atlas are expected in one scan.

    Attributes:
        kind: The alignment used.
        fallback: Why it is "box" although more was asked for; None where it is not.
        quality: Normalised cross-correlation of the two scans around the organs after alignment, -1
            to 1; NaN with "box".
        values: Label values of the organs.
        maps: A distance map in this scan for each of them.
        alignment: From this scan to the annotated one.
        shape, spacing: Of this scan in canonical orientation: slices, rows, columns; mm.
        direction, plane: How its file stores them.
        body: [2, 3] mm, the box of the body.
        atlas_spacing: Distance of the annotated scan's slices in mm.
    """

    kind: str
    fallback: str | None
    quality: float
    values: tuple[int, ...]
    maps: tuple[DistanceMap, ...]
    alignment: Alignment
    shape: tuple[int, ...]
    spacing: np.ndarray
    direction: tuple[float, ...]
    plane: str
    body: np.ndarray
    atlas_spacing: float

    def only(self, index: int) -> Prior:
        """Of one organ alone, by its place among ``values``."""
        return replace(self, values=self.values[index : index + 1], maps=(self.maps[index],))

    def signed_distance(
        self, start: int, stop: int, *, prepared: PreparedVolume | None = None
    ) -> Tensor:
        """Distance to the surface of every organ in mm, negative inside.

        Args:
            start: First slice.
            stop: One past the last.
            prepared: Sample at the pixels of its images instead of the slices' own.

        Returns:
            ``[n, K, h, w]`` or, with ``prepared``, ``[n, K, S, S]`` float32 for the K organs; the
            background is not among them.
        """
        if not 0 <= start <= stop <= self.shape[0]:
            raise ArgumentError(
                "start, stop",
                found=f"{start}, {stop}",
                allowed=f"a range within 0 to {self.shape[0]}",
            )
        if prepared is None:
            rows, columns = np.arange(self.shape[1]), np.arange(self.shape[2])
        elif prepared.shape == self.shape and prepared.preprocessing.plane == self.plane:
            rows, columns = prepared.pixel_positions
        else:
            raise ArgumentError(
                "prepared",
                found=f"{prepared.preprocessing.plane} slices of shape {prepared.shape}",
                allowed=f"those of the prior's scan, {self.plane} of shape {self.shape}",
            )
        positions = (np.arange(start, stop), rows, columns)
        axes = [index * side for index, side in zip(positions, self.spacing, strict=True)]
        return torch.stack([map_.on(axes) for map_ in self.maps], dim=1)

    def probability(
        self,
        start: int,
        stop: int,
        blur: float,
        *,
        floor: float = 1e-3,
        prepared: PreparedVolume | None = None,
    ) -> Tensor:
        """How likely each organ is by its place alone, as `signed_distance`.

        Args:
            start: First slice.
            stop: One past the last.
            blur: Distance in mm over which the odds fall by e.
            floor: The least probability, so that nothing is ever ruled out.
            prepared: As in `signed_distance`.
        """
        distance = self.signed_distance(start, stop, prepared=prepared)
        return torch.sigmoid_(distance.div_(-blur)).clamp_(min=floor)

    def box(self, margin: float = 0.0) -> tuple[tuple[int, int], ...]:
        """Slices, rows and columns [first, one past the last) of all organs and ``margin`` mm."""
        grids = [[axis.ravel() for axis in _axes(map_)] for map_ in self.maps]
        result = []
        for axis in range(3):
            low, high = np.inf, -np.inf
            for map_, grid in zip(self.maps, grids, strict=True):
                near = map_.values <= max(0.0, float(map_.values.min()))
                hit = grid[axis][near.any(axis=tuple({0, 1, 2} - {axis}))]
                low, high = min(low, hit[0]), max(high, hit[-1])
            first = int(np.floor((low - margin) / self.spacing[axis]))
            last = int(np.ceil((high + margin) / self.spacing[axis])) + 1
            length = self.shape[axis]
            first = min(max(first, 0), length - 1)
            result.append((first, min(max(last, first + 1), length)))
        return tuple(result)

    def slice_positions(self) -> np.ndarray:
        """``[n]``, the slice index in the annotated scan that each slice corresponds to.

        By the affine part, at the middle of the body; it may lie outside the annotated scan.
        """
        points = np.repeat(self.body.mean(axis=0)[None], self.shape[0], axis=0)
        points[:, 0] = np.arange(self.shape[0]) * self.spacing[0]
        return self.alignment.affine()(points)[:, 0] / self.atlas_spacing

    def label_map(self) -> np.ndarray:
        """The prior alone as a segmentation: ``[Z, Y, X]`` label values, in the file's axes."""
        values = np.array([0, *self.values])
        values = values.astype(np.min_scalar_type(int(values.max())))
        stored = [0] * 3
        probe = canonical(
            Volume(np.empty((1, 2, 3), np.bool_), direction=self.direction), self.plane
        )
        for canonical_axis, size in enumerate(probe.array.shape):
            stored[size - 1] = self.shape[canonical_axis]
        labels = np.zeros(stored, values.dtype)
        seen = canonical(Volume(labels, direction=self.direction), self.plane).array
        for index in range(self.shape[0]):
            nearest, organ = self.signed_distance(index, index + 1)[0].min(dim=0)
            seen[index] = values[torch.where(nearest < 0, organ + 1, 0).numpy()]
        return labels


def locate(atlas: Atlas, volume: Volume, kind: str | None = None) -> Prior:
    """Find the atlas's organs in another scan. The same scans give the same prior, bit by bit.

    Args:
        atlas: Of the annotated scan.
        volume: The scan to look at, of the same modality.
        kind: "box", "affine" or "deformable", no more than the atlas can serve; None takes that.
    """
    kind = kind or atlas.kind
    _check_kind(kind, KINDS[: KINDS.index(atlas.kind) + 1])
    seen = canonical(volume, atlas.plane)
    body = body_box(seen, atlas.modality)
    alignment = align_boxes(body, atlas.body)
    fallback, quality = None, float("nan")
    if kind != "box":
        try:
            alignment, quality = _align(atlas, seen, body, alignment, kind)
        except RuntimeError as error:
            kind, fallback = "box", str(error).splitlines()[-1]
    spacing = np.array(seen.spacing[::-1])
    return Prior(
        kind,
        fallback,
        quality,
        atlas.values,
        tuple(_carry(atlas.maps, alignment, seen.array.shape, spacing)),
        alignment,
        seen.array.shape,
        spacing,
        volume.direction,
        atlas.plane,
        body,
        atlas.slice_spacing,
    )


def _align(
    atlas: Atlas, seen: Volume, body: np.ndarray, boxes: Alignment, kind: str
) -> tuple[Alignment, float]:
    """The alignment of a canonical volume and its quality; RuntimeError where there is none."""
    whole, detail = atlas.pictures
    query = make_picture(seen, atlas.modality, body, _BODY_VOXELS, whole.step)
    alignment = align_affine(query, whole, best_start(query, whole, boxes))
    around = alignment.box_in_query(_around(atlas.maps)).clip(*volume_box(seen))
    if not (around[1] > around[0]).all():
        raise RuntimeError("the organs lie outside the scan")
    query = make_picture(seen, atlas.modality, around, _DETAIL_VOXELS, detail.step)
    alignment = align_affine(query, detail, alignment)
    if kind == "deformable":
        alignment = align_deformable(query, detail, alignment)
    return alignment, correlation(query, detail, alignment)


def _pictures(seen: Volume, modality: str, boxes: Sequence[np.ndarray]) -> tuple[Picture, ...]:
    budgets = (_BODY_VOXELS, _DETAIL_VOXELS)
    return tuple(
        make_picture(seen, modality, box, budget)
        for box, budget in zip(boxes, budgets, strict=True)
    )


def _around(maps: Sequence[DistanceMap]) -> np.ndarray:
    """[2, 3] mm, the box of all organs and what surrounds them."""
    low = np.min([map_.first for map_ in maps], axis=0) - _SURROUNDINGS_MM
    return np.stack([low, np.max([map_.last for map_ in maps], axis=0) + _SURROUNDINGS_MM])


def _carry(
    maps: Sequence[DistanceMap],
    alignment: Alignment,
    shape: tuple[int, ...],
    spacing: np.ndarray,
) -> list[DistanceMap]:
    """Distance maps of a scan of ``shape``, from those of the annotated scan."""
    sides = (np.array(shape) - 1) * spacing
    search = [np.linspace(0, side, _SEARCH_SIDE if side else 1) for side in sides]
    coarse = np.stack(np.meshgrid(*search, indexing="ij"), axis=-1)
    reach = np.array([side / (_SEARCH_SIDE - 1) for side in sides]).clip(spacing, None)
    moved = alignment(coarse)
    result = []
    for map_ in maps:
        distance = map_.at(moved) / alignment.scale
        # An organ beyond the scan's border: what comes nearest to it.
        near = distance <= max(np.linalg.norm(reach), float(distance.min()))
        places = coarse[near]
        low, high = places.min(axis=0) - reach, places.max(axis=0) + reach
        step = np.maximum((high - low) / (_MAP_SIDE - 1), np.minimum(spacing, map_.step))
        size = np.ceil((high - low) / step).astype(int) + 1
        empty = DistanceMap(np.empty(size, np.float32), low, step)
        points = np.stack(np.meshgrid(*(a.ravel() for a in _axes(empty)), indexing="ij"), axis=-1)
        values = (map_.at(alignment(points)) / alignment.scale).astype(np.float32)
        result.append(DistanceMap(values, low, step))
    return result


def _axes(map_: DistanceMap) -> list[np.ndarray]:
    return [
        map_.first[axis] + np.arange(size) * map_.step[axis]
        for axis, size in enumerate(map_.values.shape)
    ]


def _surface_distance(inside: np.ndarray, step: np.ndarray) -> np.ndarray:
    """From every cell inside to the surface, which lies midway to the first cell outside."""
    nearest = scipy.ndimage.distance_transform_edt(
        inside, sampling=step, return_distances=False, return_indices=True
    )
    way = np.abs(nearest - np.indices(inside.shape))
    cells = way.max(axis=0)
    length = np.linalg.norm(np.moveaxis(way, 0, -1) * step, axis=-1)
    return (length * (1 - 0.5 / cells.clip(1))).astype(np.float32)


def _check_kind(kind: object, allowed: Sequence[str]) -> None:
    if kind not in allowed:
        raise ArgumentError("kind", found=repr(kind), allowed=", ".join(allowed))
