# SPDX-License-Identifier: Apache-2.0
"""Where the organs lie: a spatial prior for a scan, carried over from the annotated one.

An `Atlas` is what a task keeps of the annotated scan for it; `locate` aligns it with another scan.
Organs travel as a `DistanceMap` each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastproto._memory import is_lack_of_memory
from fastproto.data.geometry import canonical
from fastproto.data.volume import Volume, check_same_grid
from fastproto.defaults import PLANE
from fastproto.errors import ArgumentError, LabelError, require
from fastproto.segmentation.alignment import (
    Alignment,
    Picture,
    align_affine,
    align_boxes,
    align_deformable,
    body_box,
    correlation,
    good_starts,
    make_picture,
    unlikeness,
    volume_box,
)
from fastproto.segmentation.distance import MAP_SIDE, DistanceMap

KINDS = ("box", "affine", "deformable")

_SEARCH_SIDE = 40  # points along each axis of a scan at which organs are looked for
_BODY_VOXELS, _DETAIL_VOXELS = 100_000, 300_000
_SURROUNDINGS_MM = 25.0
_STRETCH = 1.25  # of one body along the slices, to be another's
_REFINED = 2  # of the alignments found, the best


@dataclass(frozen=True, eq=False)
class Atlas:
    """What a task keeps of the annotated scan to find the same organs elsewhere.

    With "affine" and "deformable" it holds ``pictures`` of the patient: that is image content, as
    much patient data as the scan. With "box" it holds the organs' shapes and no image.

    Attributes:
        kind: The most elaborate alignment it can serve: "box", "affine" or "deformable".
        modality, plane: As in `Preprocessing`.
        values, maps: Label values of the organs, and a distance map for each of them.
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

    def __post_init__(self) -> None:
        _check_kind(self.kind, KINDS)
        counts = len(self.values), len(self.maps), len(self.pictures)
        allowed = max(counts[0], 1), max(counts[0], 1), 0 if self.kind == "box" else 2
        subject = "values, maps, pictures"
        require(counts == allowed, subject, found=f"{counts} of them", allowed=f"{allowed}")

    @classmethod
    def make(
        cls,
        image: Volume,
        label: Volume,
        values: Sequence[int],
        modality: str,
        kind: str = "affine",
        *,
        plane: str = PLANE,
    ) -> Atlas:
        """Make it from an annotated scan.

        Raises:
            GeometryError: Image and label are on different grids.
            LabelError: A value does not occur.
        """
        seen, organs = canonical(image, plane), canonical(label, plane)
        check_same_grid(seen, organs)
        spacing = np.array(seen.spacing[::-1])
        maps = []
        for value in values:
            hit = organs.array == value
            found, allowed = f"no voxel of label {value}", "labels that occur"
            require(hit.any(), label.name, found=found, allowed=allowed, error=LabelError)
            maps.append(DistanceMap.of_mask(hit, spacing))
        body, parts = body_box(seen, modality), []
        if kind != "box":
            around = _around(maps).clip(*volume_box(seen))
            parts = [(body, _BODY_VOXELS), (around, _DETAIL_VOXELS)]
        pictures = tuple(make_picture(seen, modality, *part) for part in parts)
        described = kind, modality, plane, tuple(values), tuple(maps), body
        return cls(*described, float(spacing[0]), pictures)

    def to_parts(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors for a safetensors file (distances as float16), and the rest as JSON takes it."""
        arrays = {
            f"distance.{i}": each.values.astype(np.float16) for i, each in enumerate(self.maps)
        }
        arrays |= {f"picture.{i}": each.array for i, each in enumerate(self.pictures)}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}, {
            **vars(self),
            "maps": [[map_.first.tolist(), map_.step.tolist()] for map_ in self.maps],
            "body": self.body.tolist(),
            "pictures": [[picture.first.tolist(), picture.step] for picture in self.pictures],
        }

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], fields: Mapping[str, Any]) -> Atlas:
        """The inverse of `to_parts`.

        Raises:
            ArgumentError: Fields or tensors are missing or do not fit together.
        """
        try:
            maps = tuple(
                DistanceMap(_solid(tensors[f"distance.{i}"].float()), _triple(first), _triple(step))
                for i, (first, step) in enumerate(fields["maps"])
            )
            pictures = tuple(
                Picture(_solid(tensors[f"picture.{i}"]), _triple(first), float(step))
                for i, (first, step) in enumerate(fields["pictures"])
            )
            kind, modality, plane = (str(fields[name]) for name in ("kind", "modality", "plane"))
            values = tuple(map(int, fields["values"]))
            body = np.array(fields["body"], dtype=float).reshape(2, 3)
            spacing = float(fields["slice_spacing"])
            return cls(kind, modality, plane, values, maps, body, spacing, pictures)
        except (KeyError, TypeError, ValueError) as error:
            found, allowed = f"unusable fields ({error})", "what Atlas.to_parts gives"
            raise ArgumentError("atlas", found=found, allowed=allowed) from error


@dataclass(frozen=True, eq=False)
class Prior:
    """Where the organs of an atlas are expected in one scan.

    Attributes:
        kind: The alignment used.
        fallback: Why it is "box" although more was asked for; None where it is not.
        quality: Normalised cross-correlation of the two scans around the organs after alignment, -1
            to 1; NaN with "box".
        values, maps: Label values of the organs, and a distance map in this scan for each of them.
        alignment: From this scan to the annotated one.
        grid, plane: This scan without its voxels, and the plane of its slices.
        atlas_spacing: Distance of the annotated scan's slices in mm.
    """

    kind: str
    fallback: str | None
    quality: float
    values: tuple[int, ...]
    maps: tuple[DistanceMap, ...]
    alignment: Alignment
    grid: Volume
    plane: str
    atlas_spacing: float

    @property
    def shape(self) -> tuple[int, ...]:
        """Slices, rows and columns of the scan in canonical orientation."""
        return canonical(self.grid, self.plane).array.shape

    @property
    def spacing(self) -> tuple[float, ...]:
        """Their distances in mm."""
        return canonical(self.grid, self.plane).spacing[::-1]

    def only(self, index: int) -> Prior:
        """Of one organ alone, by its place among ``values``."""
        return replace(self, values=self.values[index : index + 1], maps=(self.maps[index],))

    def moved(self, way: np.ndarray) -> Prior:
        """The organs expected ``way`` [3] mm further along slices, rows and columns.

        The affine part moves with them; a displacement stays where it was.
        """
        maps = tuple(replace(map_, first=map_.first + way) for map_ in self.maps)
        old = self.alignment
        alignment = replace(old, offset=old.offset - old.matrix @ way)
        return replace(self, maps=maps, alignment=alignment)

    def signed_distance(self, start: int, stop: int) -> Tensor:
        """Distance to the surface of every organ in mm, negative inside, in a range of slices.

        Returns:
            ``[n, K, h, w]`` float32 for the K organs; the background is not among them.
        """
        slices, height, width = self.shape
        fits, allowed = 0 <= start <= stop <= slices, f"a range within 0 to {slices}"
        require(fits, "start, stop", found=f"{start}, {stop}", allowed=allowed)
        indices = np.arange(start, stop), np.arange(height), np.arange(width)
        axes = [index * side for index, side in zip(indices, self.spacing, strict=True)]
        return torch.stack([map_.on(axes) for map_ in self.maps], dim=1)

    def box(self, margin: float = 0.0) -> tuple[tuple[int, int], ...]:
        """Slices, rows and columns [first, one past the last) of all organs and ``margin`` mm."""
        ends = []
        for map_ in self.maps:
            inside = np.argwhere(map_.values <= max(0.0, float(map_.values.min())))
            corners = np.stack([inside.min(axis=0) - 0.5, inside.max(axis=0) + 0.5])
            ends.append(map_.first + corners * map_.step)
        low = np.min(ends, axis=(0, 1)) - margin
        high = np.max(ends, axis=(0, 1)) + margin
        last = np.array(self.shape) - 1
        first = np.floor(low / self.spacing).clip(0, last).astype(int)
        stop = np.ceil(high / self.spacing).clip(first, last).astype(int) + 1
        return tuple(zip(first.tolist(), stop.tolist(), strict=True))

    def slice_positions(self) -> np.ndarray:
        """``[n]`` float, the slice of the annotated scan that each slice corresponds to.

        By the affine part, amid the organs; it may lie outside the annotated scan.
        """
        middle = np.mean([(map_.first + map_.last) / 2 for map_ in self.maps], axis=0)
        points = np.tile(middle, (self.shape[0], 1))
        points[:, 0] = np.arange(len(points)) * self.spacing[0]
        return replace(self.alignment, displacement=None)(points)[:, 0] / self.atlas_spacing

    def label_map(self) -> np.ndarray:
        """The prior alone as a segmentation: ``[Z, Y, X]`` label values, in the file's axes."""
        values = np.array([0, *self.values])
        values = values.astype(np.min_scalar_type(int(values.max())))
        labels = np.zeros(self.grid.array.shape, values.dtype)
        seen = canonical(Volume(labels, direction=self.grid.direction), self.plane).array
        for index, target in enumerate(seen):
            distance, organ = self.signed_distance(index, index + 1)[0].min(dim=0)
            target[...] = values[torch.where(distance < 0, organ + 1, 0).numpy()]
        return labels


def locate(atlas: Atlas, volume: Volume, kind: str | None = None) -> Prior:
    """Find the atlas's organs in another scan. The same scans give the same prior, bit by bit.

    ``kind`` is "box", "affine" or "deformable", no more than the atlas can serve; None takes that.
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
            if is_lack_of_memory(error):
                raise
            kind, fallback = "box", str(error).splitlines()[-1]
    empty = np.broadcast_to(np.uint8(0), volume.array.shape)
    grid = Volume(empty, volume.spacing, volume.origin, volume.direction)
    maps = tuple(_carry(map_, alignment, seen) for map_ in atlas.maps)
    found = kind, fallback, quality, atlas.values, maps, alignment, grid
    return Prior(*found, atlas.plane, atlas.slice_spacing)


def _align(
    atlas: Atlas, seen: Volume, body: np.ndarray, boxes: Alignment, kind: str
) -> tuple[Alignment, float]:
    """The alignment of a canonical volume and its quality; RuntimeError where there is none."""
    whole, detail = atlas.pictures
    query = make_picture(seen, atlas.modality, body, _BODY_VOXELS, whole.step)
    found: list[tuple[float, Alignment, Picture]] = []
    problems: list[str] = []  # not the errors, whose traceback would keep the scan in memory

    def consider(moved: Picture, still: Picture, start: Alignment, across: bool) -> None:
        try:
            alignment = align_affine(moved, still, start, across=across)
            around = _surroundings(atlas, seen, alignment)
            found.append((unlikeness(around, detail, alignment), alignment, around))
        except RuntimeError as error:  # other starts may do
            if is_lack_of_memory(error):
                raise
            problems.append(str(error))

    for start in good_starts(query, whole, boxes):
        stretch = start.matrix[0, 0]  # far from 1 it cannot be right as it is
        consider(query, whole, start, across=1 / _STRETCH < stretch < _STRETCH)
    found.sort(key=lambda candidate: candidate[0])
    for _, alignment, around in found[:_REFINED]:
        consider(around, detail, alignment, across=False)
    if not found:
        raise RuntimeError(problems[0])
    _, alignment, around = min(found, key=lambda candidate: candidate[0])
    if kind == "deformable":
        alignment = align_deformable(around, detail, alignment)
    return alignment, correlation(around, detail, alignment)


def _surroundings(atlas: Atlas, seen: Volume, alignment: Alignment) -> Picture:
    """The organs and what surrounds them; RuntimeError where they lie outside the scan."""
    around = alignment.box_in_query(_around(atlas.maps)).clip(*volume_box(seen))
    if not (around[1] > around[0]).all():
        raise RuntimeError("the organs lie outside the scan")
    return make_picture(seen, atlas.modality, around, _DETAIL_VOXELS, atlas.pictures[1].step)


def _around(maps: Sequence[DistanceMap]) -> np.ndarray:
    """[2, 3] mm, the box of all organs and what surrounds them."""
    low = np.min([map_.first for map_ in maps], axis=0) - _SURROUNDINGS_MM
    return np.stack([low, np.max([map_.last for map_ in maps], axis=0) + _SURROUNDINGS_MM])


def _carry(map_: DistanceMap, alignment: Alignment, seen: Volume) -> DistanceMap:
    """The distance map of an organ in a canonical volume, from that in the annotated scan."""
    shape, spacing = np.array(seen.array.shape), np.array(seen.spacing[::-1])
    counts = shape.clip(max=_SEARCH_SIDE)
    reach = (shape - 1) * spacing / (counts - 1).clip(1)
    coarse = np.moveaxis(np.indices(tuple(counts)), 0, -1) * reach
    distance = map_.at(alignment(coarse)) / alignment.scale
    # Of an organ beyond the scan's border, what comes nearest to it.
    near = coarse[distance <= max(float(np.linalg.norm(reach)), float(distance.min()))]
    reach = np.maximum(reach, spacing)
    low, sides = near.min(axis=0) - reach, np.ptp(near, axis=0) + 2 * reach
    step = np.maximum(sides / (MAP_SIDE - 1), np.minimum(spacing, map_.step))
    counts = np.ceil(sides / step).astype(int) + 1
    fine = np.moveaxis(np.indices(tuple(counts)), 0, -1) * step + low
    values = map_.at(alignment(fine)) / alignment.scale
    return DistanceMap(values.astype(np.float32), low, step)


def _solid(tensor: Tensor) -> np.ndarray:
    if tensor.ndim != 3 or not tensor.numel():
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)}")
    return tensor.numpy()


def _triple(numbers: Sequence[float]) -> np.ndarray:
    return np.array(numbers, dtype=float).reshape(3)


def _check_kind(kind: object, allowed: Sequence[str]) -> None:
    require(kind in allowed, "kind", found=repr(kind), allowed=", ".join(allowed))
