# SPDX-License-Identifier: Apache-2.0
"""Prototypes from masks, scores from prototypes, and their file."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.slow_prototypes import slow_aggregates, slow_bags
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from fastproto.errors import ArgumentError, CheckpointError
from fastproto.nn import Prototypes, class_masks, extract_prototypes, prototype_scores
from fastproto.nn.weights import write_safetensors


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    shape=st.tuples(*[st.integers(1, 3)] * 4),
    classes=st.integers(2, 4),
    cell=st.sampled_from([1, 2, 4]),
    threshold=st.sampled_from([0.0, 0.25, 0.5, 0.95]),
    append_global=st.booleans(),
)
def test_equals_the_loop(seed, shape, classes, cell, threshold, append_global) -> None:
    episodes, shots, height, width = shape
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(episodes, shots, 5, height, width, generator=generator)
    # One label more than there are classes: pixels of no class, and often a class without pixels.
    labels = torch.randint(
        0, classes + 1, (episodes, shots, height * cell, width * cell), generator=generator
    )
    coarse = torch.rand(episodes, shots, 1, 1, generator=generator) < 0.5
    labels = torch.where(coarse, labels[..., :1, :1], labels)
    prototypes = extract_prototypes(
        features, class_masks(labels, classes), threshold=threshold, append_global=append_global
    )
    bags = slow_bags(features, labels, classes, cell, threshold, append_global)
    assert prototypes.counts() == [[len(bag) for bag in episode] for episode in bags]
    packed = torch.cat([bag for episode in bags for bag in episode])
    trimmed = prototypes.trim()
    assert trimmed.counts() == prototypes.counts()
    torch.testing.assert_close(trimmed.protos.double(), packed, rtol=1e-5, atol=1e-6)
    assert not prototypes.protos[len(packed) :].any()
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


def test_nothing_is_asked_of_the_device() -> None:
    def run(features: Tensor, masks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        prototypes = extract_prototypes(features, masks, append_global=True)
        scores = prototype_scores(features, prototypes, temperature=0.1)
        return prototypes.protos, prototypes.offsets, scores

    features, masks = torch.randn(2, 3, 4, 2, 2), class_masks(torch.randint(0, 2, (2, 3, 8, 8)), 2)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    # Fake tensors have no values, so anything that asked for one would fail here.
    graph = make_fx(run, tracing_mode="fake")(features, masks)
    for way in (compiled, graph):
        torch.testing.assert_close(way(features, masks), run(features, masks))


def test_scores_equal_the_slow_ones() -> None:
    torch.manual_seed(0)
    feat = torch.randn(2, 2, 6, 2, 3, dtype=torch.float64)
    bags = [[torch.randn(n, 6, dtype=torch.float64) for n in row] for row in ((3, 1, 0), (2, 0, 5))]
    unused = torch.full((4, 6), 7.0, dtype=torch.float64)
    offsets = torch.tensor([0, 3, 4, 4, 6, 6, 11], dtype=torch.int32)
    prototypes = Prototypes(torch.cat([*bags[0], *bags[1], unused]), offsets, 3)
    found = prototype_scores(feat, prototypes, temperature=0.1)
    torch.testing.assert_close(found, slow_aggregates(feat, bags, 0.1)[1])
    assert (found.abs() <= 10 + 1e-9).all()


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


FEATURES, MASKS = torch.ones(1, 1, 4, 2, 2), torch.ones(1, 1, 2, 4, 4)
PROTOS, OFFSETS = torch.ones(3, 2), torch.tensor([0, 2, 3], dtype=torch.int32)
score = partial(prototype_scores, prototypes=Prototypes(PROTOS, OFFSETS, 2), temperature=0.1)


@pytest.mark.parametrize(
    ("call", "subject"),
    [
        (partial(extract_prototypes, FEATURES[0], MASKS), "features"),
        (partial(extract_prototypes, FEATURES.long(), MASKS), "features"),
        (partial(extract_prototypes, FEATURES, MASKS.expand(-1, 2, -1, -1, -1)), "masks"),
        (partial(extract_prototypes, FEATURES, torch.ones(1, 1, 2, 5, 4)), "masks"),
        (partial(extract_prototypes, FEATURES, MASKS[..., :1, :1]), "masks"),
        (partial(extract_prototypes, FEATURES, MASKS[0]), "masks"),
        (partial(extract_prototypes, FEATURES, MASKS.bool()), "masks"),
        (partial(extract_prototypes, FEATURES, MASKS.to("meta")), "masks"),
        (partial(extract_prototypes, FEATURES, MASKS, threshold=1.0), "mask_threshold"),
        (partial(extract_prototypes, FEATURES, MASKS, threshold=-0.1), "mask_threshold"),
        (partial(extract_prototypes, FEATURES, MASKS[:, :, :1]), "num_classes"),
        (partial(Prototypes, torch.ones(3), OFFSETS, 2), "protos"),
        (partial(Prototypes, PROTOS.long(), OFFSETS, 2), "protos"),
        (partial(Prototypes, PROTOS, OFFSETS.long(), 2), "offsets"),
        (partial(Prototypes, PROTOS, OFFSETS, 3), "offsets"),
        (partial(Prototypes, PROTOS, OFFSETS, 1), "num_classes"),
        (partial(Prototypes, PROTOS, OFFSETS, True), "num_classes"),
        (partial(score, torch.ones(2, 1, 2, 1, 1)), "prototypes"),
        (partial(score, torch.ones(1, 1, 3, 1, 1)), "prototypes"),
    ],
)
def test_bad_arguments(call: Callable[[], object], subject: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        call()
    assert caught.value.subject == subject


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
