# SPDX-License-Identifier: Apache-2.0
"""The U-Net decoder that maps the enhanced features of one class to the logit map of that class.

One decoder serves all classes, so everything that depends on the query alone is computed once, not
once per class. That splits every layer that the textbook applies to a concatenation:

* ``TransConv([F ; G*F]) = TransConv_a(F) + TransConv_b(G*F)``, because it is linear;
* ``Conv3x3(ReLU(BN([up ; skip]))) = Conv3x3_a(ReLU(BN_a(up))) + Conv3x3_b(ReLU(BN_b(skip)))``,
  because batch normalisation and ReLU act on each channel by itself and the convolution is linear.

Here a is the half per class and b the half per image (per class and per image for TransConv).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastproto import defaults
from fastproto._memory import machine_memory
from fastproto.nn.batch_norm import SyncBatchNorm2d, over_ranks, update_running
from fastproto.nn.winograd import Conv3x3, conv3x3

WIDTHS = (256, 128, 64, 32)
"""Output channels of the four stages."""

_CHUNK = {"cpu": 2**22, "cuda": 2**26}
"""Elements of a buffer at full size, whatever the batch and K; a GPU prefers few large kernels."""


class UNetDecoder(nn.Module):
    """F, G*F and the skips F1..F4 -> one logit map per class, at twice the size of F1.

    ``channels`` are those of F1..F5. At an output stride of 8, F4 and F have the size of F3, and
    the first stage doubles nothing.
    """

    recompute: str = "auto"
    """Whether the backward pass computes the largest maps again instead of keeping them: "on",
    "off" or "auto", where they take more than a sixteenth of the device's memory."""

    def __init__(self, channels: Sequence[int], output_stride: int = defaults.OUTPUT_STRIDE):
        super().__init__()
        f1, f2, f3, f4, f5 = channels
        scale = output_stride // 8
        self.lift_feat = nn.ConvTranspose2d(f5, WIDTHS[0], scale, stride=scale)
        self.lift_proto = nn.ConvTranspose2d(f5, WIDTHS[0], scale, stride=scale, bias=False)
        self.up1 = UpBlock(WIDTHS[0], f4, WIDTHS[0], double=scale == 2)
        self.lift2 = nn.ConvTranspose2d(WIDTHS[0], WIDTHS[1], 2, stride=2)
        self.up2 = UpBlock(WIDTHS[1], f3, WIDTHS[1])
        self.lift3 = nn.ConvTranspose2d(WIDTHS[1], WIDTHS[2], 2, stride=2)
        self.up3 = UpBlock(WIDTHS[2], f2, WIDTHS[2])
        self.up4 = UpBlock(WIDTHS[2], f1, WIDTHS[3])
        self.head = nn.Conv2d(WIDTHS[3], 1, 1)
        if not self.head.weight.is_meta:
            self._initialise()

    def _initialise(self) -> None:
        """He initialisation; halves of one layer count the inputs of the whole layer."""
        lifts = (self.lift_feat, 2), (self.lift_proto, 2), (self.lift2, 1), (self.lift3, 1)
        for lift, halves in lifts:
            nn.init.normal_(lift.weight, std=math.sqrt(2 / (halves * lift.in_channels)))
        for block in (self.up1, self.up2, self.up3, self.up4):
            inputs = 9 * (block.conv_up.in_channels + block.conv_skip.in_channels)
            for conv in (block.conv_up, block.conv_skip):
                nn.init.normal_(conv.weight, std=math.sqrt(2 / inputs))
        nn.init.normal_(self.head.weight, std=math.sqrt(1 / WIDTHS[3]))
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):  # those of normalisations are 0 already
                nn.init.zeros_(parameter)

    def forward(self, feat: Tensor, enhanced: Tensor, skips: Sequence[Tensor]) -> Tensor:
        """Logits ``[B, K, H, W]`` of F ``[B, D, h, w]``, G*F ``[B, K, D, h, w]`` and F1..F4."""
        f1, f2, f3, f4 = skips
        again = torch.is_grad_enabled() and self._recomputes(enhanced.shape[1], skips)
        x = _add_per_image(self.lift_proto(enhanced.flatten(0, 1)), self.lift_feat(feat))
        x = self.up1(x, f4, again)
        x = self.up2(self.lift2(x), f3, again)
        x = self.up3(self.lift3(x), f2, again)
        return self._finish(x, f1, again).unflatten(0, enhanced.shape[:2]).squeeze(2)

    def _recomputes(self, classes: int, skips: Sequence[Tensor]) -> bool:
        if self.recompute != "auto" or torch.compiler.is_compiling():
            return self.recompute != "off"
        f1 = skips[0]
        doubled = sum(skip.numel() for skip in skips)
        doubled += len(f1) * classes * WIDTHS[2] * f1[0, 0].numel()
        # four times as many pixels, kept once, and what their statistics need
        return 8 * doubled * f1.element_size() > _memory(f1.device) / 16

    def _finish(self, x: Tensor, skip: Tensor, recompute: bool) -> Tensor:
        """up4 and the 1x1 head, ``[B*K, 64, H/2, W/2] -> [B*K, 1, H, W]``, as one linear map.

        No nonlinearity lies between the 3x3 convolution and the head, so their product, a 3x3
        convolution to a single channel, is applied instead, as nine 1x1 taps and their shifted sum:
        the 32 channels at full size are never computed.
        """
        block = self.up4
        if isinstance(self.head, nn.Identity):  # merged
            return self.up4(_double(x), skip, recompute)
        up = _double_norm_relu_conv(x, block.norm_up, self._taps(block.conv_up), recompute)
        skip = _double_norm_relu_conv(skip, block.norm_skip, self._taps(block.conv_skip), recompute)
        taps = _add_per_image(up, skip)  # [B*K, 9, H, W]
        summed = F.fold(taps.flatten(2), taps.shape[-2:], kernel_size=3, padding=1)
        return summed + self._bias()

    @torch.no_grad()
    def merge_head(self) -> None:
        """Make the head part of up4, for good: not every runtime of a file knows ``F.fold``."""
        up, skip = self.up4.conv_up, self.up4.conv_skip
        taps, bias = (self._taps(up), self._taps(skip)), self._bias().flatten()
        for conv, tap in zip((up, skip), taps, strict=True):
            kernel = tap.flatten(1).flip(0).t().unflatten(1, (3, 3))[None].contiguous()
            conv.weight, conv.out_channels = nn.Parameter(kernel, requires_grad=False), 1
        up.bias = nn.Parameter(bias, requires_grad=False)
        self.register_module("head", nn.Identity())

    def _bias(self) -> Tensor:
        """Of head after up4, ``[1, 1, 1, 1]``."""
        head = self.head.weight.flatten(1)  # [1, 32]
        bias = torch.mv(head, self.up4.conv_up.get_parameter("bias"))
        return (bias + self.head.get_parameter("bias")).view(1, 1, 1, 1)

    def _taps(self, conv: nn.Conv2d) -> Tensor:
        """Kernel of head after conv, ``[9, C, 1, 1]``, flipped as ``F.fold`` scatters."""
        kernel = torch.einsum("h,hcyx->yxc", self.head.weight.flatten(), conv.weight)
        return kernel.flip(0, 1).flatten(0, 1)[:, :, None, None]


class UpBlock(nn.Module):
    """``Conv3x3(ReLU(BN(Cat(up, skip))))`` in two halves, the skip's resized x2 (bilinear).

    Without ``double`` the skip has the size of ``up`` already.
    """

    def __init__(self, up: int, skip: int, outputs: int, *, double: bool = True):
        super().__init__()
        self.doubles_skip = double
        self.norm_up = nn.BatchNorm2d(up)
        self.norm_skip = nn.BatchNorm2d(skip)
        self.conv_up = Conv3x3(up, outputs)
        self.conv_skip = Conv3x3(skip, outputs, bias=False)

    def forward(self, up: Tensor, skip: Tensor, recompute: bool) -> Tensor:
        """``[B*K, C, 2h, 2w]`` and ``[B, C', h, w]`` -> ``[B*K, outputs, 2h, 2w]``.

        With ``recompute`` what was doubled is not kept for the backward pass.
        """
        up = self.conv_up(self.norm_up(up).relu_())
        if self.doubles_skip:
            skip = _double_norm_relu_conv(skip, self.norm_skip, self.conv_skip.weight, recompute)
        else:
            skip = self.conv_skip(self.norm_skip(skip).relu_())
        return _add_per_image(up, skip)


def _add_per_image(per_class: Tensor, per_image: Tensor) -> Tensor:
    """``[B*K, ...] + [B, ...]``, the second repeated for each class; overwrites the first."""
    per_class.unflatten(0, (per_image.shape[0], -1)).add_(per_image.unsqueeze(1))
    return per_class


def _double_norm_relu_conv(
    x: Tensor, norm: nn.BatchNorm2d, weight: Tensor, recompute: bool
) -> Tensor:
    """``Conv(ReLU(BN(double(x))))``, ``[B, C, h, w] -> [B, C', 2h, 2w]``, in little memory.

    The weights of an interpolation sum to one, so the affine map that BN is may come first, on the
    small tensor; only ReLU and convolution see the doubled one, see :func:`_double_relu_conv`.
    """
    if not norm.training:
        return _double_relu_conv(norm(x), weight, recompute)

    def compute(x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        mean, var, centred = _doubled_statistics(x)
        if isinstance(norm, SyncBatchNorm2d):
            own = mean
            mean, var = over_ranks(own, var)
            centred = centred + (own - mean)
        scale = scale[:, None, None] * (var + norm.eps).rsqrt()
        normed = torch.addcmul(shift[:, None, None], centred, scale).to(x.dtype)
        return _double_relu_conv(normed, weight, recompute), mean, var

    out, mean, var = _call(compute, recompute, x, norm.weight, norm.bias, weight)
    update_running(norm, mean, var, out[:, 0].numel())
    return out


def _doubled_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and (biased) variance of the doubled ``x`` per channel, and ``x - mean``, in float32.

    Doubling is a linear map U, each pixel's weight in it is 4, so ``mean(U x) = mean(x)``, and
    ``mean((U x)^2) = mean(x * S x)`` with ``S = U^T U / 4``: the separable kernel (3, 10, 3)/16
    with the border repeated. So the doubled map itself is not needed.
    """
    with torch.autocast(x.device.type, enabled=False):
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = x.mean(dim=(0, 2, 3), keepdim=True)
        centred = x - mean
        taps = x.new_full((3,), 3 / 16)
        taps[1] = 10 / 16
        kernel = torch.outer(taps, taps).expand(x.shape[1], 1, 3, 3)
        smooth = F.conv2d(F.pad(centred, (1, 1, 1, 1), mode="replicate"), kernel, groups=x.shape[1])
        return mean, (centred * smooth).mean(dim=(0, 2, 3), keepdim=True), centred


def _double_relu_conv(x: Tensor, weight: Tensor, recompute: bool) -> Tensor:
    """``Conv(ReLU(double(x)))``, some images at a time: at full size these take most memory."""

    def compute(part: Tensor, weight: Tensor) -> Tensor:
        return (conv3x3 if weight.shape[-1] == 3 else F.conv2d)(_double(part).relu_(), weight)

    if torch.compiler.is_exporting():  # for any number of images
        return compute(x, weight)
    images = max(1, _CHUNK.get(x.device.type, _CHUNK["cuda"]) // (4 * x[0].numel()))
    parts = [_call(compute, recompute, part, weight) for part in x.split(images)]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)


def _call(function: Callable[..., Any], recompute: bool, *tensors: Tensor) -> Any:
    """``function(*tensors)``; with ``recompute`` gradients compute what is inside again."""
    if not recompute:
        return function(*tensors)
    return checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False)


@functools.cache
def _memory(device: torch.device) -> int:
    """Bytes of all memory of a device."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return machine_memory()
