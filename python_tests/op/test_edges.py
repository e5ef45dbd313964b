# SPDX-License-Identifier: Apache-2.0
"""Every edge the specification names, on the native op and on the reference."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.problems import Problem
from torch import Tensor

from fastproto import InputError, proto_attention

BACKENDS = ["native", "reference"]


def offsets_of(*counts: int) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0).to(torch.int32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_bag_gives_zero_and_no_gradient(backend: str) -> None:
    feat = torch.rand(1, 1, 8, 3, 3, requires_grad=True)
    protos = torch.rand(0, 8, requires_grad=True)
    out = proto_attention(feat, protos, offsets_of(0), backend=backend)
    assert torch.equal(out[0, 0, 0, :8], feat[0, 0])
    assert torch.equal(out[0, 0, 0, 8:], torch.zeros(8, 3, 3))
    out[:, :, :, 8:].sum().backward()
    assert torch.equal(feat.grad, torch.zeros_like(feat))
    assert protos.grad is None or protos.grad.shape == (0, 8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_prototype_has_weight_one_exactly(backend: str) -> None:
    feat = torch.rand(1, 2, 33, 5, 5)
    protos = torch.rand(1, 33)
    out = proto_attention(feat, protos, offsets_of(1), concat=False, backend=backend)
    assert torch.equal(out[:, :, 0], feat * protos.reshape(1, 1, 33, 1, 1))


def test_one_prototype_gets_no_gradient_through_its_weight() -> None:
    feat = torch.rand(1, 1, 16, 4, 4, requires_grad=True)
    protos = torch.rand(1, 16, requires_grad=True)
    t = torch.tensor(0.05, requires_grad=True)
    proto_attention(
        feat, protos, offsets_of(1), temperature=t, concat=False, backend="native"
    ).sum().backward()
    expected = protos.detach().reshape(1, 1, 16, 1, 1).expand_as(feat)
    assert torch.equal(feat.grad, expected)
    assert torch.allclose(protos.grad[0], feat.detach().sum(dim=(0, 1, 3, 4)))
    assert t.grad.item() == 0


@pytest.mark.parametrize("value", [0.0, 0.1, 100.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_constant_feature_has_cosine_zero_with_everything(
    value: float, dtype: torch.dtype
) -> None:
    protos = torch.rand(7, 48, dtype=torch.float64).to(dtype)
    protos[3] = value  # also with a constant prototype
    feat = torch.full((1, 1, 48, 2, 2), value, dtype=dtype)
    out = proto_attention(feat, protos, offsets_of(7), concat=False, backend="native")
    mean = protos.double().mean(dim=0).reshape(1, 1, 1, 48, 1, 1)
    expected = mean * feat.double().unsqueeze(2)
    # Roundings in float64: a mean of seven has 7 here and 8 in the kernel, and F and G * F one each.
    tolerance = 17 / 2 * torch.finfo(dtype).eps
    assert torch.allclose(out.double(), expected, rtol=tolerance, atol=0)


@pytest.mark.parametrize("problem_dtype", [torch.float32, torch.bfloat16])
def test_constant_vectors_have_finite_gradients(problem_dtype: torch.dtype) -> None:
    problem = Problem("c", ((12, 7),), dim=64, mean=3.0, constant=True)
    feat, protos, offsets = problem.make(problem_dtype)
    feat.requires_grad_()
    protos.requires_grad_()
    proto_attention(feat, protos, offsets, backend="native").float().square().mean().backward()
    assert feat.grad.isfinite().all()
    assert protos.grad.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("count", [1, 2, 70])
def test_bad_values_propagate_as_in_the_reference(bad: float, count: int) -> None:
    generator = torch.Generator().manual_seed(1)
    feat = torch.rand(1, 1, 20, 4, 4, generator=generator)
    protos = torch.rand(count, 20, generator=generator)
    feat[0, 0, 3, 1, 2] = bad
    offsets = offsets_of(count)
    outs = [proto_attention(feat, protos, offsets, backend=b) for b in BACKENDS]
    assert outs[0].isnan().any()
    assert torch.equal(outs[0].isnan(), outs[1].isnan())
    protos[0, 5] = bad
    outs = [proto_attention(feat, protos, offsets, backend=b) for b in BACKENDS]
    assert outs[0][..., 20:, :, :].isnan().all()
    assert torch.equal(outs[0].isnan(), outs[1].isnan())


def test_spare_rows_change_nothing_and_get_zero_gradient() -> None:
    problem = Problem("spare", ((8, 2),), dim=48, height=4, width=4, spare=11)
    feat, protos, offsets = problem.make()
    protos[10:] = float("nan")  # never looked at
    protos.requires_grad_()
    out = proto_attention(feat, protos, offsets, backend="native")
    trimmed = proto_attention(feat, protos[:10].detach(), offsets, backend="native")
    assert torch.equal(out.detach(), trimmed)
    out.sum().backward()
    assert torch.equal(protos.grad[10:], torch.zeros(11, 48))
    assert protos.grad[:10].abs().sum() > 0


def test_no_queries_and_no_pixels() -> None:
    protos = torch.rand(3, 8, requires_grad=True)
    out = proto_attention(torch.rand(1, 0, 8, 4, 4), protos, offsets_of(3), backend="native")
    assert out.shape == (1, 0, 1, 16, 4, 4)
    out.sum().backward()
    assert torch.equal(protos.grad, torch.zeros(3, 8))


@pytest.mark.parametrize(("dim", "count"), [(1, 8), (4, 600), (8, 200), (63, 64)])
def test_more_prototypes_than_channels_stay_in_their_scratch(
    dim: int, count: int, tmp_path: Path
) -> None:
    """In a process of its own: scratch memory is kept per thread and only ever grows."""
    code = (
        "import torch; torch.set_num_threads(1); from fastproto import proto_attention\n"
        f"feat = torch.rand(1, 1, {dim}, 8, 8, requires_grad=True)\n"
        f"protos = torch.rand({count}, {dim}, requires_grad=True)\n"
        f"offsets = torch.tensor([0, {count}], dtype=torch.int32)\n"
        "for _ in 'abc': proto_attention(feat, protos, offsets).sum().backward()\n"
        "junk = [torch.rand(n) for n in range(1000)]; print('fine')"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout.strip() == "fine", result.stderr


def test_overlapping_pixels() -> None:
    generator = torch.Generator().manual_seed(0)
    windows = torch.randn(70, generator=generator).unfold(0, 32, 1)  # both strides are 1
    feat = windows.T[None, None, :, None, :]
    protos = torch.randn(3, 32, generator=generator)
    ours, truth = (proto_attention(feat, protos, offsets_of(3), backend=b) for b in BACKENDS)
    assert torch.allclose(ours, truth, atol=1e-6)


@pytest.mark.parametrize("temperature", [2 / 87, 0.0231, 2 / 60, 0.034])
def test_weights_far_below_the_bound_keep_their_digits(temperature: float) -> None:
    feat = torch.rand(1, 1, 64, 4, 4, generator=torch.Generator().manual_seed(0))
    protos = (-1e-4 * feat).flatten(3)[0, 0].T[:5].contiguous()
    ours = proto_attention(feat, protos, offsets_of(5), temperature=temperature, concat=False)
    truth = proto_attention(
        feat.double(), protos.double(), offsets_of(5), temperature=temperature, concat=False
    )
    assert torch.allclose(ours.double(), truth, rtol=2e-5, atol=0)


def good() -> dict[str, object]:
    return {
        "feat": torch.rand(2, 1, 8, 3, 3),
        "protos": torch.rand(6, 8),
        "offsets": torch.tensor([0, 2, 6], dtype=torch.int32),
        "temperature": 0.05,
        "eps": 1e-6,
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("argument", "value", "words"),
    [
        ("temperature", 0.0, "number above 0"),
        ("temperature", -1.0, "-1.0"),
        ("temperature", float("nan"), "nan"),
        ("temperature", torch.tensor(-1.0), "-1.0"),
        ("temperature", torch.ones(2), "one element"),
        ("eps", 0.0, "number above 0"),
        ("feat", torch.rand(2, 8, 3, 3), "[E, Q, D, H, W]"),
        ("feat", torch.ones(2, 1, 8, 3, 3, dtype=torch.int64), "torch.int64"),
        ("protos", torch.rand(6, 7), "D of feat, 8"),
        ("protos", torch.rand(6, 8, dtype=torch.float64), "torch.float64"),
        ("offsets", torch.tensor([0, 2, 6]), "torch.int32"),
        ("temperature", torch.tensor(0.05, device="meta"), "device of feat"),
        ("offsets", torch.tensor([0, 6], dtype=torch.int32), "E*K + 1"),
        ("offsets", torch.tensor([0], dtype=torch.int32), "E and K at least 1"),
        ("offsets", torch.tensor([0, 4, 2], dtype=torch.int32), "never fall"),
        ("offsets", torch.tensor([1, 4, 6], dtype=torch.int32), "first 0"),
        ("offsets", torch.tensor([0, 4, 7], dtype=torch.int32), "rows of protos, 6"),
    ],
)
def test_errors_name_the_argument(backend: str, argument: str, value: object, words: str) -> None:
    arguments = good() | {argument: value}
    feat, protos, offsets = (arguments.pop(k) for k in ("feat", "protos", "offsets"))
    with pytest.raises(InputError) as caught:
        proto_attention(feat, protos, offsets, backend=backend, **arguments)

    assert caught.value.subject == argument
    assert words in str(caught.value)


@pytest.mark.parametrize("name", ["feat", "protos", "offsets"])
def test_the_library_checks_what_it_is_given(name: str) -> None:
    arguments = good()
    arguments[name] = arguments[name].unsqueeze(0).unsqueeze(0)
    with pytest.raises(RuntimeError, match=f"proto_attention: {name}: found [0-9] dimensions"):
        torch.ops.fastproto.proto_attention_fwd(
            arguments["feat"],
            arguments["protos"],
            arguments["offsets"],
            None,
            0.05,
            1e-6,
            True,
            False,
        )
