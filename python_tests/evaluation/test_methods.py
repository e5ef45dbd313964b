# SPDX-License-Identifier: Apache-2.0
"""The methods that are compared: what they give, and what they may know."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from torch import Tensor, nn

from fastproto.data import Preprocessing, Volume
from fastproto.evaluation import methods
from fastproto.evaluation.methods import Example, LearnedNetwork, make_method, trained_on
from fastproto.evaluation.metrics import dice
from fastproto.evaluation.settings import VIEWS, MethodOptions
from fastproto.nn import PrototypeNet
from fastproto.nn.base import FewShotModel
from fastproto.segmentation import load_model
from fastproto.segmentation.prior import KINDS

from .conftest import ORGANS, make_patient


@pytest.fixture
def example() -> Example:
    return Example(*make_patient(0), ORGANS, "ct")


@pytest.fixture
def model(model_file: Path) -> FewShotModel:
    return load_model(model_file)


class GreyModel(nn.Module):
    """A pixel belongs to the organ where its grey value is that of the organ in the example."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.examples: list[Tensor] = []

    def encode_support(self, images: Tensor, masks: Tensor) -> Tensor:
        self.examples.append(masks[0])
        return images[:, :, 0][masks == 1].median()

    def segment(self, images: Tensor, grey: Tensor) -> Tensor:
        near = 0.5 - (images[:, :, 0] - grey).abs()
        return torch.stack([torch.zeros_like(near), near], dim=2)


@pytest.mark.parametrize("axes", ["LPS", "RAI", "PSR"])
def test_slices_are_segmented_from_one_slice_in_any_orientation(example, axes):
    def turned(volume: Volume) -> Volume:
        image = sitk.GetImageFromArray(volume.array)
        image.SetSpacing(volume.spacing)
        image = sitk.DICOMOrient(image, axes)
        grid = (image.GetSpacing(), image.GetOrigin(), image.GetDirection())
        return Volume(sitk.GetArrayFromImage(image), *grid)

    learned = object.__new__(LearnedNetwork)  # without registering: EP1 needs no task but for this
    learned.model, learned.example = GreyModel(), example
    learned.options = MethodOptions(view="body")
    preprocessing = Preprocessing("ct", 64, mean=0.0, std=100.0, crop=False)
    learned.task = SimpleNamespace(preprocessing=preprocessing)
    scan, truth = map(turned, make_patient(1))
    segment, masks = learned.slice_segmenter(scan, 3), example.masks(truth, 3)
    for support in (5, 6, 8):
        found = segment(support, [3, 5, 8, 9])
        assert found.dtype == bool
        assert dice(found, masks[[3, 5, 8, 9]]) > 0.9
    # The slices given are all that EP1 knows.
    assert [given.shape for given in learned.model.examples] == [(1, 64, 64)] * 3
    assert all(given.any() for given in learned.model.examples)


def test_ep1_sees_the_organ_or_the_body_and_no_label(example, model):
    scan, _ = make_patient(1)
    sides = {}
    for view in VIEWS:
        learned = LearnedNetwork(model, example, MethodOptions(view=view, slices=2))
        sides[view] = learned._view(scan, 2).view.side
        found = learned.slice_segmenter(scan, 2)(5, [4, 5])
        assert found.shape == (2, 24, 28)
    assert sides["organ"] < sides["body"]


def test_registration_carries_the_organs_over_by_every_kind(example):
    scan, truth = make_patient(2)
    found = make_method("registration", None)(example).segment(scan)
    assert list(found) == list(KINDS)
    for labels in found.values():
        assert labels.shape == scan.array.shape
        assert set(np.unique(labels)) == {0, 1, 2, 3}
        assert dice(labels == 1, truth.array == 1) > 0.6
    onto_itself = make_method("registration", None)(example).segment(example.image)
    assert dice(onto_itself["box"] == 2, example.label.array == 2) > 0.95


def test_network_and_prior_share_the_networks_evidence_and_the_prior(example, model, monkeypatch):
    calls: list[str] = []

    gather, locate = methods.gather, methods.locate
    monkeypatch.setattr(methods, "gather", lambda *args: calls.append("gather") or gather(*args))
    monkeypatch.setattr(methods, "locate", lambda *args: calls.append(args[2]) or locate(*args))
    scan, _ = make_patient(1)
    found = make_method("fastproto", model, slices=2)(example).segment(scan)
    assert list(found) == ["network + prior", "network"]
    assert not np.array_equal(*found.values())
    make_method("registration", model)(example).segment(scan)
    assert sorted(calls) == sorted([*KINDS, "gather"])  # a prior is found once for each scan
    make_method("registration", model)(example).segment(make_patient(2)[0])
    assert len(calls) == 2 * len(KINDS) + 1


def test_prototypes_are_the_same_encoder_without_a_decoder(example, model):
    learned = make_method("prototypes", model, slices=2, prior="box")(example)
    assert isinstance(learned.model, PrototypeNet)
    assert learned.model.encoder is model.encoder
    scan, _ = make_patient(1)
    assert list(learned.segment(scan)) == ["network + prior", "network"]
    assert learned.slice_segmenter(scan, 1)(3, [2, 3, 4]).shape == (3, 24, 28)


def test_one_scan_trains_all_of_a_fresh_network(example, model):
    before = model.fingerprint()
    trained = trained_on(model, example, steps=1, slices=2)
    assert model.fingerprint() == before
    assert trained.config == model.config
    names = [name for name, parameter in trained.named_parameters() if parameter.ndim > 1]
    for name in names:
        assert not torch.equal(trained.state_dict()[name], model.state_dict()[name])
    assert trained.encoder.bn1.running_mean.abs().max() > 0
    assert trained.encoder.bn1.momentum == model.encoder.bn1.momentum
    again = trained_on(model, example, steps=1, slices=2)
    assert again.fingerprint() == trained.fingerprint()


def test_adaptation_is_for_whole_volumes_alone(example, model, monkeypatch):
    seen = {}

    def register(network, *args, adapt, **options):
        seen["steps"] = adapt
        weights = {"decoder.head.bias": torch.ones(1)}
        return SimpleNamespace(ready=lambda _: "adapted", weights=weights)

    monkeypatch.setattr(methods, "register", register)
    learned = make_method("adapted", model, adapt_steps=7)(example)
    assert seen == {"steps": 7}
    assert learned.network == "adapted"
    assert learned.model is model  # which EP1 uses
    make_method("fastproto", model, adapt_steps=7)(example)
    assert seen == {"steps": 0}


def test_masks_follow_the_plane(example):
    coronal = dataclasses.replace(example, plane="coronal")
    assert example.masks(example.label, 1).shape == (10, 24, 28)
    assert coronal.masks(example.label, 1).shape == (24, 10, 28)
