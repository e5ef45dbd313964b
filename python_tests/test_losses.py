# SPDX-License-Identifier: Apache-2.0
"""The three losses against slow ones in float64, and torch's cross entropy."""

from __future__ import annotations

import dataclasses
import types

import pytest
import torch
from support.slow_prototypes import slow_aggregates, slow_bags
from torch import Tensor
from torch.nn import functional as F

from fastproto.errors import ArgumentError
from fastproto.losses import (
    IGNORE,
    EpisodeLoss,
    alignment_loss,
    cycle_loss,
    predicted_prototypes,
    segmentation_loss,
)
from fastproto.nn import FewShotUNet, PrototypeNet

T = 0.2
SIZE = (32, 40)  # the width is padded to 48


@pytest.fixture(scope="module")
def shared_model() -> FewShotUNet:
    torch.manual_seed(0)
    return FewShotUNet("resnet18", temperature=T, backend="reference").double().eval()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(1)


@pytest.fixture
def model(shared_model: FewShotUNet) -> FewShotUNet:
    shared_model.zero_grad()
    return shared_model


def random_episode(classes: int = 2, number: int = 1, dtype=torch.float64):
    """Random images, ``number`` of each kind; labels are vertical stripes, one a class."""
    stripes = (torch.arange(SIZE[1]) * classes // SIZE[1]).expand(SIZE)
    return types.SimpleNamespace(
        support_images=torch.randn(number, number, 3, *SIZE, dtype=dtype),
        support_masks=stripes.expand(number, number, *SIZE),
        query_images=torch.randn(number, number, 3, *SIZE, dtype=dtype),
        query_masks=stripes.flip(1).expand(number, number, *SIZE),
        num_classes=classes,
    )


def slow_cross_entropy(logits: Tensor, target: Tensor, weights: list[float] | None) -> Tensor:
    weight = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    return F.cross_entropy(logits.flatten(0, 1), target.flatten(0, 1), weight, ignore_index=IGNORE)


def logits_of(prediction: Tensor, classes: int) -> Tensor:
    """Logits whose argmax is ``prediction``."""
    one_hot = F.one_hot(prediction, classes).movedim(-1, 2).double()
    return one_hot + torch.rand_like(one_hot) * 0.5


@pytest.mark.parametrize("weights", [None, [0.3, 1.0, 2.0]])
def test_segmentation_loss_is_the_weighted_mean_of_what_is_not_ignored(weights) -> None:
    logits = (torch.randn(2, 2, 3, 5, 4, dtype=torch.float64) * 3).requires_grad_()
    target = torch.randint(0, 3, (2, 2, 5, 4))
    target[0, 1, 2:] = IGNORE
    found, slow = (
        loss(logits, target, weights) for loss in (segmentation_loss, slow_cross_entropy)
    )
    torch.testing.assert_close(found, slow, rtol=1e-6, atol=0)
    grads = (torch.autograd.grad(loss, logits)[0] for loss in (found, slow))
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-9)
    as_tensor = None if weights is None else torch.tensor(weights)
    assert torch.equal(segmentation_loss(logits, target, as_tensor), found)


def test_nothing_to_count_is_zero() -> None:
    logits = torch.randn(1, 1, 2, 3, 3, requires_grad=True)
    loss = segmentation_loss(logits, torch.full((1, 1, 3, 3), IGNORE))
    assert loss == 0
    loss.backward()
    assert not logits.grad.any()
    assert segmentation_loss(logits, torch.zeros(1, 1, 3, 3).long(), [0.0, 1.0]) == 0


@pytest.mark.parametrize("weights", [None, [0.2, 1.0, 3.0]])
@pytest.mark.parametrize("absent", [False, True])
@pytest.mark.parametrize("ignoring", [False, True])
@torch.no_grad()
def test_alignment_and_cycle_equal_the_slow_ones(model, weights, absent, ignoring) -> None:
    episode = random_episode(3, 2)
    ignored = torch.zeros(2, 2, *SIZE, dtype=torch.bool)
    if ignoring:
        ignored[0, 1, 8:] = ignored[1, 0, :, :16] = True
        episode.support_masks = episode.support_masks.masked_fill(ignored.flip(0), IGNORE)
    # Patches of 8 pixels: cells with one class, with several, and classes without any full cell.
    patches = torch.randint(0, 2 if absent else 3, (2, 2, SIZE[0] // 8, SIZE[1] // 8))
    prediction = patches.repeat_interleave(8, 2).repeat_interleave(8, 3)
    support, query = model.encode_episode(episode.support_images, episode.query_images)
    protos = predicted_prototypes(model, query, logits_of(prediction, 3), ignored)
    bags = slow_bags(query.bottleneck, prediction.masked_fill(ignored, IGNORE), 3, cell=16)
    assert protos.counts() == [[len(bag) for bag in row] for row in bags]
    assert [not len(row[2]) for row in bags] == [absent, absent]

    *skips, feat = (level.flatten(0, 1) for level in support.maps)
    aggregates, scores = slow_aggregates(support.bottleneck, bags, T)
    aligned = F.interpolate(scores.flatten(0, 1), scale_factor=16.0, mode="bilinear")
    decoded = model.decoder(feat, aggregates.flatten(0, 1) * feat.unsqueeze(1), skips)
    target = episode.support_masks.clone()
    if absent:
        target[target == 2] = IGNORE
    for loss, logits in ((alignment_loss, aligned), (cycle_loss, decoded)):
        found = loss(model, support, episode.support_masks, protos, weights)
        cut = logits.unflatten(0, (2, 2))[..., : SIZE[0], : SIZE[1]]
        slow = slow_cross_entropy(cut, target, weights)
        torch.testing.assert_close(found, slow, rtol=1e-6, atol=0)


@pytest.mark.parametrize("loss", [alignment_loss, cycle_loss])
def test_prediction_without_the_supports_classes(model: FewShotUNet, loss: object) -> None:
    """The query is predicted as class 2 alone, the support shows 0 and 1: nothing to compare."""
    episode = random_episode()
    support, query = model.encode_episode(episode.support_images, episode.query_images)
    prediction = torch.full((1, 1, *SIZE), 2)
    protos = predicted_prototypes(model, query, logits_of(prediction, 3))
    value = loss(model, support, episode.support_masks, protos)
    assert value == 0
    value.backward()
    grads = [p.grad for p in model.encoder.parameters() if p.grad is not None]
    assert grads
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("loss", [alignment_loss, cycle_loss])
def test_gradient_reaches_both_images_but_not_through_the_prediction(model, loss) -> None:
    episode = random_episode()
    images = episode.support_images.requires_grad_(), episode.query_images.requires_grad_()
    support, query = model.encode_episode(*images)
    logits = logits_of(episode.query_masks, 2).requires_grad_()
    protos = predicted_prototypes(model, query, logits)
    value = loss(model, support, episode.support_masks, protos)
    *grads, through = torch.autograd.grad(value, (*images, logits), allow_unused=True)
    assert all(grad.any() for grad in grads)
    assert through is None


def test_episode_loss_adds_up(model: FewShotUNet) -> None:
    episode = random_episode(2, 2)
    weights, masks = [0.5, 1.0], episode.support_masks
    total, parts, logits = EpisodeLoss(0.5, 2.0, 3.0, weights)(model, episode)
    expected = model(episode.support_images, masks, episode.query_images, num_classes=2)
    torch.testing.assert_close(logits, expected)
    support, query = model.encode_episode(episode.support_images, episode.query_images)
    turned = model, support, masks, predicted_prototypes(model, query, expected), weights
    single = {
        "ce": segmentation_loss(expected, episode.query_masks, weights),
        "align": alignment_loss(*turned),
        "cycle": cycle_loss(*turned),
    }
    torch.testing.assert_close(parts, {name: loss.detach() for name, loss in single.items()})
    adds_up = 0.5 * parts["ce"] + 2 * parts["align"] + 3 * parts["cycle"]
    torch.testing.assert_close(total.detach(), adds_up)
    assert total.requires_grad
    assert not any(part.requires_grad for part in parts.values())


def test_ignored_pixels_count_in_no_loss(model: FewShotUNet) -> None:
    """Neither those of the support, which give no prototype, nor those of the query."""
    episode = random_episode(2, 2)
    ignored = torch.zeros(2, 2, *SIZE, dtype=torch.bool)
    ignored[:, :, 16:] = True
    masked = types.SimpleNamespace(**vars(episode))
    masked.support_masks = episode.support_masks.masked_fill(ignored, IGNORE)
    masked.query_masks = episode.query_masks.masked_fill(ignored, IGNORE)
    total, parts, logits = EpisodeLoss()(model, masked)
    support, query = model.encode_episode(episode.support_images, episode.query_images)
    halves = episode.support_masks[..., :16, :]
    cut = dataclasses.replace(
        support, maps=tuple(level[..., : level.shape[-2] // 2, :] for level in support.maps),
        size=(16, SIZE[1]),
    )  # fmt: skip
    expected = model.decode(query, model.extract(cut, halves))
    torch.testing.assert_close(logits, expected)
    ce = slow_cross_entropy(expected, masked.query_masks, None)
    torch.testing.assert_close(parts["ce"], ce.detach())
    turned = model, support, masked.support_masks
    turned = *turned, predicted_prototypes(model, query, expected, ignored)
    torch.testing.assert_close(parts["align"], alignment_loss(*turned).detach())
    torch.testing.assert_close(parts["cycle"], cycle_loss(*turned).detach())
    (gradient,) = torch.autograd.grad(total, logits)
    assert gradient[..., :16, :].any()
    assert not gradient[..., 16:, :].any()
    masked.support_masks = masked.support_masks.masked_fill(masked.support_masks == 0, -1)
    with pytest.raises(ArgumentError, match=r"labels -1\.\.1"):
        EpisodeLoss()(model, masked)


@pytest.mark.parametrize("alone", ["ce", "align", "cycle"])
def test_each_loss_alone_trains(model: FewShotUNet, alone: str) -> None:
    episode = random_episode()
    together = EpisodeLoss()(model, episode)[1]
    weights = {"ce": 0.0, "align": 0.0, "cycle": 0.0, alone: 2.0}
    total, parts, _ = EpisodeLoss(**weights)(model, episode)
    assert float(total.detach()) == pytest.approx(2 * float(parts[alone]))
    assert parts == {**dict.fromkeys(weights, 0), alone: together[alone]}
    total.backward()
    # A prediction of one class alone leaves the other losses nothing to compare.
    assert model.encoder.conv1.weight.grad is not None
    if parts[alone] > 0:
        assert model.encoder.conv1.weight.grad.any()
    assert (model.decoder.head.weight.grad is None) == (alone == "align")


def test_the_baseline_trains_too() -> None:
    torch.manual_seed(0)
    baseline = PrototypeNet("resnet18", 8).train()
    total, parts, _ = EpisodeLoss(cycle=0.0)(baseline, random_episode(dtype=torch.float32))
    total.backward()
    assert parts["ce"] > 0
    assert all(p.grad is not None for p in baseline.parameters())


def test_a_few_steps_learn() -> None:
    torch.manual_seed(0)
    network = FewShotUNet("resnet18").train()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    episode = random_episode(dtype=torch.float32)
    for kind in ("support", "query"):
        shown = getattr(episode, f"{kind}_masks").unsqueeze(2).float()
        setattr(episode, f"{kind}_images", getattr(episode, f"{kind}_images") * 0.1 + shown)
    losses = []
    for _ in range(12):
        total, parts, _ = EpisodeLoss()(network, episode)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(float(parts["ce"]))
    assert losses[-1] < 0.3 * losses[0]


def test_bad_arguments(model: FewShotUNet) -> None:
    logits, target = torch.zeros(1, 1, 2, 3, 3), torch.zeros(1, 1, 3, 3, dtype=torch.long)
    episode = random_episode()
    episode.query_masks = episode.query_masks + 1
    for call, *arguments, subject in (
        (segmentation_loss, logits[0], target, "target"),
        (segmentation_loss, logits, target[..., :2], "target"),
        (segmentation_loss, logits, target, [1.0, 1.0, 1.0], "class_weights"),
        (EpisodeLoss, -1.0, 1.0, 1.0, "loss weights"),
        (EpisodeLoss, 0.0, 0.0, 0.0, "loss weights"),
        (EpisodeLoss(), model, episode, "query_masks"),
    ):
        with pytest.raises(ArgumentError) as caught:
            call(*arguments)
        assert caught.value.subject == subject
