# SPDX-License-Identifier: Apache-2.0
"""Prototypes: what a support teaches, as bags of feature vectors, one bag per episode and class."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastproto import defaults
from fastproto.errors import ArgumentError, CheckpointError, require
from fastproto.nn.weights import read_safetensors, write_safetensors
from fastproto.op.reference import normalize

_KIND = "prototypes"


@dataclasses.dataclass(frozen=True)
class Prototypes:
    """Packed bags of prototypes, in the order (episode, class).

    Rows of ``protos`` past ``offsets[-1]`` are unused capacity: the number of prototypes depends on
    the masks, and not asking the device for it keeps the host free. :meth:`trim` drops them.

    Args:
        protos: ``[N_total, D]``.
        offsets: ``[E*K + 1]`` int32, where each bag starts, on the device of ``protos``.
        num_classes: K, the background included.

    Raises:
        ArgumentError: The three do not fit together.
    """

    protos: Tensor
    offsets: Tensor
    num_classes: int

    def __post_init__(self) -> None:
        fits = self.protos.ndim == 2 and self.protos.is_floating_point()
        check_tensor(fits, "protos", self.protos, "floating point [N_total, D]")
        fits = self.offsets.ndim == 1 and self.offsets.dtype == torch.int32
        check_tensor(fits, "offsets", self.offsets, "int32 [E*K + 1]")
        check_num_classes(self.num_classes)
        bags = self.offsets.shape[0] - 1
        if bags < 1 or bags % self.num_classes:
            allowed = f"a multiple of num_classes = {self.num_classes}, at least one"
            raise ArgumentError("offsets", found=f"{bags} bags", allowed=allowed)

    @property
    def episodes(self) -> int:
        """E."""
        return (self.offsets.shape[0] - 1) // self.num_classes

    @property
    def dim(self) -> int:
        """D, the channels of a prototype."""
        return self.protos.shape[1]

    def present(self) -> Tensor:
        """``[E, K]`` bool, on the device: which classes have a prototype."""
        return (self.offsets.diff() > 0).view(self.episodes, self.num_classes)

    def counts(self) -> list[list[int]]:
        """Prototypes of each class, ``[E][K]``; waits for the device."""
        return self.offsets.diff().view(self.episodes, self.num_classes).tolist()

    def pick(self, groups: Sequence[Sequence[Sequence[int]]]) -> Prototypes:
        """Bags joined from those of several episodes; waits for the device.

        Class k of the new episode e has the prototypes that class k has in ``groups[e][k]``.
        """
        offsets = self.offsets.tolist()
        rows: list[int] = []
        ends = [0]
        for episode in groups:
            for way, members in enumerate(episode):
                for member in members:
                    bag = member * self.num_classes + way
                    rows += range(offsets[bag], offsets[bag + 1])
                ends.append(len(rows))
        index = torch.tensor(rows, dtype=torch.long, device=self.protos.device)
        return Prototypes(self.protos[index], self.offsets.new_tensor(ends), self.num_classes)

    def trim(self) -> Prototypes:
        """Without unused capacity; waits for the device."""
        used = int(self.offsets[-1])
        return dataclasses.replace(self, protos=self.protos[:used].clone())

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Prototypes:
        """On another device or in another floating dtype (the offsets stay int32)."""
        protos, offsets = self.protos.to(device, dtype), self.offsets.to(device)
        return Prototypes(protos, offsets, self.num_classes)

    def save(self, path: str | os.PathLike[str], extra: Mapping[str, Any] | None = None) -> None:
        """Write the trimmed prototypes and a JSON-able ``extra`` as safetensors, atomically.

        Raises:
            ArgumentError: ``extra`` cannot be written as JSON.
            OutputError: The file cannot be written.
        """
        tensors = {"protos": self.trim().protos, "offsets": self.offsets}
        header = {"kind": _KIND, "num_classes": self.num_classes, "extra": dict(extra or {})}
        write_safetensors(path, tensors, header)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> tuple[Prototypes, dict[str, Any]]:
        """Read what :meth:`save` wrote: the prototypes, on the CPU, and ``extra``.

        Raises:
            CheckpointError: The file is missing, damaged or holds something else.
        """
        tensors, header = read_safetensors(path)
        kind, allowed = header.get("kind"), "a file that Prototypes.save wrote"
        fits = kind == _KIND and set(tensors) == {"protos", "offsets"}
        found = f"a file of kind {kind!r}"
        require(fits, path, found=found, allowed=allowed, error=CheckpointError)
        try:
            prototypes = cls(tensors["protos"], tensors["offsets"], header["num_classes"])
        except (ArgumentError, KeyError) as error:
            found = f"unusable prototypes ({error})"
            raise CheckpointError(path, found=found, allowed=allowed) from error
        bounds = prototypes.offsets.tolist()
        fits = bounds[0] == 0 and sorted(bounds) == bounds and bounds[-1] == len(prototypes.protos)
        found = "offsets that do not fit the prototypes"
        require(fits, path, found=found, allowed=allowed, error=CheckpointError)
        return prototypes, header.get("extra", {})


def class_masks(labels: Tensor, num_classes: int) -> Tensor:
    """One mask per class, ``[E, S, H, W]`` integers -> ``[E, S, K, H, W]`` float32 of 0 and 1.

    A pixel with any other label belongs to no class.
    """
    classes = torch.arange(num_classes, device=labels.device)
    return (labels.unsqueeze(2) == classes[:, None, None]).float()


def extract_prototypes(
    features: Tensor,  # [E, S, D, h, w]
    masks: Tensor,  # [E, S, K, H, W]
    *,
    threshold: float = defaults.MASK_THRESHOLD,
    append_global: bool = False,
) -> Prototypes:
    """Prototypes of every class: the features of the cells that the class fills.

    ``AvgPool(mask, H/h) > threshold`` picks the cells, over all shots of an episode. A class whose
    mask is not empty but leaves no cell gets one prototype, the mask-weighted average of the
    features; a class with an empty mask gets an empty bag.

    Nothing is asked of the device, so this can be captured in a CUDA graph and compiled without
    graph breaks. The price is capacity: E*K*(S*h*w+1) rows, most of them unused.

    Args:
        features: F of the support, floating point.
        masks: One mask per class, values in [0, 1]; H and W the same multiple of h and w.
        threshold: tau, in [0, 1).
        append_global: Append the average to every bag that is not empty.

    Raises:
        ArgumentError: Shapes or devices that do not fit, or a threshold outside [0, 1).
    """
    fits = features.ndim == 5 and features.is_floating_point()
    check_tensor(fits, "features", features, "floating point [E, S, D, h, w]")
    episodes, shots, _, height, width = features.shape
    cell = masks.shape[-1] // width
    fits = masks.ndim == 5 and masks.shape[-2:] == (height * cell, width * cell) and cell >= 1
    check_tensor(
        fits and masks.shape[:2] == (episodes, shots) and masks.is_floating_point(),
        "masks",
        masks,
        lambda: (
            f"floating point [{episodes}, {shots}, K, n*{height}, n*{width}] with an integer "
            "n, to fit the features"
        ),
        fix="Pad the masks with zeros.",
    )
    found, allowed = f"device {masks.device}", f"{features.device}, as the features"
    require(masks.device == features.device, "masks", found=found, allowed=allowed)
    check_threshold(threshold)

    share = F.avg_pool2d(masks.flatten(0, 1), cell).unflatten(0, (episodes, shots))
    share = share.transpose(1, 2).flatten(2)  # [E, K, S*h*w]
    _, classes, cells = share.shape
    picked = share > threshold
    mass = share.sum(dim=2, keepdim=True)  # [E, K, 1]
    wanted = mass > 0 if append_global else (mass > 0) & ~picked.any(dim=2, keepdim=True)
    keep = torch.cat([picked, wanted], dim=2)  # [E, K, S*h*w + 1]

    rows = features.transpose(2, 3).transpose(3, 4).flatten(1, 3)  # [E, S*h*w, D]
    weights = share / mass.clamp(min=torch.finfo(share.dtype).tiny)
    averages = weights.to(rows.dtype) @ rows  # [E, K, D]
    table = torch.cat([rows.flatten(0, 1), averages.flatten(0, 1).to(rows.dtype)])

    row = torch.arange(len(table), device=features.device)
    row_of_cell = row[: episodes * cells].view(episodes, 1, cells).expand(-1, classes, -1)
    row_of_average = row[episodes * cells :].view(episodes, classes, 1)
    candidates = torch.cat([row_of_cell, row_of_average], dim=2).flatten()
    # Kept candidates first, in their order: the packed bags, then the unused capacity.
    unused, order = keep.logical_not().flatten().to(torch.uint8).sort(stable=True)
    protos = table[candidates[order]].masked_fill(unused.bool().unsqueeze(1), 0.0)

    ends = keep.sum(dim=2).flatten().cumsum(0).to(torch.int32)
    return Prototypes(protos, F.pad(ends, (1, 0)), classes)


def prototype_scores(feat: Tensor, prototypes: Prototypes, *, temperature: float) -> Tensor:
    """Similarity of every feature to each class, without a decoder.

    ``cos(F - mean(F), G - mean(G)) / t`` ``[E, Q, K, h, w]`` of features F ``[E, Q, D, h, w]``,
    with G the prototype that ``proto_attention`` aggregates for the feature; a class without
    prototypes scores -1/t, the lowest value possible. Scores are at least in float32: the division
    by t, above 0, magnifies rounding.

    Raises:
        ArgumentError: The prototypes do not fit the features, or t is not above 0.
    """
    check_temperature(temperature)
    check_prototypes(feat, prototypes)
    eps = defaults.EPS
    dtype = torch.promote_types(feat.dtype, torch.float32)
    with torch.autocast(feat.device.type, enabled=False):
        query = normalize(feat.to(dtype).flatten(3).transpose(2, 3), eps)  # [E, Q, HW, D]
        protos = prototypes.protos.to(dtype)
        logits = query @ normalize(protos, eps).transpose(0, 1) / temperature  # [E, Q, HW, N_total]
        row = torch.arange(protos.shape[0], device=protos.device)
        starts = prototypes.offsets[:-1].view(prototypes.episodes, prototypes.num_classes, 1)
        ends = prototypes.offsets[1:].view_as(starts)
        member = (row >= starts) & (row < ends)  # [E, K, N_total]
        scores = []
        for way in range(prototypes.num_classes):
            outside = member[:, way].logical_not()[:, None, None]  # [E, 1, 1, N_total]
            # A finite stand-in for -inf, which an empty bag's softmax would turn into NaN.
            weights = logits.masked_fill(outside, torch.finfo(dtype).min).softmax(dim=3)
            agg = normalize(weights @ protos, eps)
            empty = outside.all(dim=3)  # [E, 1, 1]
            scores.append((query * agg).sum(dim=3).masked_fill(empty, -1.0) / temperature)
    return torch.stack(scores, dim=2).unflatten(3, feat.shape[-2:])


def check_tensor(
    fits: bool, name: str, tensor: Tensor, allowed: str | Callable[[], str], fix: str | None = None
) -> None:
    """Raise ArgumentError with the type and shape of ``tensor`` unless it ``fits``.

    ``allowed`` is a function where it has a size in it: torch.compile fixes what is made a text.
    """
    if not fits:
        found = f"{tensor.dtype} of shape {list(tensor.shape)}"
        allowed = allowed if isinstance(allowed, str) else allowed()
        raise ArgumentError(name, found=found, allowed=allowed, fix=fix)


def check_num_classes(num_classes: int) -> None:
    """Raise ArgumentError unless K is an integer of at least 2."""
    fits = isinstance(num_classes, int) and not isinstance(num_classes, bool) and num_classes >= 2
    allowed = "an integer of at least 2"
    require(fits, "num_classes", found=lambda: repr(num_classes), allowed=allowed)


def check_temperature(temperature: float) -> None:
    """Raise ArgumentError unless t is a finite number above 0."""
    fits = 0 < temperature < math.inf
    require(fits, "temperature", found=lambda: repr(temperature), allowed="a number above 0")


def check_threshold(threshold: float) -> None:
    """Raise ArgumentError unless tau lies in [0, 1)."""
    fits = 0 <= threshold < 1
    require(fits, "mask_threshold", found=lambda: repr(threshold), allowed="0 <= threshold < 1")


def check_prototypes(feat: Tensor, prototypes: Prototypes) -> None:
    """Raise ArgumentError unless the prototypes fit features ``[E, Q, D, h, w]``."""
    episodes, _, dim, *_ = feat.shape
    if prototypes.episodes != episodes:
        found, allowed = f"{prototypes.episodes} episodes", f"{episodes}, as many as the query has"
        raise ArgumentError("prototypes", found=found, allowed=allowed)
    if prototypes.dim != dim:
        found, allowed = f"D = {prototypes.dim}", f"{dim}, the channels of the features"
        fix = "They were extracted by another network: encode the support with this one."
        raise ArgumentError("prototypes", found=found, allowed=allowed, fix=fix)
    device = prototypes.protos.device
    found, allowed = f"device {device}", f"{feat.device}, where the query is"
    fix = "Move them with prototypes.to(device)."
    require(device == feat.device, "prototypes", found=found, allowed=allowed, fix=fix)
