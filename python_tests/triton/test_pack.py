# SPDX-License-Identifier: Apache-2.0
"""Prototypes packed by the Triton kernels, against the same in plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from fastproto import proto_attention
from fastproto.errors import ArgumentError
from fastproto.nn import FewShotUNet, PrototypeNet, class_masks, extract_prototypes
from fastproto.triton import pack_launch, support

if not support.INTERPRETED:
    pytest.skip("runs in the interpreter's process", allow_module_level=True)


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
    *,
    cell: int = 2,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Features and masks; the last class is nowhere, the one before fills no cell.

    The others leave pixels of no class.
    """
    height, width = size
    features = torch.randn(episodes, shots, dim, height, width).to(dtype)
    labels = torch.randint(0, classes - 1, (episodes, shots, height * cell, width * cell))
    labels[labels == classes - 2] = -1
    labels[:, 0, 0, 0] = classes - 2
    return features, class_masks(labels, classes)


def both(features: Tensor, masks: Tensor, **options: object) -> list[tuple[Tensor, Tensor]]:
    found = []
    for backend in ("triton", "reference"):
        prototypes = extract_prototypes(features, masks, backend=backend, **options)
        found.append((prototypes.protos, prototypes.offsets))
    return found


def assert_same(features: Tensor, masks: Tensor, **options: object) -> None:
    """Same offsets; same kept rows to the bit; averages close; gradients close."""
    features = features.detach().requires_grad_()
    (protos, offsets), (expected, bounds) = both(features, masks, **options)
    assert offsets.dtype == torch.int32
    assert torch.equal(offsets, bounds)
    assert protos.shape == expected.shape
    assert protos.dtype == expected.dtype
    tolerance = 2e-3 if features.dtype == torch.float16 else 1e-5
    torch.testing.assert_close(protos, expected, rtol=tolerance, atol=tolerance)
    assert not protos[int(offsets[-1]) :].any()
    grad = torch.randn_like(expected)
    (found_grad,) = torch.autograd.grad(protos, features, grad)
    (expected_grad,) = torch.autograd.grad(expected, features, grad)
    assert found_grad.dtype == features.dtype
    torch.testing.assert_close(found_grad, expected_grad, rtol=4 * tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("append_global", [False, True])
@pytest.mark.parametrize("threshold", [0, 0.25, 0.3, 0.5, 0.9])
@pytest.mark.usefixtures("poisoned")
def test_thresholds(threshold: float, append_global: bool) -> None:
    features, masks = problem(2, 3, 20, (3, 4), 5)
    assert_same(features, masks, threshold=threshold, append_global=append_global)


@pytest.mark.parametrize(
    ("episodes", "shots", "dim", "size", "classes"),
    [
        (1, 1, 1, (1, 1), 3),
        (1, 1, 16, (1, 5), 3),
        (1, 1, 64, (6, 1), 3),
        (3, 2, 65, (2, 2), 3),
        (1, 1, 3, (19, 17), 3),  # more pixels than a tile of any kernel
        (1, 4, 2, (17, 16), 3),  # more cells than are counted at a time
        (1, 2, 150, (7, 5), 3),  # chunks of channels, the last one not full
    ],
)
@pytest.mark.usefixtures("poisoned")
def test_shapes(episodes: int, shots: int, dim: int, size: tuple[int, int], classes: int) -> None:
    features, masks = problem(episodes, shots, dim, size, classes)
    assert_same(features, masks, append_global=True)
    assert_same(features, masks)


@pytest.mark.usefixtures("poisoned")
def test_more_bags_than_are_read_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack_launch, "search_block", lambda bags: 4)
    features, masks = problem(3, 1, 2, (1, 2), 5)
    assert_same(features, masks, append_global=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    features, masks = problem(2, 2, 24, (3, 5), 4, dtype=dtype)
    assert_same(features, masks.to(dtype) if dtype == torch.float64 else masks, append_global=True)


@pytest.mark.usefixtures("poisoned")
def test_nothing_and_everything() -> None:
    features = torch.randn(1, 2, 5, 3, 3)
    for masks in (torch.zeros(1, 2, 2, 6, 6), torch.ones(1, 2, 2, 6, 6)):
        assert_same(features, masks)
        assert_same(features, masks, append_global=True)
    prototypes = extract_prototypes(features, torch.zeros(1, 2, 2, 6, 6), backend="triton")
    assert prototypes.counts() == [[0, 0]]
    one = torch.zeros(1, 2, 2, 48, 48)
    one[0, 1, 0, 17, 47] = 1
    assert_same(features, one)
    prototypes = extract_prototypes(features, one, backend="triton")
    assert prototypes.counts() == [[1, 0]]
    torch.testing.assert_close(prototypes.protos[0], features[0, 1, :, 1, 2])


@pytest.mark.usefixtures("poisoned")
def test_fractional_masks_at_the_threshold() -> None:
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
        "query of an episode": whole.split((2, 3), dim=1)[1],
        "channels_last": joint[:6].unflatten(0, (2, 3)),
        "channels_last support": joint.unflatten(0, (2, 5)).split((3, 2), dim=1)[0],
        "episodes inside": whole[:, :3].transpose(0, 1).contiguous().transpose(0, 1),
        "expanded": whole[:, :1].expand(2, 3, 12, 4, 6),
        "transposed pixels": torch.randn(2, 3, 12, 6, 4).transpose(3, 4),
        "cropped": torch.randn(2, 3, 12, 5, 9)[..., :4, 1:7],
    }


@pytest.mark.parametrize("name", list(layouts()))
@pytest.mark.usefixtures("poisoned")
def test_layouts(name: str) -> None:
    features = layouts()[name]
    _, masks = problem(2, 3, 1, (4, 6), 4)
    assert_same(features, masks, append_global=True)
    found = extract_prototypes(features.requires_grad_(), masks, backend="triton").protos
    (grad,) = torch.autograd.grad(found.sum(), features)
    if name.startswith("channels_last"):
        assert grad.stride(2) == 1


def test_memory_format_of_the_masks_does_not_matter() -> None:
    features, masks = problem(2, 1, 4, (3, 3), 3)
    permuted = masks.flatten(0, 1).to(memory_format=torch.channels_last).unflatten(0, (2, 1))
    assert_same(features, permuted, append_global=True)


def test_gradcheck() -> None:
    features, masks = problem(2, 1, 2, (1, 3), 3, dtype=torch.float64)
    features.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda f: (
            extract_prototypes(f, masks, threshold=0.3, append_global=True, backend="triton").protos
        ),
        features,
    )


def test_second_derivative_is_refused() -> None:
    features, masks = problem(1, 1, 3, (2, 2), 3)
    features.requires_grad_()
    protos = extract_prototypes(features, masks, backend="triton").protos
    (grad,) = torch.autograd.grad(protos.square().sum(), features, create_graph=True)
    with pytest.raises(NotImplementedError, match="extract_prototypes: the triton backend"):
        torch.autograd.grad(grad.sum(), features)


def test_gradient_of_the_masks_is_plain_pytorch() -> None:
    features, masks = problem(1, 2, 3, (2, 2), 3)
    grads = []
    for backend in ("triton", "reference"):
        masks = masks.detach().requires_grad_()
        protos = extract_prototypes(features, masks, append_global=True, backend=backend).protos
        grads += torch.autograd.grad(protos.square().sum(), masks)
    assert grads[0].any()
    assert torch.equal(*grads)


def test_same_bits_every_time() -> None:
    features, masks = problem(2, 3, 20, (4, 4), 4)
    features.requires_grad_()
    runs = []
    for _ in range(2):
        protos = extract_prototypes(features, masks, append_global=True, backend="triton").protos
        (grad,) = torch.autograd.grad(protos.square().sum(), features)
        runs.append((protos, grad))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


def test_op_registration() -> None:
    features, masks = problem(2, 2, 5, (2, 3), 3)
    share = nn.functional.avg_pool2d(masks.flatten(0, 1), 2).unflatten(0, (2, 2))
    share = share.transpose(1, 2).flatten(2)
    for inputs in (features, layouts()["channels_last support"][:, :2, :, :2, :3]):
        arguments = (inputs.detach().requires_grad_(), share, 0.4, True)
        torch.library.opcheck(torch.ops.fastproto.triton_pack.default, arguments)


def test_one_graph_with_the_attention() -> None:
    features, masks = problem(2, 3, 20, (4, 3), 3)
    feat = torch.randn(2, 2, 20, 4, 3)

    def enhance(features: Tensor, masks: Tensor, feat: Tensor) -> Tensor:
        prototypes = extract_prototypes(features, masks, append_global=True, backend="triton")
        return proto_attention(feat, prototypes.protos, prototypes.offsets, backend="triton")

    compiled = torch.compile(enhance, fullgraph=True, backend="aot_eager")
    results = []
    for function in (compiled, enhance):
        leaves = [features.clone().requires_grad_(), feat.clone().requires_grad_()]
        out = function(leaves[0], masks, leaves[1])
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def test_one_graph_for_every_shape() -> None:
    def extract(features: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        prototypes = extract_prototypes(features, masks, backend="triton")
        return prototypes.protos, prototypes.offsets

    compiled = torch.compile(extract, fullgraph=True, backend="aot_eager", dynamic=True)
    for episodes, shots, size, classes in ((2, 3, (4, 5), 3), (3, 2, (5, 6), 4)):
        features, masks = problem(episodes, shots, 20, size, classes)
        leaves = [features.clone().requires_grad_() for _ in range(2)]
        found, expected = compiled(leaves[0], masks), extract(leaves[1], masks)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
        for (protos, _), leaf in zip((found, expected), leaves, strict=True):
            protos.square().sum().backward()
            assert leaf.grad is not None
        assert torch.equal(leaves[0].grad, leaves[1].grad)


def stripes(episodes: int, images: int, height: int, width: int) -> Tensor:
    """Labels 0, 1, 2 from left to right, the last too narrow for a cell."""
    labels = torch.zeros(episodes, images, height, width, dtype=torch.long)
    labels[..., width // 2 :] = 1
    labels[..., width - 3 :] = 2
    return labels


@pytest.mark.slow
def test_network() -> None:
    """Logits and gradients are those of the reference."""
    model = FewShotUNet("resnet18")
    images, queries = torch.randn(2, 2, 3, 20, 32), torch.randn(2, 1, 3, 20, 32)
    masks = stripes(2, 2, 20, 32)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    results: list[dict[str, Tensor]] = []
    for backend in ("triton", "reference"):
        model.load_state_dict(state)
        model.backend = backend
        model.eval()
        with torch.no_grad():
            found = {"evaluation": model(images, masks, queries, num_classes=4)}
        model.train()
        model.zero_grad()
        found["training"] = model(images, masks, queries, num_classes=4)
        found["training"].square().mean().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            found[name] = parameter.grad.clone()
        results.append(found)
    for name, value in results[0].items():
        expected = results[1][name]
        # A bias before a batch normalisation has a gradient of rounding errors alone.
        scale = max(expected.abs().max().item(), 1e-4)
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-3 * scale)


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
def test_network_is_one_graph(training: bool) -> None:
    model = FewShotUNet("resnet18", backend="triton").train(training)
    images, queries = torch.randn(1, 2, 3, 16, 32), torch.randn(1, 1, 3, 16, 32)
    masks = stripes(1, 2, 16, 32)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        expected = model(images, masks, queries, 3)
    model.load_state_dict(state)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(training):
        found = compiled(images, masks, queries, 3)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    if training:
        found.square().mean().backward()
        assert model.encoder.conv1.weight.grad is not None
        assert model.encoder.conv1.weight.grad.isfinite().all()


def test_the_baseline_takes_the_backend_of_its_network() -> None:
    model = FewShotUNet("resnet18", backend="triton").eval()
    baseline = PrototypeNet.from_unet(model)
    assert baseline.backend == "triton"
    images, masks = torch.randn(1, 1, 3, 32, 32), stripes(1, 1, 32, 32)
    with torch.no_grad():
        found = baseline(images, masks, images, 3)
        baseline.backend = "reference"
        torch.testing.assert_close(found, baseline(images, masks, images, 3))


def test_too_many_rows_for_the_offsets() -> None:
    features = torch.empty(1, 1, 4, 2**15, 2**15, device="meta")
    share = torch.empty(1, 2, 2**30, device="meta")
    with pytest.raises(ArgumentError) as caught:
        pack_launch.run_pack(lambda launch: None, features, share, 0.5, False)
    assert caught.value.subject == "masks"
