# SPDX-License-Identifier: Apache-2.0
"""Prototypes from masks, scores from prototypes, and their file."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from fastproto.errors import ArgumentError, CheckpointError
from fastproto.nn import Prototypes, class_masks, extract_prototypes, prototype_scores
from fastproto.nn.weights import write_safetensors


def slow_bags(
    features: Tensor, masks: Tensor, threshold: float, append_global: bool
) -> list[list[Tensor]]:
    """Prototypes of bag (episode, class), cell by cell."""
    episodes, shots, _, height, width = features.shape
    cell = masks.shape[-1] // width
    bags = []
    for e in range(episodes):
        for k in range(masks.shape[2]):
            bag, weighted, mass = [], 0.0, 0.0
            for s in range(shots):
                for y in range(height):
                    for x in range(width):
                        patch = masks[e, s, k, y * cell : (y + 1) * cell, x * cell : (x + 1) * cell]
                        share = patch.sum().item() / cell**2
                        feature = features[e, s, :, y, x].double()
                        if share > threshold:
                            bag.append(feature)
                        weighted = weighted + share * feature
                        mass += share
            if mass > 0 and (append_global or not bag):
                bag.append(weighted / mass)
            bags.append(bag)
    return bags


def assert_bags(prototypes: Prototypes, bags: list[list[Tensor]]) -> None:
    bounds = prototypes.offsets.tolist()
    assert bounds[0] == 0
    assert [b - a for a, b in itertools.pairwise(bounds)] == [len(bag) for bag in bags]
    flat = [row for bag in bags for row in bag]
    if flat:
        torch.testing.assert_close(
            prototypes.protos[: bounds[-1]].double(), torch.stack(flat), rtol=1e-5, atol=1e-6
        )


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    shape=st.tuples(*[st.integers(1, 3)] * 4),
    classes=st.integers(2, 4),
    cell=st.sampled_from([1, 2, 4]),
    threshold=st.sampled_from([0.0, 0.25, 0.5, 0.95]),
    append_global=st.booleans(),
)
def test_equals_the_loop(
    seed: int,
    shape: tuple[int, int, int, int],
    classes: int,
    cell: int,
    threshold: float,
    append_global: bool,
) -> None:
    episodes, shots, height, width = shape
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(episodes, shots, 5, height, width, generator=generator)
    # One label more than there are classes: pixels of no class, and often a class without pixels.
    labels = torch.randint(
        0, classes + 1, (episodes, shots, height * cell, width * cell), generator=generator
    )
    coarse = torch.rand(episodes, shots, 1, 1, generator=generator) < 0.5
    labels = torch.where(coarse, labels[..., :1, :1], labels)
    masks = class_masks(labels, classes)
    prototypes = extract_prototypes(
        features, masks, threshold=threshold, append_global=append_global
    )
    assert_bags(prototypes, slow_bags(features, masks, threshold, append_global))
    used = prototypes.offsets[-1]
    assert not prototypes.protos[used:].any()
    trimmed = prototypes.trim()
    assert trimmed.protos.shape[0] == used
    assert trimmed.counts() == prototypes.counts()
    assert torch.equal(prototypes.present(), torch.tensor(prototypes.counts()) > 0)


def test_rules_for_small_and_empty_masks() -> None:
    features = torch.randn(1, 1, 3, 2, 2)
    labels = torch.zeros(1, 1, 8, 8, dtype=torch.long)
    labels[0, 0, 0, :3] = 1  # 3 of 16 pixels of one cell
    masks = class_masks(labels, 3)
    prototypes = extract_prototypes(features, masks)
    assert prototypes.counts() == [[4, 1, 0]]
    torch.testing.assert_close(prototypes.protos[4], features[0, 0, :, 0, 0])
    with_global = extract_prototypes(features, masks, append_global=True)
    assert with_global.counts() == [[5, 1, 0]]
    assert extract_prototypes(features, masks, threshold=0.1).counts() == [[4, 1, 0]]
    # Exactly half of a cell is not more than half.
    half = torch.zeros(1, 1, 2, 8, 8)
    half[..., 0, :2, :4] = 1
    half[..., 1, 0, 0] = 1
    assert extract_prototypes(features, half).counts() == [[1, 1]]
    torch.testing.assert_close(
        extract_prototypes(features, half).protos[0], features[0, 0, :, 0, 0]
    )


def test_gradients_flow_into_the_features() -> None:
    features = torch.randn(2, 2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    masks = class_masks(torch.randint(0, 3, (2, 2, 4, 4)), 3).double()
    assert torch.autograd.gradcheck(
        lambda f: extract_prototypes(f, masks, threshold=0.3, append_global=True).protos, features
    )


def test_compiles_without_graph_breaks() -> None:
    features, masks = torch.randn(2, 3, 4, 2, 2), class_masks(torch.randint(0, 2, (2, 3, 8, 8)), 2)

    def extract(features: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        prototypes = extract_prototypes(features, masks, append_global=True)
        return prototypes.protos, prototypes.offsets

    compiled = torch.compile(extract, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(features, masks), extract(features, masks), strict=True):
        torch.testing.assert_close(found, expected)
    # Fake tensors have no values, so anything that asked for one would fail here.
    graph = make_fx(extract, tracing_mode="fake")(features, masks)
    for found, expected in zip(graph(features, masks), extract(features, masks), strict=True):
        torch.testing.assert_close(found, expected)


def test_scores_work_without_values() -> None:
    feat, masks = torch.randn(1, 2, 4, 2, 2), class_masks(torch.randint(0, 2, (1, 2, 4, 4)), 2)

    def score(feat: Tensor, masks: Tensor) -> Tensor:
        return prototype_scores(feat, extract_prototypes(feat, masks), temperature=0.1)

    graph = make_fx(score, tracing_mode="fake")(feat, masks)
    torch.testing.assert_close(graph(feat, masks), score(feat, masks))


def slow_scores(feat: Tensor, bags: list[list[Tensor]], classes: int, t: float) -> Tensor:
    """Scores in float64, pixel by pixel and prototype by prototype."""
    episodes, queries, _, height, width = feat.shape

    def cosine(a: Tensor, b: Tensor) -> float:
        a, b = a - a.mean(), b - b.mean()
        return float(a @ b / (max(float(a.norm()), 1e-6) * max(float(b.norm()), 1e-6)))

    scores = torch.empty(episodes, queries, classes, height, width, dtype=torch.float64)
    for e in range(episodes):
        for q in range(queries):
            for k in range(classes):
                bag = bags[e * classes + k]
                for y in range(height):
                    for x in range(width):
                        pixel = feat[e, q, :, y, x].double()
                        if not bag:
                            scores[e, q, k, y, x] = -1 / t
                            continue
                        cos = torch.tensor([cosine(pixel, proto) for proto in bag]).double()
                        weight = torch.softmax(cos / t, 0)
                        agg = sum(w * proto for w, proto in zip(weight, bag, strict=True))
                        scores[e, q, k, y, x] = cosine(pixel, agg) / t
    return scores


def test_scores_equal_the_loop() -> None:
    torch.manual_seed(0)
    feat = torch.randn(2, 2, 6, 2, 3, dtype=torch.float64)
    bags = [[torch.randn(6, dtype=torch.float64) for _ in range(n)] for n in (3, 1, 0, 2, 0, 5)]
    packed = torch.stack([row for bag in bags for row in bag])
    unused = torch.full((4, 6), 7.0, dtype=torch.float64)
    offsets = torch.tensor([0, 3, 4, 4, 6, 6, 11], dtype=torch.int32)
    prototypes = Prototypes(torch.cat([packed, unused]), offsets, 3)
    found = prototype_scores(feat, prototypes, temperature=0.1)
    torch.testing.assert_close(found, slow_scores(feat, bags, 3, 0.1))
    assert (found[:, :, :, 0, 0].abs() <= 10 + 1e-9).all()


def test_scores_of_nothing_but_empty_bags() -> None:
    prototypes = Prototypes(torch.empty(0, 4), torch.zeros(3, dtype=torch.int32), 2)
    feat = torch.randn(1, 1, 4, 2, 2, requires_grad=True)
    scores = prototype_scores(feat, prototypes, temperature=0.5)
    assert torch.equal(scores, torch.full((1, 1, 2, 2, 2), -2.0))
    scores.sum().backward()
    assert feat.grad is not None
    assert not feat.grad.any()


def test_save_and_load(tmp_path: Path) -> None:
    features, labels = torch.randn(2, 2, 8, 3, 3), torch.randint(0, 3, (2, 2, 12, 12))
    prototypes = extract_prototypes(features, class_masks(labels, 3))
    extra = {"names": ["background", "liver", "spleen"], "spacing": [0.7, 0.7, 3.0]}
    prototypes.save(tmp_path / "p.safetensors", extra)
    loaded, found = Prototypes.load(tmp_path / "p.safetensors")
    assert found == extra
    assert loaded.counts() == prototypes.counts()
    assert loaded.num_classes == 3
    assert loaded.episodes == 2
    assert torch.equal(loaded.protos, prototypes.trim().protos)
    half = loaded.to(dtype=torch.bfloat16)
    assert half.protos.dtype == torch.bfloat16
    assert half.offsets.dtype == torch.int32


def test_unusable_files(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    with pytest.raises(CheckpointError, match="no such file"):
        Prototypes.load(path)
    path.write_bytes(b"not safetensors at all")
    with pytest.raises(CheckpointError, match="not safetensors"):
        Prototypes.load(path)
    tensors = {"protos": torch.ones(3, 2), "offsets": torch.tensor([0, 2, 3], dtype=torch.int32)}
    header = {"kind": "prototypes", "num_classes": 2, "extra": {}}
    write_safetensors(path, tensors, header)
    assert Prototypes.load(path)[0].counts() == [[2, 1]]
    for change in ({"kind": "model"}, {"num_classes": 3}, {"num_classes": "2"}):
        write_safetensors(path, tensors, {**header, **change})
        with pytest.raises(CheckpointError):
            Prototypes.load(path)
    for offsets in ([0, 2, 4], [0, 4, 3], [1, 2, 3], [0, 1, 2]):
        broken = {**tensors, "offsets": torch.tensor(offsets, dtype=torch.int32)}
        write_safetensors(path, broken, header)
        with pytest.raises(CheckpointError, match="offsets"):
            Prototypes.load(path)


@pytest.mark.parametrize(
    ("features", "masks", "threshold", "subject"),
    [
        (torch.ones(1, 1, 4, 2), torch.ones(1, 1, 2, 4, 4), 0.5, "features"),
        (torch.ones(1, 1, 4, 2, 2, dtype=torch.long), torch.ones(1, 1, 2, 4, 4), 0.5, "features"),
        (torch.ones(1, 1, 4, 2, 2), torch.ones(1, 2, 2, 4, 4), 0.5, "masks"),
        (torch.ones(1, 1, 4, 2, 2), torch.ones(1, 1, 2, 5, 4), 0.5, "masks"),
        (torch.ones(1, 1, 4, 2, 2), torch.ones(1, 1, 2, 1, 1), 0.5, "masks"),
        (torch.ones(1, 1, 4, 2, 2), torch.ones(1, 2, 4, 4), 0.5, "masks"),
        (torch.ones(1, 1, 4, 2, 2), torch.ones(1, 1, 2, 4, 4).bool(), 0.5, "masks"),
        (torch.ones(1, 1, 4, 2, 2), torch.ones(1, 1, 2, 4, 4), 1.0, "mask_threshold"),
        (torch.ones(1, 1, 4, 2, 2), torch.ones(1, 1, 2, 4, 4), -0.1, "mask_threshold"),
        (torch.ones(1, 1, 4, 2, 2), torch.ones(1, 1, 1, 4, 4), 0.5, "num_classes"),
    ],
)
def test_bad_arguments(features: Tensor, masks: Tensor, threshold: float, subject: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        extract_prototypes(features, masks, threshold=threshold)
    assert caught.value.subject == subject


def test_bad_prototypes() -> None:
    offsets = torch.tensor([0, 2, 3], dtype=torch.int32)
    for protos, bounds, classes, subject in (
        (torch.ones(3), offsets, 2, "protos"),
        (torch.ones(3, 2).long(), offsets, 2, "protos"),
        (torch.ones(3, 2), offsets.long(), 2, "offsets"),
        (torch.ones(3, 2), offsets, 3, "offsets"),
        (torch.ones(3, 2), offsets, 1, "num_classes"),
        (torch.ones(3, 2), offsets, True, "num_classes"),
    ):
        with pytest.raises(ArgumentError) as caught:
            Prototypes(protos, bounds, classes)
        assert caught.value.subject == subject
    prototypes = Prototypes(torch.ones(3, 2), offsets, 2)
    for feat in (torch.ones(2, 1, 2, 1, 1), torch.ones(1, 1, 3, 1, 1)):
        with pytest.raises(ArgumentError, match="prototypes"):
            prototype_scores(feat, prototypes, temperature=0.1)


def test_pick_joins_the_bags_of_several_episodes() -> None:
    """Row n of the prototypes is the number n: bags 0, 1 | 2, 3, none | 4."""
    protos = torch.arange(5.0)[:, None]
    offsets = torch.tensor([0, 1, 2, 4, 4, 5, 5], dtype=torch.int32)
    prototypes = Prototypes(protos, offsets, 2)
    assert prototypes.counts() == [[1, 1], [2, 0], [1, 0]]
    picked = prototypes.pick([([2, 1], [0]), ([1], [1, 2]), ([], [])])
    assert picked.episodes == 3
    assert picked.num_classes == 2
    assert picked.protos.flatten().tolist() == [4, 2, 3, 1, 2, 3]
    assert picked.offsets.tolist() == [0, 3, 4, 6, 6, 6, 6]
    assert picked.offsets.dtype == torch.int32
