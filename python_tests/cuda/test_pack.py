# SPDX-License-Identifier: Apache-2.0
"""Prototypes packed by the CUDA kernels, emulated on the CPU, against the same in plain PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fastproto import _library, autograd, packing
from fastproto.nn import class_masks, extract_prototypes, prototypes

Pack = Callable[[Tensor, Tensor, float, bool], tuple[Tensor, Tensor]]


@pytest.fixture(scope="session")
def ops(gpu: ModuleType) -> Any:
    """The emulated ops, registered like the native ones."""
    ops = torch.ops.fastproto_emulated
    name = "fastproto_emulated::pack_prototypes"
    pair = autograd.library_pair("native", name, f"{name}_bwd")
    torch.library.register_fake(pair.forward, packing.fake_forward)
    torch.library.register_fake(pair.backward, packing.fake_backward)
    packing.register(pair)
    ops.pair = pair
    return ops


@pytest.fixture(scope="session")
def emulated(ops: Any) -> Pack:
    """What ``extract_prototypes`` calls."""
    return functools.partial(packing.call, ops.pair)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN and the largest integers, so a row that nobody writes shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def problem(
    episodes: int,
    shots: int,
    dim: int,
    size: tuple[int, int],
    classes: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Features, and masks of twice their size.

    The last class is nowhere, the one before fills no cell. The others leave pixels of no class.
    """
    height, width = size
    features = torch.randn(episodes, shots, dim, height, width).to(dtype)
    labels = torch.randint(0, classes - 1, (episodes, shots, height * 2, width * 2))
    labels[labels == classes - 2] = -1
    labels[:, 0, 0, 0] = classes - 2
    return features, class_masks(labels, classes)


Both = Callable[..., list[prototypes.Prototypes]]


@pytest.fixture
def both(emulated: Pack, monkeypatch: pytest.MonkeyPatch) -> Both:
    """By the kernels, and by plain PyTorch."""

    def extract(features: Tensor, masks: Tensor, **options: Any) -> list[prototypes.Prototypes]:
        plain = extract_prototypes(features, masks, backend="reference", **options)
        with monkeypatch.context() as patch:
            patch.setattr(prototypes, "_packing_kernel", lambda *arguments: emulated)
            return [extract_prototypes(features, masks, **options), plain]

    return extract


@pytest.fixture
def assert_same(both: Both) -> Any:
    """Same offsets; same kept rows to the bit; averages close; gradients close."""

    def check(features: Tensor, masks: Tensor, **options: Any) -> None:
        features = features.detach().requires_grad_()
        found, expected = both(features, masks, **options)
        assert found.offsets.dtype == torch.int32
        assert torch.equal(found.offsets, expected.offsets)
        assert found.protos.dtype == expected.protos.dtype
        assert found.protos.shape == expected.protos.shape
        tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
        close = tolerance[features.dtype]
        torch.testing.assert_close(found.protos, expected.protos, rtol=close, atol=close)
        assert not found.protos[int(found.offsets[-1]) :].any()
        kept = features.detach().transpose(2, 3).transpose(3, 4).flatten(0, 3)
        rows = found.protos.detach()[: int(found.offsets[-1])]
        copies = (rows[:, None] == kept).all(dim=2).any(dim=1)
        averages = found.offsets.numel() - 1
        assert int((~copies).sum()) <= averages
        grad = torch.randn_like(expected.protos)
        (found_grad,) = torch.autograd.grad(found.protos, features, grad)
        (expected_grad,) = torch.autograd.grad(expected.protos, features, grad)
        assert found_grad.dtype == features.dtype
        torch.testing.assert_close(found_grad, expected_grad, rtol=4 * close, atol=4 * close)

    return check


@pytest.mark.parametrize("append_global", [False, True])
@pytest.mark.parametrize("threshold", [0, 0.25, 0.3, 0.5, 0.9])
@pytest.mark.usefixtures("poisoned")
def test_thresholds(assert_same: Any, threshold: float, append_global: bool) -> None:
    features, masks = problem(2, 3, 20, (3, 4), 5)
    assert_same(features, masks, threshold=threshold, append_global=append_global)


@pytest.mark.parametrize(
    ("episodes", "shots", "dim", "size", "classes"),
    [
        (1, 1, 1, (1, 1), 3),
        (1, 1, 16, (1, 5), 3),
        (1, 1, 64, (6, 1), 3),
        (3, 2, 65, (2, 2), 3),
        (1, 1, 3, (19, 17), 3),  # more pixels than a tile
        (1, 4, 2, (17, 16), 3),  # more cells than are counted at a time
        (1, 2, 150, (7, 5), 3),  # chunks of channels, the last one not full
        (12, 1, 2, (1, 2), 3),  # more bags than a warp has lanes
    ],
)
@pytest.mark.usefixtures("poisoned")
def test_shapes(
    assert_same: Any, episodes: int, shots: int, dim: int, size: tuple[int, int], classes: int
) -> None:
    features, masks = problem(episodes, shots, dim, size, classes)
    assert_same(features, masks, append_global=True)
    assert_same(features, masks)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_half_types(assert_same: Any, dtype: torch.dtype, channels_last: bool) -> None:
    features, masks = problem(2, 2, 40, (3, 5), 4, dtype=dtype)
    if channels_last:
        features = features.movedim(2, -1).contiguous().movedim(-1, 2)
    assert_same(features, masks, append_global=True)


@pytest.mark.usefixtures("poisoned")
def test_nothing_and_everything(assert_same: Any, both: Both) -> None:
    features = torch.randn(1, 2, 5, 3, 3)
    for masks in (torch.zeros(1, 2, 2, 6, 6), torch.ones(1, 2, 2, 6, 6)):
        assert_same(features, masks)
        assert_same(features, masks, append_global=True)
    one = torch.zeros(1, 2, 2, 48, 48)
    one[0, 1, 0, 17, 47] = 1
    assert_same(features, one)
    found = both(features, one)[0]
    assert found.counts() == [[1, 0]]
    torch.testing.assert_close(found.protos[0], features[0, 1, :, 1, 2])


def test_shares_whose_sum_is_no_normal_number(assert_same: Any) -> None:
    masks = torch.zeros(1, 1, 2, 2, 2)
    masks[0, 0, 0, 0, 0] = 2.0**-130
    assert_same(torch.randn(1, 1, 3, 2, 2), masks)


@pytest.mark.usefixtures("poisoned")
def test_fractional_masks_at_the_threshold(assert_same: Any) -> None:
    """A share is kept if it is above the threshold in float32, whichever number that is."""
    for threshold in (0.1, 0.3, 0.7):
        masks = torch.full((1, 1, 2, 3, 3), threshold)
        masks[..., 0, 1] = torch.nextafter(masks[..., 0, 1], torch.tensor(1.0))
        assert_same(torch.randn(1, 1, 4, 3, 3), masks, threshold=threshold)


def layouts() -> dict[str, Tensor]:
    whole = torch.randn(2, 5, 12, 4, 6)
    joint = torch.randn(10, 12, 4, 6).to(memory_format=torch.channels_last)
    return {
        "support of an episode": whole.split((3, 2), dim=1)[0],
        "channels_last": joint[:6].unflatten(0, (2, 3)),
        "channels_last support": joint.unflatten(0, (2, 5)).split((3, 2), dim=1)[0],
        "episodes inside": whole[:, :3].transpose(0, 1).contiguous().transpose(0, 1),
        "expanded": whole[:, :1].expand(2, 3, 12, 4, 6),
        "transposed pixels": torch.randn(2, 3, 12, 6, 4).transpose(3, 4),
        "cropped": torch.randn(2, 3, 12, 5, 9)[..., :4, 1:7],
    }


@pytest.mark.parametrize("name", list(layouts()))
@pytest.mark.usefixtures("poisoned")
def test_layouts(assert_same: Any, both: Both, name: str) -> None:
    features = layouts()[name]
    _, masks = problem(2, 3, 1, (4, 6), 4)
    assert_same(features, masks, append_global=True)
    found = both(features.requires_grad_(), masks)[0].protos
    (grad,) = torch.autograd.grad(found.sum(), features)
    if name.startswith("channels_last"):
        assert grad.stride(2) == 1


def test_second_derivative_is_refused(both: Both) -> None:
    features, masks = problem(1, 1, 3, (2, 2), 3)
    features.requires_grad_()
    protos = both(features, masks)[0].protos
    (grad,) = torch.autograd.grad(protos.square().sum(), features, create_graph=True)
    with pytest.raises(NotImplementedError, match="extract_prototypes: the native backend"):
        torch.autograd.grad(grad.sum(), features)


def test_same_bits_every_time(emulated: Pack) -> None:
    features, share = torch.randn(2, 3, 20, 4, 4).requires_grad_(), torch.rand(2, 2, 48)
    first, second = (
        (protos, *torch.autograd.grad(protos.square().sum(), features))
        for protos, _ in (emulated(features, share, 0.5, True) for _ in range(2))
    )
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_op_registration(ops: Any) -> None:
    share = torch.rand(2, 2, 12)
    share[1, 0] = 0
    for features in (torch.randn(2, 2, 5, 2, 3), layouts()["channels_last"][:, :2, :, :2, :3]):
        arguments = (features.detach().requires_grad_(), share, 0.4, True)
        torch.library.opcheck(ops.pack_prototypes.default, arguments)


def test_one_graph_for_every_shape(emulated: Pack) -> None:
    compiled = torch.compile(emulated, fullgraph=True, backend="aot_eager", dynamic=True)
    for episodes, shots, size, classes in ((2, 3, (4, 5), 3), (3, 2, (5, 6), 4)):
        features = torch.randn(episodes, shots, 20, *size)
        share = torch.rand(episodes, classes, shots * size[0] * size[1])
        leaves = [features.clone().requires_grad_() for _ in range(2)]
        found, expected = (
            f(leaf, share, 0.5, False) for f, leaf in zip((compiled, emulated), leaves, strict=True)
        )
        for a, b, leaf in zip(found, expected, leaves, strict=True):
            assert torch.equal(a, b)
            leaf.grad = None
        for (protos, _), leaf in zip((found, expected), leaves, strict=True):
            protos.square().sum().backward()
            assert leaf.grad is not None
        assert torch.equal(leaves[0].grad, leaves[1].grad)


def test_offsets_that_nothing_wrote_touch_no_memory(ops: Any) -> None:
    """The backward's own arguments, garbled: NaN, and no access out of bounds."""
    features, share = torch.randn(1, 1, 8, 2, 2), torch.rand(1, 2, 4)
    protos, offsets, position, mass = ops.pack_prototypes.default(features, share, 0.0, True)
    for wrong in (-7, 2**31 - 1, 2**30):
        offsets[1] = wrong
        grad = ops.pack_prototypes_bwd.default(
            torch.ones_like(protos), share, position, mass, offsets, 2, 2, False
        )
        assert grad.isnan().all()


def test_wrong_arguments_are_refused(ops: Any) -> None:
    features, share = torch.randn(1, 1, 8, 2, 2), torch.rand(1, 2, 4)
    pack = ops.pack_prototypes.default
    for arguments, words in (
        ((features[0], share, 0.5, True), "features: found 4 dimensions"),
        ((features, share.double(), 0.5, True), "share: found another dtype"),
        ((features, share[..., :3], 0.5, True), "share: found other sizes"),
        ((features.double(), share, 0.5, True), "features: found another dtype"),
        ((features[:, :, :0], share, 0.5, True), "features: found no element"),
    ):
        with pytest.raises(RuntimeError, match=words):
            pack(*arguments)
    big = torch.empty(1).expand(1, 1, 1, 2**15, 2**15)
    with pytest.raises(RuntimeError, match="masks: found 2 bags"):
        pack(big, torch.empty(1).expand(1, 2, 2**30), 0.5, True)


@pytest.mark.skipif(_library.why_not_cpu() is not None, reason="there is no native code")
def test_the_native_op_has_the_same_schema(ops: Any) -> None:
    from fastproto import ops as native

    assert native.pack_prototypes is not None
    for name in ("pack_prototypes", "pack_prototypes_bwd"):
        ours = str(getattr(torch.ops.fastproto, name).default._schema)
        assert ours.replace("fastproto::", "") == str(getattr(ops, name).default._schema).replace(
            "fastproto_emulated::", ""
        )
