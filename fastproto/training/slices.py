# SPDX-License-Identifier: Apache-2.0
"""The slices that episodes are drawn from, kept in memory in a compact form."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastproto.data.dataset import Case, Dataset
from fastproto.data.preprocessing import Preprocessing
from fastproto.data.volume import check_labels, read_label, read_volume
from fastproto.errors import DatasetError
from fastproto.training.superpixels import foreground_threshold, superpixels

_CHUNK = 32  # slices prepared at a time, so that the float32 copy of a volume never exists


@dataclass
class CaseSlices:
    """The kept slices of one patient; `position` counts them, `numbers` says where they lie.

    Attributes:
        id: The case's id.
        numbers: Slice number in the prepared volume of each position, ascending.
        images: [n, S, S] float16, normalised.
        labels: [n, S, S] uint8 (int32 where a label is above 255), or None without labels.
        threshold: Intensity above which a pixel can be body.
    """

    id: str
    numbers: list[int]
    images: Tensor
    labels: Tensor | None
    threshold: float
    _superpixels: dict[int, Tensor] = field(default_factory=dict, repr=False)

    def superpixels(self, position: int) -> Tensor:
        """[S, S] int16: 0 outside the body, superpixels 1..n; computed once, then kept."""
        if position not in self._superpixels:
            image = self.images[position].float().numpy()
            self._superpixels[position] = torch.from_numpy(superpixels(image, self.threshold))
        return self._superpixels[position]


class SliceStore:
    """The slices of several patients.

    Memory: 3 bytes a pixel (float16 image, uint8 label), 0.2 MB for a 256 x 256 slice, and
    2 bytes a pixel more for slices whose superpixels were asked for.

    Args:
        cases: At least one, each with at least one slice.
    """

    def __init__(self, cases: Sequence[CaseSlices]):
        self.cases = list(cases)

    def __len__(self) -> int:
        """Number of slices."""
        return sum(len(case.numbers) for case in self.cases)

    @classmethod
    def build(
        cls,
        dataset: Dataset,
        cases: Sequence[Case],
        preprocessing: Preprocessing,
        with_labels: bool = True,
        *,
        holding: Collection[int] | None = None,
        without: Collection[int] = (),
    ) -> SliceStore:
        """Read and prepare cases once, keeping only the slices that training can use.

        Args:
            dataset: Where the cases are from; named in errors.
            cases: Cases to read.
            preprocessing: Turns a volume into slices.
            with_labels: Keep the label maps too; without, they are read only for ``without``.
            holding: Keep only slices with at least one of these labels; None keeps every slice.
            without: Drop every slice with any of these labels ("setting 2": held-out classes are
                not even seen as unlabelled tissue).

        Raises:
            DatasetError: A case has no label map where one is needed, or no slice is left at all.
            InputError: A file that cannot be used.
        """
        need_labels = with_labels or bool(without) or holding is not None
        kept = []
        for case in cases:
            if need_labels and case.label is None:
                raise DatasetError(
                    f"{dataset.root}: case {case.id}",
                    found="no label map",
                    allowed="a label map for every case of label episodes and held-out classes",
                    fix="Leave the case out, or train on superpixels alone.",
                )
            names = dataset.labels if need_labels else None
            slices = _read_case(case, preprocessing, names, holding, without)
            if slices is not None:
                if not with_labels:
                    slices.labels = None
                kept.append(slices)
        if not kept:
            raise DatasetError(
                dataset.root,
                found="no slice that can be used",
                allowed="at least one slice with a wanted and without an excluded class",
                fix="Check the classes held out and the cases chosen.",
            )
        return cls(kept)


def _read_case(
    case: Case,
    preprocessing: Preprocessing,
    names: Mapping[int, str] | None,
    holding: Collection[int] | None,
    without: Collection[int],
) -> CaseSlices | None:
    volume = read_volume(case.image)
    prepared = preprocessing.prepare(volume)
    keep = torch.ones(len(prepared), dtype=torch.bool)
    labels: Tensor | None = None
    if names is not None:
        assert case.label is not None
        label = read_label(case.label)
        check_labels(label, names, needed=False)
        labels = prepared.labels(label)
        labels = labels.to(torch.uint8 if int(labels.max()) < 256 else torch.int32)
        if holding is not None:
            keep &= _holds(labels, holding)
        keep &= ~_holds(labels, without)
    numbers = keep.nonzero().flatten().tolist()
    if not numbers:
        return None
    images = torch.empty(len(numbers), preprocessing.image_size, preprocessing.image_size).half()
    filled = 0
    for start in range(0, len(prepared), _CHUNK):
        stop = min(start + _CHUNK, len(prepared))
        wanted = keep[start:stop]
        if wanted.any():
            chunk = prepared.images(start, stop)[wanted, 0]
            images[filled : filled + len(chunk)] = chunk
            filled += len(chunk)
    threshold = foreground_threshold(images.numpy())
    return CaseSlices(
        case.id, numbers, images, labels[keep].clone() if labels is not None else None, threshold
    )


def _holds(labels: Tensor, wanted: Collection[int]) -> Tensor:
    """[n] bool: which slices hold at least one of these labels."""
    possible = [value for value in wanted if value <= torch.iinfo(labels.dtype).max]
    values = torch.tensor(possible, dtype=labels.dtype)
    return torch.isin(labels, values).flatten(1).any(dim=1)
