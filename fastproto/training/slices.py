# SPDX-License-Identifier: Apache-2.0
"""The scans that episodes are cut from, kept in memory in a compact form."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastproto.data.dataset import Case, Dataset
from fastproto.data.preprocessing import Preprocessing
from fastproto.data.volume import check_labels, read_label, read_volume
from fastproto.errors import DatasetError, require
from fastproto.training.supervoxels import Spacing, Supervoxels

RegionFinder = Callable[[Mapping[str, tuple[np.ndarray, Spacing]]], Mapping[str, Supervoxels]]

_CHUNK = 32  # slices prepared at a time, so that the float32 copy of a volume never exists
_ISOTROPIC = 2.5  # voxels whose sides differ by more make poor slices in the other planes
# Where rows and columns of another plane lie in an axial stack [z, y, x], head on top.
_VIEWS = {"coronal": (1, 0, 2), "sagittal": (2, 0, 1)}


@dataclass(frozen=True)
class CaseSlices:
    """The kept slices of one patient; `position` counts them, `numbers` says where they lie.

    Attributes:
        id: The case's id.
        numbers: Slice number in the prepared volume of each position, ascending.
        images: [n, h, w] float16, normalised.
        labels: [n, h, w] uint8 (int32 where a label is above 255), or None without labels.
        spacing: Distance of slices, rows and columns in mm.
        regions: [n, h, w] integers: the finest supervoxels 1..N, 0 outside; or None without.
        parents: [scales, N + 1]: the supervoxel of every scale that a finest one is part of.
        upside_down: Whether rows are stored from the bottom to the top.
    """

    id: str
    numbers: list[int]
    images: Tensor
    labels: Tensor | None
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
    regions: Tensor | None = None
    parents: np.ndarray | None = None
    upside_down: bool = False

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def extent(self) -> tuple[float, float]:
        """Height and width of a slice in mm."""
        return self.images.shape[1] * self.spacing[1], self.images.shape[2] * self.spacing[2]

    def only(self, keep: Tensor) -> CaseSlices:
        """The slices where ``keep`` [n] is true."""
        if keep.all():
            return self
        numbers = [number for number, kept in zip(self.numbers, keep, strict=True) if kept]
        return replace(self, numbers=numbers, **self._each(lambda stack: stack[keep]))

    def upright(self, picture: Tensor) -> Tensor:
        """A slice of ``images``, ``labels`` or ``regions`` with its first row on top."""
        return picture.flip(0) if self.upside_down else picture

    def planes(self) -> Iterator[CaseSlices]:
        """The case itself and, where its voxels allow it, views of it in the other two planes."""
        yield self
        complete = self.numbers == list(range(len(self.numbers)))
        if not complete or max(self.spacing) > _ISOTROPIC * min(self.spacing):
            return
        for plane, (z, y, x) in _VIEWS.items():
            turned = self._each(partial(torch.permute, dims=(z, y, x)))
            yield replace(
                self,
                id=f"{self.id} {plane}",
                numbers=list(range(len(turned["images"]))),
                spacing=(self.spacing[z], self.spacing[y], self.spacing[x]),
                upside_down=True,
                **turned,
            )

    def _each(self, change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """Images, labels and regions, as far as there are any, changed."""
        stacks = {name: getattr(self, name) for name in ("images", "labels", "regions")}
        return {name: stack if stack is None else change(stack) for name, stack in stacks.items()}

    def region(self, scale: int, position: int) -> Tensor:
        """[h, w] int32: the supervoxels of a scale in one slice."""
        assert self.regions is not None
        assert self.parents is not None
        return torch.from_numpy(self.parents[scale].astype(np.int32))[self.regions[position].long()]

    @cached_property
    def areas(self) -> list[np.ndarray]:
        """Per scale ``[n, labels]``: pixels of every supervoxel at every position; 0 is air."""
        assert self.regions is not None
        assert self.parents is not None
        count = self.parents.shape[1]
        labels = self.regions.flatten(1).numpy().astype(np.int64)
        labels += np.arange(len(labels))[:, None] * count
        pixels = np.bincount(labels.ravel(), minlength=len(labels) * count).reshape(-1, count)
        scales = []
        for parents in self.parents:
            joined = np.zeros((parents.max() + 1, len(pixels)), np.int32)
            np.add.at(joined, parents, pixels.T)
            scales.append(joined.T)
        return scales


class SliceStore:
    """The slices of several patients.

    Memory: 3 bytes a pixel (float16 image, uint8 label) and 2 for its supervoxels, of all scales.

    Args:
        cases: At least one, each with at least one slice.
    """

    def __init__(self, cases: Sequence[CaseSlices]):
        self.cases = list(cases)

    def __len__(self) -> int:
        """Number of slices."""
        return sum(map(len, self.cases))

    @classmethod
    def build(
        cls,
        dataset: Dataset,
        cases: Sequence[Case],
        preprocessing: Preprocessing,
        *,
        labels: bool = True,
        find_regions: RegionFinder | None = None,
        holding: Collection[int] | None = None,
        without: Collection[int] = (),
    ) -> SliceStore:
        """Read and prepare cases once, keeping only the slices that training can use.

        Args:
            dataset: Where the cases are from.
            cases: Cases to read.
            preprocessing: Turns a volume into slices. Its image size is the largest that is kept;
                a scan with fewer pixels keeps its own.
            labels: Keep label maps; otherwise they are read only for ``holding`` and ``without``.
            find_regions: Finds the supervoxels of whole scans by case, as ``all_supervoxels``
                does; a case without them is left out. None for no supervoxels.
            holding: Keep only slices with at least one of these labels; None keeps every slice.
            without: Drop every slice with any of these labels ("setting 2": held-out classes are
                not even seen as unlabelled tissue).

        Raises:
            DatasetError: A case has no label map where one is needed, or no slice is left at all.
            InputError: A file that cannot be used.
        """
        require(isinstance(labels, bool), "labels", found=repr(labels), allowed="True or False")
        needed = labels or bool(without) or holding is not None
        whole = []
        for case in cases:
            require(
                case.label is not None or not needed,
                f"{dataset.root}: case {case.id}",
                found="no label map",
                allowed="a label map for every case of label episodes and held-out classes",
                fix="Leave the case out, or train without labels.",
                error=DatasetError,
            )
            whole.append(_read_case(case, preprocessing, dataset.values if needed else None))
        if find_regions is not None:  # before slices are dropped, so that neighbours are neighbours
            found = find_regions({c.id: (c.images.numpy(), c.spacing) for c in whole})
            whole = [
                replace(
                    case,
                    regions=torch.from_numpy(found[case.id].finest),
                    parents=found[case.id].parents,
                )
                for case in whole
                if case.id in found
            ]
        kept = []
        for slices in whole:
            keep = torch.ones(len(slices), dtype=torch.bool)
            if slices.labels is not None:
                if holding is not None:
                    keep &= _holds(slices.labels, holding)
                keep &= ~_holds(slices.labels, without)
            if not labels:
                slices = replace(slices, labels=None)
            if keep.any():
                kept.append(slices.only(keep))
        require(
            kept,
            dataset.root,
            found="no slice that can be used",
            allowed="at least one slice with a wanted and without an excluded class",
            fix="Check the classes held out and the cases chosen.",
            error=DatasetError,
        )
        return cls(kept)


def _read_case(
    case: Case, preprocessing: Preprocessing, names: Mapping[int, str] | None
) -> CaseSlices:
    """All slices of a case, with labels where ``names`` explains them."""
    prepared = preprocessing.prepare(read_volume(case.image)).at_most_native()
    labels: Tensor | None = None
    if names is not None:
        assert case.label is not None
        label = read_label(case.label)
        check_labels(label, names, needed=False)
        labels = prepared.labels(label)
        labels = labels.to(torch.uint8 if int(labels.max()) < 256 else torch.int32)
    size = prepared.image_size
    images = torch.empty(len(prepared), size, size, dtype=torch.float16)
    for start in range(0, len(prepared), _CHUNK):
        part = images[start : start + _CHUNK]
        part[:] = prepared.images(start, start + len(part))[:, 0]
    spacing = (prepared.spacing[0], prepared.pixel_size, prepared.pixel_size)
    return CaseSlices(case.id, list(range(len(prepared))), images, labels, spacing)


def _holds(labels: Tensor, wanted: Collection[int]) -> Tensor:
    """[n] bool: which slices hold at least one of these labels."""
    possible = [value for value in wanted if value <= torch.iinfo(labels.dtype).max]
    return torch.isin(labels, torch.tensor(possible, dtype=labels.dtype)).flatten(1).any(dim=1)
