# SPDX-License-Identifier: Apache-2.0
"""The baselines: prototype scores and bilinear upsampling."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from fastproto.nn import FewShotUNet, PrototypeNet, prototype_scores


def test_the_baseline_of_every_claim() -> None:
    with torch.device("meta"):
        model = PrototypeNet()
    assert model.config["encoder"] == "resnet101"
    assert sum(p.numel() for p in model.parameters()) == 42_500_160


def test_equals_scores_and_upsampling() -> None:
    torch.manual_seed(0)
    model = PrototypeNet("resnet18", 8, temperature=0.1).eval()
    images, masks = torch.randn(2, 2, 3, 19, 40), torch.randint(0, 3, (2, 2, 19, 40))
    queries = torch.randn(2, 3, 3, 19, 40)
    with torch.no_grad():
        prototypes = model.encode_support(images, masks, num_classes=3)
        scores = prototype_scores(model.encode(queries).bottleneck, prototypes, temperature=0.1)
        assert scores.shape == (2, 3, 3, 3, 5)
        full = F.interpolate(scores.flatten(0, 1), (24, 40), mode="bilinear", align_corners=False)
        found = model.segment(queries, prototypes)
        torch.testing.assert_close(found, full[..., :19, :].unflatten(0, (2, 3)))
        joint = model(images, masks, queries, num_classes=3)
        torch.testing.assert_close(joint, found, rtol=1e-3, atol=1e-3)


def test_training_free_baseline_shares_the_encoder() -> None:
    torch.manual_seed(0)
    unet = FewShotUNet("resnet18", temperature=0.1, mask_threshold=0.25).eval()
    state = torch.get_rng_state()
    baseline = PrototypeNet.from_unet(unet)
    assert torch.equal(torch.get_rng_state(), state)
    assert baseline.encoder is unet.encoder
    assert not baseline.training
    assert baseline.config == unet.config
    coarse, fine = (FewShotUNet("resnet18", output_stride=stride) for stride in (16, 8))
    assert PrototypeNet.from_unet(coarse).encoder.output_stride == 16
    assert PrototypeNet.from_unet(fine).encoder.output_stride == 8
    images, masks = torch.randn(1, 1, 3, 32, 48), torch.zeros(1, 1, 32, 48, dtype=torch.long)
    masks[..., :20] = 1
    with torch.no_grad():
        ours, theirs = (net.encode_support(images, masks) for net in (unet, baseline))
        assert torch.equal(ours.protos, theirs.protos)
        logits = baseline.segment(images, theirs)
    # An image segments itself: its features are the prototypes.
    assert (logits.argmax(dim=2) == masks).float().mean() > 0.7
