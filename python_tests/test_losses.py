# SPDX-License-Identifier: Apache-2.0
"""The three losses against loops over pixels and prototypes in float64."""

from __future__ import annotations

import math
import types

import pytest
import torch
from torch import Tensor

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
CELL = 16
SIZE = (32, 40)  # the width is padded to 48


@pytest.fixture(scope="module")
def model() -> FewShotUNet:
    torch.manual_seed(0)
    return FewShotUNet("resnet18", temperature=T, backend="reference").double().eval()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(1)


def random_episode(
    classes: int = 2, *, episodes: int = 1, shots: int = 1, queries: int = 1
) -> types.SimpleNamespace:
    """Random images in float64; labels are vertical stripes, one a class."""
    stripes = (torch.arange(SIZE[1]) * classes // SIZE[1]).expand(SIZE)
    return types.SimpleNamespace(
        support_images=torch.randn(episodes, shots, 3, *SIZE, dtype=torch.float64),
        support_masks=stripes.expand(episodes, shots, *SIZE),
        query_images=torch.randn(episodes, queries, 3, *SIZE, dtype=torch.float64),
        query_masks=stripes.flip(1).expand(episodes, queries, *SIZE),
        num_classes=classes,
    )


# --- the slow computation ------------------------------------------------------------------------


def slow_cross_entropy(logits: Tensor, target: Tensor, weights: list[float]) -> float:
    """Weighted mean of -log softmax over the pixels that are not ignored, one by one."""
    episodes, images, classes, height, width = logits.shape
    total = mass = 0.0
    for e in range(episodes):
        for i in range(images):
            for y in range(height):
                for x in range(width):
                    label = int(target[e, i, y, x])
                    if label == IGNORE:
                        continue
                    values = [float(logits[e, i, k, y, x]) for k in range(classes)]
                    top = max(values)
                    log_sum = top + math.log(sum(math.exp(v - top) for v in values))
                    total += weights[label] * (log_sum - values[label])
                    mass += weights[label]
    return total / mass if mass else 0.0


def slow_bags(features: Tensor, prediction: Tensor, classes: int) -> list[list[list[Tensor]]]:
    """Bags [E][K] of F5 ``[E, Q, D, h, w]`` with a predicted label map ``[E, Q, H, W]``."""
    episodes, images, _, height, width = features.shape
    bags: list[list[list[Tensor]]] = []
    for e in range(episodes):
        bags.append([])
        for k in range(classes):
            bag, total, mass = [], 0.0, 0.0
            for i in range(images):
                for y in range(height):
                    for x in range(width):
                        window = prediction[
                            e, i, y * CELL : (y + 1) * CELL, x * CELL : (x + 1) * CELL
                        ]
                        share = int((window == k).sum()) / CELL**2  # what is missing is padding
                        feature = features[e, i, :, y, x]
                        total, mass = total + share * feature, mass + share
                        if share > 0.5:
                            bag.append(feature)
            bags[e].append(bag or ([total / mass] if mass else []))
    return bags


def cosine(a: Tensor, b: Tensor) -> Tensor:
    a, b = a - a.mean(), b - b.mean()
    return a @ b / (a.norm().clamp(min=1e-6) * b.norm().clamp(min=1e-6))


def slow_aggregate(feature: Tensor, bag: list[Tensor]) -> Tensor:
    if not bag:
        return torch.zeros_like(feature)
    weights = [math.exp(float(cosine(feature, proto)) / T) for proto in bag]
    return sum(w * proto for w, proto in zip(weights, bag, strict=True)) / sum(weights)


def slow_upsample(values: Tensor) -> Tensor:
    """Bilinear x16 of ``[h, w]``, pixel centres aligned, clamped at the border."""
    height, width = values.shape
    out = torch.empty(height * CELL, width * CELL, dtype=torch.float64)

    def neighbours(position: int, size: int) -> tuple[int, int, float]:
        source = max((position + 0.5) / CELL - 0.5, 0.0)
        low = min(int(source), size - 1)
        return low, min(low + 1, size - 1), source - low

    for y in range(height * CELL):
        y0, y1, fy = neighbours(y, height)
        for x in range(width * CELL):
            x0, x1, fx = neighbours(x, width)
            top = values[y0, x0] * (1 - fx) + values[y0, x1] * fx
            bottom = values[y1, x0] * (1 - fx) + values[y1, x1] * fx
            out[y, x] = top * (1 - fy) + bottom * fy
    return out


def slow_target(masks: Tensor, bags: list[list[list[Tensor]]]) -> Tensor:
    target = masks.clone()
    for e, episode in enumerate(bags):
        for k, bag in enumerate(episode):
            if not bag:
                target[e][masks[e] == k] = IGNORE
    return target


def slow_alignment(
    support: Tensor, masks: Tensor, bags: list[list[list[Tensor]]], weights: list[float]
) -> float:
    episodes, shots, _, height, width = support.shape
    classes = len(bags[0])
    logits = torch.empty(episodes, shots, classes, *SIZE, dtype=torch.float64)
    for e in range(episodes):
        for s in range(shots):
            for k, bag in enumerate(bags[e]):
                score = torch.full((height, width), -1 / T, dtype=torch.float64)
                if bag:
                    for y in range(height):
                        for x in range(width):
                            feature = support[e, s, :, y, x]
                            score[y, x] = cosine(feature, slow_aggregate(feature, bag)) / T
                logits[e, s, k] = slow_upsample(score)[: SIZE[0], : SIZE[1]]
    return slow_cross_entropy(logits, slow_target(masks, bags), weights)


def slow_cycle(
    model: FewShotUNet,
    maps: list[Tensor],
    masks: Tensor,
    bags: list[list[list[Tensor]]],
    weights: list[float],
) -> float:
    *skips, support = maps
    episodes, shots, dim, height, width = support.shape
    enhanced = torch.empty(episodes, shots, len(bags[0]), dim, height, width, dtype=torch.float64)
    for e in range(episodes):
        for s in range(shots):
            for k, bag in enumerate(bags[e]):
                for y in range(height):
                    for x in range(width):
                        feature = support[e, s, :, y, x]
                        enhanced[e, s, k, :, y, x] = slow_aggregate(feature, bag) * feature
    logits = model.decoder(
        support.flatten(0, 1), enhanced.flatten(0, 1), [skip.flatten(0, 1) for skip in skips]
    )
    logits = logits.unflatten(0, (episodes, shots))[..., : SIZE[0], : SIZE[1]]
    return slow_cross_entropy(logits, slow_target(masks, bags), weights)


def logits_of(prediction: Tensor, classes: int) -> Tensor:
    """Logits whose argmax is ``prediction``."""
    one_hot = torch.nn.functional.one_hot(prediction, classes).movedim(-1, 2).double()
    return one_hot + torch.rand_like(one_hot) * 0.5


# --- tests ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [None, [0.3, 1.0, 2.0]])
def test_segmentation_loss_equals_the_loop(weights: list[float] | None) -> None:
    logits = torch.randn(2, 2, 3, 5, 4, dtype=torch.float64) * 3
    target = torch.randint(0, 3, (2, 2, 5, 4))
    target[0, 1, 2:] = IGNORE
    found = segmentation_loss(logits, target, weights)
    assert float(found) == pytest.approx(
        slow_cross_entropy(logits, target, weights or [1.0] * 3), rel=1e-6
    )
    as_tensor = None if weights is None else torch.tensor(weights)
    assert float(segmentation_loss(logits, target, as_tensor)) == float(found)


def test_segmentation_loss_gradient() -> None:
    logits = torch.randn(1, 2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([[[[0, 1], [2, IGNORE]], [[1, 1], [0, 2]]]])
    assert torch.autograd.gradcheck(lambda x: segmentation_loss(x, target, [0.5, 1, 2]), logits)


def test_nothing_to_count_is_zero() -> None:
    logits = torch.randn(1, 1, 2, 3, 3, requires_grad=True)
    loss = segmentation_loss(logits, torch.full((1, 1, 3, 3), IGNORE))
    assert loss == 0
    loss.backward()
    assert logits.grad is not None
    assert not logits.grad.any()
    assert segmentation_loss(logits, torch.zeros(1, 1, 3, 3).long(), [0.0, 1.0]) == 0


@pytest.mark.parametrize("weights", [None, [0.2, 1.0, 3.0]])
@pytest.mark.parametrize("absent", [False, True])
def test_alignment_and_cycle_equal_the_loops(
    model: FewShotUNet, weights: list[float] | None, absent: bool
) -> None:
    episode = random_episode(3, episodes=2, shots=2, queries=2)
    # Patches of 8 pixels: cells with one class, with several, and classes without any full cell.
    patches = torch.randint(0, 2 if absent else 3, (2, 2, SIZE[0] // 8, SIZE[1] // 8))
    prediction = patches.repeat_interleave(8, 2).repeat_interleave(8, 3)
    with torch.no_grad():
        support, query = model.encode_episode(episode.support_images, episode.query_images)
        protos = predicted_prototypes(model, query, logits_of(prediction, 3))
        bags = slow_bags(query.bottleneck, prediction, 3)
        assert protos.counts() == [[len(bag) for bag in row] for row in bags]
        assert [not row[2] for row in bags] == [absent, absent]
        masks, flat = episode.support_masks, weights or [1.0] * 3
        found = alignment_loss(model, support, masks, protos, weights)
        assert float(found) == pytest.approx(
            slow_alignment(support.bottleneck, masks, bags, flat), rel=1e-6
        )
        found = cycle_loss(model, support, masks, protos, weights)
        slow = slow_cycle(model, list(support.maps), masks, bags, flat)
        assert float(found) == pytest.approx(slow, rel=1e-6)


def test_prediction_without_the_supports_classes(model: FewShotUNet) -> None:
    """The query is predicted as class 2 alone, the support shows 0 and 1: nothing to compare."""
    episode = random_episode(2)
    support, query = model.encode_episode(episode.support_images, episode.query_images)
    prediction = torch.full((1, 1, *SIZE), 2)
    protos = predicted_prototypes(model, query, logits_of(prediction, 3))
    for loss in (alignment_loss, cycle_loss):
        model.zero_grad()
        value = loss(model, support, episode.support_masks, protos)
        assert value == 0
        value.backward(retain_graph=True)
        grads = [p.grad for p in model.encoder.parameters() if p.grad is not None]
        assert grads
        assert not any(grad.any() for grad in grads)
    model.zero_grad()


@pytest.mark.parametrize("loss", [alignment_loss, cycle_loss])
def test_gradient_reaches_both_images_but_not_through_the_prediction(
    model: FewShotUNet, loss: object
) -> None:
    episode = random_episode(2)
    episode.support_images.requires_grad_()
    episode.query_images.requires_grad_()
    support, query = model.encode_episode(episode.support_images, episode.query_images)
    logits = logits_of(episode.query_masks, 2).requires_grad_()
    protos = predicted_prototypes(model, query, logits)
    value = loss(model, support, episode.support_masks, protos)
    images = (episode.support_images, episode.query_images)
    grads = torch.autograd.grad(value, (*images, logits), allow_unused=True)
    assert grads[0].any()
    assert grads[1].any()
    assert grads[2] is None


def test_episode_loss_adds_up(model: FewShotUNet) -> None:
    episode = random_episode(2, episodes=2, shots=2)
    weights = [0.5, 1.0]
    total, parts, logits = EpisodeLoss(0.5, 2.0, 3.0, weights)(model, episode)
    expected = model(
        episode.support_images, episode.support_masks, episode.query_images, num_classes=2
    )
    torch.testing.assert_close(logits, expected)
    support, query = model.encode_episode(episode.support_images, episode.query_images)
    protos = predicted_prototypes(model, query, expected)
    masks = episode.support_masks
    torch.testing.assert_close(
        parts,
        {
            "ce": segmentation_loss(expected, episode.query_masks, weights).detach(),
            "align": alignment_loss(model, support, masks, protos, weights).detach(),
            "cycle": cycle_loss(model, support, masks, protos, weights).detach(),
        },
    )
    torch.testing.assert_close(
        total.detach(), 0.5 * parts["ce"] + 2 * parts["align"] + 3 * parts["cycle"]
    )
    assert total.requires_grad
    assert not any(part.requires_grad for part in parts.values())


@pytest.mark.parametrize("alone", ["ce", "align", "cycle"])
def test_each_loss_alone_trains(model: FewShotUNet, alone: str) -> None:
    episode = random_episode(2)
    weights = {"ce": 0.0, "align": 0.0, "cycle": 0.0, alone: 2.0}
    together = EpisodeLoss()(model, episode)[1]
    total, parts, _ = EpisodeLoss(**weights)(model, episode)
    assert float(total.detach()) == pytest.approx(2 * float(parts[alone]))
    assert parts[alone] == together[alone]
    assert all(value == 0 for name, value in parts.items() if name != alone)
    model.zero_grad()
    total.backward()
    # A prediction of one class alone leaves the other losses nothing to compare.
    assert model.encoder.conv1.weight.grad is not None
    if parts[alone] > 0:
        assert model.encoder.conv1.weight.grad.any()
    assert (model.decoder.head.weight.grad is None) == (alone == "align")
    model.zero_grad()


def test_the_baseline_trains_too() -> None:
    torch.manual_seed(0)
    baseline = PrototypeNet("resnet18", 8).train()
    episode = random_episode(2)
    episode.support_images = episode.support_images.float()
    episode.query_images = episode.query_images.float()
    total, parts, _ = EpisodeLoss(cycle=0.0)(baseline, episode)
    total.backward()
    assert parts["ce"] > 0
    assert all(p.grad is not None for p in baseline.parameters())


def test_a_few_steps_learn() -> None:
    torch.manual_seed(0)
    network = FewShotUNet("resnet18").train()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    episode = random_episode(2)
    support, query = (
        mask.unsqueeze(2).float() for mask in (episode.support_masks, episode.query_masks)
    )
    episode.support_images = episode.support_images.float() * 0.1 + support
    episode.query_images = episode.query_images.float() * 0.1 + query
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
    for arguments, subject in (
        ((logits[0], target), "target"),
        ((logits, target[..., :2]), "target"),
        ((logits, target, [1.0, 1.0, 1.0]), "class_weights"),
    ):
        with pytest.raises(ArgumentError) as caught:
            segmentation_loss(*arguments)
        assert caught.value.subject == subject
    for weights in ((-1.0, 1.0, 1.0), (0.0, 0.0, 0.0)):
        with pytest.raises(ArgumentError, match="loss weights"):
            EpisodeLoss(*weights)
    episode = random_episode(2)
    episode.query_masks = episode.query_masks + 1
    with pytest.raises(ArgumentError) as caught:
        EpisodeLoss()(model, episode)
    assert caught.value.subject == "query_masks"
