# SPDX-License-Identifier: Apache-2.0
"""The methods that cross-validation compares, behind one small interface.

A method learns from an `Example`; what it made of it, `segment`s scans: variant -> label map
``[Z, Y, X]`` on the scan's grid, perhaps several at once, as what they share is computed once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import nn

from fastproto.data.preprocessing import PreparedVolume, canonical
from fastproto.data.volume import Volume
from fastproto.defaults import IGNORE, PLANE
from fastproto.evaluation.protocol import SliceSegmenter
from fastproto.evaluation.settings import MethodOptions
from fastproto.nn import PrototypeNet
from fastproto.nn.base import FewShotModel
from fastproto.segmentation.adapt import AnnotatedOrgan, adapt_model
from fastproto.segmentation.learn import annotate, model_preprocessing, register, without_gaps
from fastproto.segmentation.predict import BATCH, FUSIONS, decide, expected_view, gather
from fastproto.segmentation.prior import KINDS, Atlas, Prior, locate


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """An annotated scan, and where its organs are expected in the scan looked at last.

    Attributes:
        image, label: The scan and its label map.
        organs: Label value -> name of the organs to learn, all of which it shows.
        modality: "ct" or "mr".
        plane: Of the slices.
        ignore: A label value whose voxels count nowhere.
    """

    image: Volume
    label: Volume
    organs: dict[int, str]
    modality: str
    plane: str = PLANE
    ignore: int | None = None
    _located: list[tuple[Volume, dict[str, Prior]]] = dataclasses.field(default_factory=list)

    @cached_property
    def atlas(self) -> Atlas:
        """One that serves every kind of prior."""
        values = sorted(self.organs)
        whole = without_gaps(self.label, self.ignore)
        return Atlas.make(self.image, whole, values, self.modality, KINDS[-1], plane=self.plane)

    def locate(self, scan: Volume, kind: str) -> Prior:
        """As `fastproto.segmentation.prior.locate`, once for each kind and scan."""
        if not self._located or self._located[0][0] is not scan:
            self._located[:] = [(scan, {})]
        known = self._located[0][1]
        if kind not in known:
            known[kind] = locate(self.atlas, scan, kind)
        return known[kind]

    def masks(self, label: Volume, organ: int) -> np.ndarray:
        """``[n, h, w]`` bool, a value in the slices of a label map."""
        return canonical(label, self.plane).array == organ


@dataclasses.dataclass(frozen=True)
class Registration:
    """The annotated organs carried over: the prior alone, of each kind."""

    example: Example

    def segment(self, scan: Volume) -> dict[str, np.ndarray]:
        """The variants are the kinds of prior."""
        return {kind: self.example.locate(scan, kind).label_map() for kind in KINDS}


class LearnedNetwork:
    """The organs of an example, registered with a network.

    Args:
        model: That says in its metadata how to preprocess.
        example: To learn from.
        options: Of the methods. The field of view of the organ in EP1 and EP2 is larger than it
            and lies where the boxes of the two bodies say.
        adapt: Steps of adaptation to the annotated scan, for whole volumes; see `register`.
    """

    def __init__(
        self,
        model: FewShotModel,
        example: Example,
        options: MethodOptions,
        adapt: int | Literal["auto"] = 0,
    ):
        self.model = model
        self.example = example
        self.options = options
        self.task = register(
            model,
            example.image,
            example.label,
            labels=example.organs,
            classes=list(example.organs),
            ignore=example.ignore,
            slices=options.slices,
            preprocessing=model_preprocessing(model, example.modality),
            prior=options.prior,
            adapt=adapt,
            force=True,  # the data set says the modality
        )
        self.network = self.task.ready(model)

    def segment(self, scan: Volume) -> dict[str, np.ndarray]:
        """The network alone looks where it would with the prior, no further."""
        prior = self.example.locate(scan, self.options.prior)
        prepared = self.task.preprocessing.prepare(scan)
        found = gather(self.network, self.task, prepared, prior)
        fusion = FUSIONS[prior.kind]
        alone = dataclasses.replace(fusion, network=1.0, prior=0.0)
        return {
            name: decide(self.task, scan, prepared, prior, found, variant).labels
            for name, variant in {"network + prior": fusion, "network": alone}.items()
        }

    def slice_segmenter(self, scan: Volume, organ: int) -> SliceSegmenter:
        """For EP1 and EP2 of one label value: no prior, no adaptation, one slice as example."""
        support_view, query_view = self._view(self.example.image, organ), self._view(scan, organ)
        labels = support_view.labels(self.example.label)
        masks = (labels == organ).long()
        if self.example.ignore is not None:
            masks[labels == self.example.ignore] = IGNORE
        device = next(self.model.parameters()).device

        @torch.inference_mode()
        def segment(support: int, numbers: Sequence[int]) -> np.ndarray:
            image = _images(support_view, [support]).to(device)
            prototypes = self.model.encode_support(image, masks[None, [support]].to(device))
            found = []
            for start in range(0, len(numbers), BATCH):
                batch = numbers[start : start + BATCH]
                logits = self.model.segment(_images(query_view, batch).to(device), prototypes)[0]
                odds = (logits[:, 1:] - logits[:, :1]).float().cpu()
                for index, number in enumerate(batch):
                    restored = query_view.restore(odds[[index]], number, number + 1)
                    found.append(restored[0, 0] > 0)
            return np.stack(found)

        return segment

    def _view(self, scan: Volume, organ: int) -> PreparedVolume:
        """The scan in the field of view of EP1 and EP2, found without its labels."""
        prepared = self.task.preprocessing.prepare(scan)
        if self.options.view == "body":
            return prepared
        index = list(self.task.labels).index(organ)
        place = locate(self.task.atlas, scan, "box").only(index)
        return prepared.at(expected_view(self.task.organs[index], place))


Learned: TypeAlias = Registration | LearnedNetwork


def trained_on(model: FewShotModel, example: Example, steps: int, slices: int) -> FewShotModel:
    """A network built and fed like ``model``, trained from scratch on the annotated scan alone."""
    device = next(model.parameters()).device
    prepared = model_preprocessing(model, example.modality).prepare(example.image)
    organs = [
        annotate(prepared, example.label, value, name, slices, example.ignore)
        for value, name in sorted(example.organs.items())
    ]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        fresh = type(model)(**model.config).to(device)
    _set_statistics(fresh, organs)
    trained, _ = adapt_model(fresh, organs, steps, parts="all")
    trained.extra = model.extra
    return trained


@torch.no_grad()
def _set_statistics(model: FewShotModel, organs: Sequence[AnnotatedOrgan]) -> None:
    """Take the normalisation's statistics from the scan, as `adapt_model` leaves them alone."""
    device = next(model.parameters()).device
    layers = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    momentum = [layer.momentum for layer in layers]
    model.train()
    for count, organ in enumerate(organs, 1):
        for layer in layers:
            layer.momentum = 1 / count  # a plain mean over the organs
        numbers = organ.inside[:BATCH]
        images = _images(organ.view, numbers).to(device)
        model(images, organ.labels(numbers)[None].long().to(device), images)
    for layer, before in zip(layers, momentum, strict=True):
        layer.momentum = before
    model.eval()


def _images(view: PreparedVolume, numbers: Sequence[int]) -> torch.Tensor:
    """Slices as one episode ``[1, n, 3, S, S]``."""
    return view.some_images(numbers).expand(-1, 3, -1, -1)[None]


def make_method(
    name: str, model: FewShotModel | None, **options: Any
) -> Callable[[Example], Learned]:
    """A method of ``METHODS``, which learns from an example; ``options`` of `MethodOptions`."""
    if name == "registration":
        return Registration
    assert model is not None
    chosen = MethodOptions(**options)
    if name == "one-scan":
        steps, slices = chosen.one_scan_steps, chosen.slices
        return lambda example: LearnedNetwork(
            trained_on(model, example, steps, slices), example, chosen
        )
    network = model
    if name == "prototypes":
        network = PrototypeNet.from_unet(model).eval()
        network.extra = model.extra
    adapt = chosen.adapt_steps if name == "adapted" else 0
    return lambda example: LearnedNetwork(network, example, chosen, adapt)
