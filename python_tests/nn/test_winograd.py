# SPDX-License-Identifier: Apache-2.0
"""Winograd's convolution against the direct one in float64, within the bound of docs/math.md."""

from __future__ import annotations

import copy
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from fastproto.losses import EpisodeLoss
from fastproto.nn import FewShotUNet, winograd
from fastproto.nn.winograd import MATRICES, Conv3x3, conv3x3, winograd_conv3x3
from fastproto.training.episodes import Episode

SHAPES = [  # x, outputs, dilation
    ((3, 8, 16, 16), 6, 4),
    ((2, 5, 13, 9), 7, 2),  # fits no tile
    ((2, 5, 24, 24), 7, 4),  # tiles of 2
    ((1, 3, 2, 3), 4, 1),  # smaller than a tile
    ((1, 1, 1, 1), 1, 3),  # the padding is all there is
    ((5, 64, 16, 16), 128, 2),
]


@pytest.fixture
def fresh_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "_kept", threading.local())


def operands(shape: tuple[int, ...], outputs: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    weight = torch.randn(outputs, shape[1], 3, 3) / (3 * math.sqrt(shape[1]))
    return torch.randn(shape), weight, torch.randn(outputs)


def bound(x: Tensor, weight: Tensor, dilation: int) -> Tensor:
    """4 e(Y) of docs/math.md: the same computation with the magnitude of every number."""
    magnitudes = {m: type(each)(*(one.abs() for one in each)) for m, each in MATRICES.items()}
    with mock.patch.object(winograd, "MATRICES", magnitudes):
        result = winograd_conv3x3(x.abs(), weight.abs(), None, dilation)
    m = winograd._Grid(x.shape, dilation).m
    factor = math.sqrt(x.shape[1]) + 2 * (m + 2) + 3
    return 4 * torch.finfo(torch.float32).eps * factor * result


@pytest.mark.parametrize(("shape", "outputs", "dilation"), SHAPES)
def test_within_the_bound(shape: tuple[int, ...], outputs: int, dilation: int) -> None:
    leaves = [each.requires_grad_() for each in operands(shape, outputs)]
    ours = winograd_conv3x3(*leaves, dilation)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    doubles = [each.detach().double().requires_grad_() for each in leaves]
    exact = F.conv2d(*doubles, padding=dilation, dilation=dilation)
    x, weight, _ = (each.detach() for each in leaves)
    allowed = bound(x, weight, dilation) + torch.finfo(torch.float32).eps * exact.abs() + 1e-30
    assert ((ours - exact).abs() <= allowed).all()

    upstream = torch.randn_like(ours)
    mine, *rest = torch.autograd.grad(ours, leaves, upstream)
    truth, *true_rest = torch.autograd.grad(exact, doubles, upstream.double())
    allowed = bound(upstream, weight.flip(2, 3).transpose(0, 1), dilation) + 1e-30
    assert ((mine - truth).abs() <= allowed).all()
    for mine, truth in zip(rest, true_rest, strict=True):
        # A sum over pixels: its parts err like the result, by 1e-5 of what is summed.
        assert (mine - truth).norm() <= 1e-5 * truth.norm()


def test_second_derivative() -> None:
    x, weight, _ = operands((2, 4, 8, 8), 3)
    leaves = x.requires_grad_(), weight.requires_grad_()

    def penalty(function) -> Tensor:
        (first,) = torch.autograd.grad(function().square().sum(), x, create_graph=True)
        return first.square().sum()

    ours = torch.autograd.grad(penalty(lambda: winograd_conv3x3(x, weight)), leaves)
    want = torch.autograd.grad(penalty(lambda: F.conv2d(x, weight, padding=1)), leaves)
    for mine, theirs in zip(ours, want, strict=True):
        assert (mine - theirs).norm() < 1e-4 * theirs.norm()


def test_whatever_the_default_dtype_and_device(fresh_buffers: None) -> None:
    x, weight, _ = operands((2, 4, 8, 8), 3)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            found = winograd_conv3x3(x, weight)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, winograd_conv3x3(x, weight))


def test_a_large_buffer_is_not_kept(fresh_buffers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "_KEPT", 100)
    winograd_conv3x3(*operands((2, 4, 8, 8), 3)[:2])
    assert not vars(winograd._kept)


def test_buffers_serve_inside_and_outside_of_inference_mode(fresh_buffers: None) -> None:
    x, weight, _ = operands((2, 4, 8, 8), 3)
    with torch.inference_mode():
        first = winograd_conv3x3(x, weight)
    outside = winograd_conv3x3(x, weight.requires_grad_())
    assert torch.equal(outside.detach(), first)
    outside.sum().backward()
    assert x.grad is None  # a frozen input costs no gradient
    assert weight.grad is not None


def test_transforms_of_functions_and_single_images_go_another_way() -> None:
    module, x = Conv3x3(64, 64), torch.randn(8, 64, 16, 16)
    assert torch.func.vmap(module)(x[:, None]).shape == (8, 1, 64, 16, 16)
    torch.testing.assert_close(module(x[0]), module(x)[0], rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_filters_that_are_kept_are_transformed_once(monkeypatch) -> None:
    module, x = Conv3x3(64, 64), torch.randn(8, 64, 16, 16)
    small = x[:, :, :2, :2].repeat(48, 1, 1, 1)  # takes another m
    want = module(x), module(small)
    kept = WeakTensorKeyDictionary()
    monkeypatch.setattr(winograd, "_kept_filters", kept)
    winograd.keep_filters(module)
    with torch.inference_mode():
        assert torch.equal(module(x), want[0])
    assert torch.equal(module(small), want[1])
    assert sorted(kept[module.weight]) == [2, 4]
    kept[module.weight][4] = torch.zeros_like(kept[module.weight][4])
    assert torch.equal(module(x), module.bias[:, None, None].expand_as(want[0]))
    del module
    assert not kept


def test_repeatable_and_free_of_what_was_computed_before() -> None:
    x, weight, _ = operands((5, 64, 16, 16), 128)
    first = winograd_conv3x3(x, weight, None, 2)
    winograd_conv3x3(*operands((3, 70, 20, 20), 64)[:2], None, 1)
    assert torch.equal(first, winograd_conv3x3(x, weight, None, 2))


def test_threads_do_not_share_buffers() -> None:
    x, weight, _ = operands((6, 64, 16, 16), 64)
    inputs = [x * scale for scale in (1, 2, 3, 4)]
    want = [winograd_conv3x3(each, weight) for each in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            found = pool.map(lambda each: winograd_conv3x3(each, weight), inputs)
            assert all(torch.equal(*pair) for pair in zip(found, want, strict=True))


@pytest.mark.parametrize(
    ("x", "outputs", "taken"),
    [
        (torch.zeros(8, 64, 16, 16), 64, True),
        (torch.zeros(8, 32, 16, 16), 64, False),  # few channels
        (torch.zeros(2, 64, 16, 16), 64, False),  # few tiles
        (torch.zeros(8, 64, 16, 16, dtype=torch.float64), 64, False),
        (torch.zeros(8, 64, 16, 16, dtype=torch.bfloat16), 64, False),
    ],
)
def test_taken_where_it_pays(x: Tensor, outputs: int, taken: bool, monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(winograd, "winograd_conv3x3", lambda *args: calls.append(args))
    conv3x3(x, torch.zeros(outputs, x.shape[1], 3, 3, dtype=x.dtype))
    assert bool(calls) == taken


def test_not_under_autocast_and_not_compiled(monkeypatch) -> None:
    module, x = Conv3x3(64, 64, dilation=2), torch.randn(8, 64, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == torch.bfloat16
    want = F.conv2d(x, module.weight, module.bias, padding=2, dilation=2)
    assert torch.equal(torch.compile(module, backend="eager", fullgraph=True)(x), want)
    strided = Conv3x3(64, 64, stride=2)
    want = F.conv2d(x, strided.weight, strided.bias, stride=2, padding=1)
    assert torch.equal(strided(x), want)


def test_a_training_step_is_that_of_direct_convolutions(monkeypatch) -> None:
    torch.manual_seed(0)
    model = FewShotUNet("resnet18", output_stride=8).train()
    masks = torch.zeros(4, 1, 64, 64, dtype=torch.long)
    masks[..., 16:48, 8:40] = 1
    images = torch.randn(2, 4, 1, 3, 64, 64)
    episode = Episode(images[0], masks, images[1], masks, 2, "random")
    calls = []
    apply = winograd._Winograd.apply
    monkeypatch.setattr(winograd._Winograd, "apply", lambda *args: calls.append(1) or apply(*args))
    losses, grads = [], []
    for network, least in ((model, winograd._LEAST_CHANNELS), (copy.deepcopy(model), 10**6)):
        monkeypatch.setattr(winograd, "_LEAST_CHANNELS", least)
        total, _, _ = EpisodeLoss(align=0, cycle=0)(network, episode)
        total.backward()
        losses.append(total.item())
        grads.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
        assert bool(calls) == (network is model)
        calls.clear()
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    # Twenty normalisations of few values amplify the rounding a hundred times.
    assert (grads[0] - grads[1]).norm() < 1e-2 * grads[1].norm()
