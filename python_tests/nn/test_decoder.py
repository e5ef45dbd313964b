# SPDX-License-Identifier: Apache-2.0
"""The decoder against the literal formulation: concatenate, normalise, rectify, convolve."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastproto.nn import decoder as decoder_module
from fastproto.nn.decoder import UNetDecoder, UpBlock

CHANNELS = (6, 5, 7, 8, 9)


class LiteralBlock(nn.Module):
    """``Conv3x3(ReLU(BN(Cat(up, skip))))`` with the merged weights of an ``UpBlock``."""

    def __init__(self, block: UpBlock, scale: int):
        super().__init__()
        self.scale = scale
        up, skip = block.conv_up, block.conv_skip
        channels = up.in_channels + skip.in_channels
        self.norm = nn.BatchNorm2d(channels, dtype=up.weight.dtype)
        self.conv = nn.Conv2d(channels, up.out_channels, 3, padding=1, dtype=up.weight.dtype)
        self.norm.load_state_dict(
            {
                key: value
                if value.ndim == 0
                else torch.cat([value, block.norm_skip.state_dict()[key]])
                for key, value in block.norm_up.state_dict().items()
            }
        )
        weight = torch.cat([up.weight, skip.weight], dim=1)
        self.conv.load_state_dict({"weight": weight, "bias": up.bias})

    def forward(self, up: Tensor, skip: Tensor) -> Tensor:
        if self.scale > 1:
            skip = F.interpolate(
                skip, scale_factor=self.scale, mode="bilinear", align_corners=False
            )
        return self.conv(F.relu(self.norm(torch.cat([up, skip], dim=1))))


class LiteralDecoder(nn.Module):
    """One class map at a time through TransConv, skips, bilinear x2 and the 1x1 convolution."""

    def __init__(self, split: UNetDecoder, output_stride: int = 16):
        super().__init__()
        lift, scale = split.lift_feat, output_stride // 8
        self.lift1 = nn.ConvTranspose2d(
            2 * lift.in_channels, lift.out_channels, scale, stride=scale, dtype=lift.weight.dtype
        )
        weight = torch.cat([lift.weight, split.lift_proto.weight], dim=0)
        self.lift1.load_state_dict({"weight": weight, "bias": lift.bias})
        self.lift2, self.lift3, self.head = split.lift2, split.lift3, split.head
        self.blocks = nn.ModuleList(
            LiteralBlock(block, factor)
            for block, factor in (
                (split.up1, scale),
                (split.up2, 2),
                (split.up3, 2),
                (split.up4, 2),
            )
        )

    def forward(self, enhanced: Tensor, skips: list[Tensor]) -> Tensor:
        """Y ``[B*K, 2D, h, w]``, the skips repeated K times -> ``[B*K, 1, stride*h, stride*w]``."""
        f1, f2, f3, f4 = skips
        x = self.blocks[0](self.lift1(enhanced), f4)
        x = self.blocks[1](self.lift2(x), f3)
        x = self.blocks[2](self.lift3(x), f2)
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        return self.head(self.blocks[3](x, f1))


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
@pytest.mark.parametrize("chunk", [1, 2**22])
def test_equals_the_literal_formulation(
    monkeypatch: pytest.MonkeyPatch,
    output_stride: int,
    training: bool,
    batch: int,
    classes: int,
    size: tuple[int, int],
    chunk: int,
) -> None:
    monkeypatch.setattr(decoder_module, "_CHUNK", {"cpu": chunk, "cuda": chunk})
    torch.manual_seed(0)
    split = random_decoder(output_stride).train(training)
    literal = LiteralDecoder(split, output_stride).train(training)
    feat, enhanced, skips = random_inputs(batch, classes, *size, output_stride)
    leaves = [feat, enhanced, *skips]
    for leaf in leaves:
        leaf.requires_grad_()

    found = split(feat, enhanced, skips)
    assert found.shape == (batch, classes, output_stride * size[0], output_stride * size[1])
    joint = torch.cat([feat.unsqueeze(1).expand_as(enhanced), enhanced], dim=2).flatten(0, 1)
    repeated = [skip.repeat_interleave(classes, dim=0) for skip in skips]
    expected = literal(joint, repeated).view_as(found)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)

    direction = torch.randn_like(found)
    for a, b in zip(
        torch.autograd.grad((found * direction).sum(), leaves),
        torch.autograd.grad((expected * direction).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("output_stride", [16, 8])
def test_gradients_of_the_weights(output_stride: int) -> None:
    torch.manual_seed(0)
    split = random_decoder(output_stride)
    literal = LiteralDecoder(split, output_stride)
    feat, enhanced, skips = random_inputs(2, 2, 1, 1, output_stride)
    found = split(feat, enhanced, skips)
    found.square().sum().backward()
    grads = {name: p.grad for name, p in split.named_parameters()}
    assert all(grad is not None for grad in grads.values())
    shared = [grads[f"{name}.weight"].clone() for name in ("lift2", "lift3", "head")]
    split.zero_grad()
    joint = torch.cat([feat.unsqueeze(1).expand_as(enhanced), enhanced], dim=2).flatten(0, 1)
    repeated = [skip.repeat_interleave(2, dim=0) for skip in skips]
    literal(joint, repeated).square().sum().backward()

    def check(ours: Tensor, theirs: Tensor | None) -> None:
        assert theirs is not None
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)

    for ours, module in zip(shared, (split.lift2, split.lift3, split.head), strict=True):
        check(ours, module.weight.grad)
    check(
        torch.cat([grads["lift_feat.weight"], grads["lift_proto.weight"]]),
        literal.lift1.weight.grad,
    )
    for number, block in enumerate(literal.blocks, start=1):
        for layer, kind in (("conv", "weight"), ("norm", "weight"), ("norm", "bias")):
            halves = [grads[f"up{number}.{layer}_{half}.{kind}"] for half in ("up", "skip")]
            dim = 1 if layer == "conv" else 0
            check(torch.cat(halves, dim=dim), getattr(getattr(block, layer), kind).grad)
        check(grads[f"up{number}.conv_up.bias"], block.conv.bias.grad)


@pytest.mark.parametrize("output_stride", [16, 8])
def test_running_statistics_are_updated_once(output_stride: int) -> None:
    """... although the backward pass computes the normalisation again."""
    torch.manual_seed(0)
    split = random_decoder(output_stride).train()
    literal = LiteralDecoder(split, output_stride).train()
    feat, enhanced, skips = random_inputs(2, 2, 2, 2, output_stride)
    split(feat, enhanced, skips).sum().backward()
    joint = torch.cat([feat.unsqueeze(1).expand_as(enhanced), enhanced], dim=2).flatten(0, 1)
    literal(joint, [skip.repeat_interleave(2, dim=0) for skip in skips])
    for name, block in zip(("up1", "up2", "up3", "up4"), literal.blocks, strict=True):
        ours = getattr(split, name)
        for half in (ours.norm_up, ours.norm_skip):
            assert half.num_batches_tracked == 1
        up = ours.norm_up.num_features
        for key in ("running_mean", "running_var"):
            theirs = getattr(block.norm, key)
            torch.testing.assert_close(getattr(ours.norm_up, key), theirs[:up])
            # The unbiased variance divides by count - 1, and a skip is counted once, not K times.
            torch.testing.assert_close(
                getattr(ours.norm_skip, key), theirs[up:], rtol=0.05, atol=1e-9
            )


def test_statistics_of_the_doubled_map() -> None:
    x = torch.randn(3, 4, 5, 1, dtype=torch.float64) * 2 + 50
    doubled = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    mean, var, centred = decoder_module._doubled_statistics(x)
    torch.testing.assert_close(mean.flatten(), doubled.mean(dim=(0, 2, 3)))
    torch.testing.assert_close(var.flatten(), doubled.var(dim=(0, 2, 3), correction=0))
    torch.testing.assert_close(centred, x - mean)


def test_repeatable_to_the_bit() -> None:
    torch.manual_seed(0)
    split = random_decoder().float().train()
    feat, enhanced, skips = random_inputs(1, 2, 2, 2)
    inputs = (feat.float(), enhanced.float(), [skip.float() for skip in skips])
    grads = []
    for _ in range(2):
        split.zero_grad()
        split(*inputs).square().sum().backward()
        grads.append([p.grad.clone() for p in split.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


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
