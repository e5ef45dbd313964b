# SPDX-License-Identifier: Apache-2.0
"""The decoder against the literal formulation: concatenate, normalise, rectify, convolve."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastproto.nn import decoder as decoder_module
from fastproto.nn.decoder import UNetDecoder, UpBlock

CHANNELS = (6, 5, 7, 8, 9)


def doubled(x: Tensor, scale: int = 2) -> Tensor:
    return F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False)


class LiteralBlock(nn.Module):
    """``Conv3x3(ReLU(BN(Cat(up, skip))))``, with the names of an ``UpBlock``'s upper half."""

    def __init__(self, block: UpBlock, scale: int):
        super().__init__()
        self.scale = scale
        channels = block.conv_up.in_channels + block.conv_skip.in_channels
        self.norm_up = nn.BatchNorm2d(channels)
        self.conv_up = nn.Conv2d(channels, block.conv_up.out_channels, 3, padding=1)

    def forward(self, up: Tensor, skip: Tensor) -> Tensor:
        joint = torch.cat([up, doubled(skip, self.scale)], dim=1)
        return self.conv_up(F.relu(self.norm_up(joint)))


class LiteralDecoder(nn.Module):
    """One class map at a time through TransConv, skips, bilinear x2 and the 1x1 convolution."""

    def __init__(self, split: UNetDecoder, output_stride: int):
        super().__init__()
        scale, outputs = output_stride // 8, split.lift_feat.out_channels
        self.lift_feat = nn.ConvTranspose2d(2 * CHANNELS[4], outputs, scale, stride=scale)
        self.lift2, self.lift3, self.head = copy.deepcopy((split.lift2, split.lift3, split.head))
        self.up1 = LiteralBlock(split.up1, scale)
        self.up2, self.up3, self.up4 = (
            LiteralBlock(block, 2) for block in (split.up2, split.up3, split.up4)
        )
        self.double().load_state_dict(merged(split.state_dict()))

    def forward(self, enhanced: Tensor, skips: list[Tensor]) -> Tensor:
        """Y ``[B*K, 2D, h, w]``, the skips repeated K times -> ``[B*K, 1, stride*h, stride*w]``."""
        f1, f2, f3, f4 = skips
        x = self.up1(self.lift_feat(enhanced), f4)
        x = self.up2(self.lift2(x), f3)
        x = self.up3(self.lift3(x), f2)
        return self.head(self.up4(doubled(x), f1))


def merged(split: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights, statistics or gradients of a ``UNetDecoder`` by the names of the literal one."""
    whole = {}
    for name, value in split.items():
        other = split.get(name.replace("_up.", "_skip.").replace("_feat.", "_proto."), value)
        if other is not value and value.ndim > 0:
            value = torch.cat([value, other], dim=1 if "conv" in name else 0)
        if "_skip." not in name and "_proto." not in name:
            whole[name] = value
    return whole


def random_inputs(
    batch: int, classes: int, height: int, width: int, output_stride: int = 16
) -> tuple[Tensor, Tensor, list[Tensor]]:
    feat = torch.randn(batch, CHANNELS[4], height, width, dtype=torch.float64)
    enhanced = torch.randn(batch, classes, CHANNELS[4], height, width, dtype=torch.float64)
    sizes = (8, 4, 2, 1) if output_stride == 16 else (4, 2, 1, 1)
    skips = [
        torch.randn(batch, c, height * n, width * n, dtype=torch.float64) + 3
        for c, n in zip(CHANNELS[:4], sizes, strict=True)
    ]
    return feat, enhanced, skips


def random_decoder(output_stride: int = 16) -> UNetDecoder:
    decoder = UNetDecoder(CHANNELS, output_stride).double()
    for module in decoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
        elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) and module.bias is not None:
            nn.init.normal_(module.bias)
    return decoder


@pytest.mark.parametrize("output_stride", [16, 8])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("batch", "classes", "size"), [(1, 2, (2, 3)), (2, 3, (1, 2))])
@pytest.mark.parametrize(("chunk", "recompute"), [(1, "on"), (2**22, "off")])
def test_equals_the_literal_formulation(
    monkeypatch, output_stride, training, batch, classes, size, chunk, recompute
) -> None:
    monkeypatch.setattr(decoder_module, "_CHUNK", {"cpu": chunk, "cuda": chunk})
    torch.manual_seed(0)
    split = random_decoder(output_stride).train(training)
    split.recompute = recompute
    literal = LiteralDecoder(split, output_stride).train(training)
    feat, enhanced, skips = random_inputs(batch, classes, *size, output_stride)
    leaves = [each.requires_grad_() for each in (feat, enhanced, *skips)]

    found = split(feat, enhanced, skips)
    assert found.shape == (batch, classes, output_stride * size[0], output_stride * size[1])
    joint = torch.cat([feat.unsqueeze(1).expand_as(enhanced), enhanced], dim=2).flatten(0, 1)
    repeated = [skip.repeat_interleave(classes, dim=0) for skip in skips]
    expected = literal(joint, repeated).view_as(found)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)

    direction = torch.randn_like(found)
    grads = []
    for out, network in ((found, split), (expected, literal)):
        named = dict(network.named_parameters())
        by_leaf = torch.autograd.grad((out * direction).sum(), [*leaves, *named.values()])
        weights = dict(zip(named, by_leaf[len(leaves) :], strict=True))
        grads.append([list(by_leaf[: len(leaves)]), merged(weights)])
    torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-8)

    # The running statistics, updated once although the backward pass may normalise again.
    state = split.state_dict()
    for name, theirs in literal.state_dict().items():
        halves = [name, name.replace("_up", "_skip")]
        if "num_batches" in name:
            assert [state[half] for half in halves] == [training, training]
        elif "running" in name:
            up, skip = theirs.split([len(state[half]) for half in halves])
            torch.testing.assert_close(state[halves[0]], up)
            # The unbiased variance divides by count - 1, and a skip is counted once, not K times.
            torch.testing.assert_close(state[halves[1]], skip, rtol=0.05, atol=1e-9)


def test_recomputing_keeps_less_and_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    split = random_decoder().float().train()
    feat, enhanced, skips = random_inputs(1, 2, 2, 2)
    inputs = (feat.float(), enhanced.float(), [skip.float() for skip in skips])

    def step(mode: str) -> tuple[list[Tensor], int]:
        split.recompute = mode
        kept = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal kept
            kept += tensor.numel()
            return tensor

        split.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = split(*inputs).square().sum()
        forward = kept
        loss.backward()
        return [p.grad.clone() for p in split.parameters() if p.grad is not None], forward

    keeping, most = step("off")
    again, least = step("on")
    assert all(torch.equal(a, b) for a, b in zip(keeping, again, strict=True))
    assert least < 0.8 * most
    assert step("auto")[1] == most
    monkeypatch.setattr(decoder_module, "_memory", lambda device: 2**16)
    assert step("auto")[1] == least
