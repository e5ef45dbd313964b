# SPDX-License-Identifier: Apache-2.0
"""Which CUDA kernels a problem runs with: a pure function, for chips that are not here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.problems import PROBLEMS, Problem
from torch._subclasses import FakeTensorMode

from fastproto import _C, InputError, proto_attention
from fastproto.op import backends, chips, library, native
from fastproto.op.triton import support

KIB = 1024
CHIPS = {
    "H200": {"capability": 90, "multiprocessors": 132, "shared_memory": 227 * KIB},
    "A100": {"capability": 80, "multiprocessors": 108, "shared_memory": 163 * KIB},
    "RTX 4090": {"capability": 89, "multiprocessors": 128, "shared_memory": 99 * KIB},
    "B200": {"capability": 100, "multiprocessors": 148, "shared_memory": 227 * KIB},
}
KERNELS = ("forward", "backward_query", "backward_protos")
ONE = {"episodes": 1, "queries": 1, "ways": 1, "dim": 512, "pixels": 256, "total": 64}
MANY = ONE | {"episodes": 512, "total": 512 * 256}


def plan(chip: str = "H200", dtype: str = "bfloat16", **changes: Any) -> dict[str, Any]:
    return _C.cuda_plan(**(CHIPS[chip] | {"dtype": dtype} | ONE | changes))


def check(found: dict[str, Any], sizes: dict[str, int], chip: str, has_backward: bool) -> None:
    """Every pixel, prototype and channel has a block, and every block has room."""
    images, ways = sizes["episodes"] * sizes["queries"], sizes["ways"]
    tiles = {
        name: -(-sizes["pixels"] // found[name]["tile_m"]) for name in KERNELS[: 1 + has_backward]
    }
    work = {"forward": images * ways * tiles["forward"]}
    if has_backward:
        work["backward_query"] = images * tiles["backward_query"]
        # Bags begin anywhere: one tile more for each, and one for the rows of none.
        rows = sizes["total"] // found["backward_protos"]["tile_n"]
        work["backward_protos"] = rows + sizes["episodes"] * ways + 1
    for name, count in work.items():
        one = found[name]
        assert one["shared_bytes"] <= CHIPS[chip]["shared_memory"]
        assert one["dim"] >= sizes["dim"]
        assert one["dim"] % one["slices"] == one["threads"] % 32 == 0
        assert one["blocks"] % one["cluster"] == 0
        if name == "forward" and one["kernel"] == "sm90 throughput":  # blocks take turns
            assert one["blocks"] == min(count, CHIPS[chip]["multiprocessors"])
        else:
            shared = "slices" if name == "forward" else "cluster"  # by blocks
            assert one["blocks"] == count * max(one["slices"], one[shared])
        assert one["kernel"].startswith("sm80") or chip == "H200"
    if found["stats"]["kernel"] != "none":
        assert found["stats"]["blocks"] * found["stats"]["tile_n"] >= sizes["total"]
    assert found["reasons"]
    assert all(reason.endswith(".") for reason in found["reasons"])


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("save", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("tma_ok", [False, True], ids=["odd", "aligned"])
def test_every_problem_has_a_plan_that_covers_it_and_fits(
    chip: str, dtype: str, save: bool, tma_ok: bool
) -> None:
    for sizes in [*(problem.sizes for problem in PROBLEMS), ONE, MANY]:
        if (chip, dtype, save) == ("RTX 4090", "float32", True) and sizes["dim"] > 256:
            with pytest.raises(ValueError, match="bytes of shared memory"):
                plan(chip, dtype, save=save, tma_ok=tma_ok, **sizes)
            continue
        found = plan(chip, dtype, save=save, tma_ok=tma_ok, **sizes)
        check(found, sizes, chip, save)


def test_one_image_and_one_class_fill_the_chip() -> None:
    for chip in ("H200", "A100", "B200"):
        found = plan(chip)
        assert "latency" in found["forward"]["kernel"]
        assert found["forward"]["blocks"] == 128
        assert found["stats"]["kernel"] == "none"  # one launch
        assert plan(chip, save=True)["stats"]["kernel"] != "none"  # the backward needs them
        assert plan(chip, "float32")["stats"]["kernel"] != "none"


def test_many_images_run_at_throughput() -> None:
    assert plan(**MANY)["forward"]["kernel"] == "sm90 throughput"
    for chip in ("A100", "B200"):
        found = plan(chip, **MANY)
        assert found["forward"]["kernel"] == "sm80 throughput"
        assert found["forward"]["tile_m"] == 64
        assert all(found[name]["slices"] == 1 for name in KERNELS)
    for small in (plan("RTX 4090", **MANY), plan("H200", "float32", **MANY)):
        assert small["forward"]["tile_m"] == 16
        assert any("64 leave no room" in reason for reason in small["reasons"])


def test_hoppers_kernels_need_hopper_half_types_alignment_and_their_code() -> None:
    assert plan()["forward"]["kernel"] == "sm90 latency"
    for sizes in (ONE, MANY):
        found = plan(save=True, **sizes)
        assert all(found[name]["kernel"] == "sm90 throughput" for name in KERNELS[1:])
    for change, reason in (
        ({"dtype": "float32"}, "WGMMA cannot transpose float32"),
        ({"tma_ok": False}, "multiples of 16 bytes"),
        ({"has_sm90": False}, "no code for sm_90a"),
        ({"chip": "B200"}, "capability 9.0 alone"),
    ):
        found = plan(**change)
        assert all(found[name]["kernel"] == "sm80 latency" for name in KERNELS)
        assert any(reason in sentence for sentence in found["reasons"])


def test_the_backward_of_one_image_is_spread_over_clusters() -> None:
    sizes = ONE | {"total": 256}
    found = plan(save=True, **sizes)
    assert [found[name]["cluster"] for name in KERNELS[1:]] == [4, 4]
    assert found["backward_query"]["blocks"] == 16
    assert any("clusters share a tile" in reason for reason in found["reasons"])
    check(found, sizes, "H200", has_backward=True)
    for alone in (
        plan(save=True, **MANY),
        plan(save=True, kernels="sm90-throughput", **sizes),
        plan(save=True, **sizes | {"total": 64, "pixels": 64}),  # one tile each
    ):
        assert [alone[name]["cluster"] for name in KERNELS[1:]] == [1, 1]


# Of commit 1b89a9e, every setting with every family.
RECORD = Path(__file__).resolve().parents[3] / "benchmarks" / "results" / "2026-11-27-h200.json"
MEASURED = [
    case
    for case in json.loads(RECORD.read_text())["cases"]
    if case["what"] in ("forward", "backward")
]
MIXED = Problem("mixed", ((600, 3), (250, 40), (128, 12), (400, 90)), queries=2)


@pytest.mark.parametrize("case", MEASURED, ids=lambda case: f"{case['setting']}-{case['what']}")
def test_the_plan_is_within_a_tenth_of_the_fastest_family_measured(case: dict[str, Any]) -> None:
    sizes = MIXED.sizes
    if case["size"] != "mixed":  # images x prototypes of each
        images, count = map(int, case["size"].split("x"))
        sizes = Problem("", ((count,),) * images).sizes
    found = plan(dtype=case["dtype"], save=case["what"] == "backward", **sizes)
    names = ("forward",) if case["what"] == "forward" else ("backward_query", "backward_protos")
    (kernel,) = {found[name]["kernel"] for name in names}
    families = {name: us for name, us in case["us"].items() if name.startswith("native sm")}
    chosen = families[f"native {kernel.replace(' ', '-')}"]
    assert chosen <= 1.1 * min(families.values())


def test_the_number_of_prototypes_changes_no_forward() -> None:
    for sizes in (ONE, MANY):
        few, many = (plan(**sizes | {"total": total}) for total in (1, 2**20))
        assert few["forward"] == many["forward"]


@pytest.mark.parametrize("chip", ["sm80", "sm90"])
@pytest.mark.parametrize("form", ["", "-latency", "-throughput"])
def test_the_environment_forces_a_family(chip: str, form: str) -> None:
    found = plan(kernels=chip + form)
    assert found["forward"]["kernel"] == chip + (form.replace("-", " ") or " latency")
    assert found["backward_query"]["kernel"].startswith(chip)
    assert any("FASTPROTO_CUDA_KERNELS" in r for r in found["reasons"]) or chip + form == "sm90"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 768}, "D = 768 is above 512"),
        ({"capability": 75}, "found capability 7.5; allowed: 8.0 and newer"),
        ({"dtype": "float64"}, "found float64; allowed on CUDA: float32, bfloat16, float16"),
        ({"pixels": 2**23}, "found 512 x 8388608 values per image"),
        ({"total": 2**23}, "found 8388608 x 512 values; allowed: at most 2147483647"),
        ({"total": 2**30, "dim": 1}, "of at most 1073741823 prototypes"),
        ({"episodes": 2**30}, "allowed: at most 268435455 tiles of 16"),
        ({"kernels": "sm70"}, "found 'sm70'; allowed: sm80, sm80-latency"),
        ({"kernels": "sm90-fast"}, "found 'sm90-fast'; allowed"),
        ({"kernels": "sm90", "capability": 80}, "which cannot run here: its instructions"),
    ],
)
def test_what_has_no_plan_says_why(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(**change)


def test_explain_prints_the_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTPROTO_CUDA_KERNELS", raising=False)
    text = backends.explain(save=True)
    assert "\nlatency: its 128 blocks are no more than the 132 multiprocessors.\n" in text
    many = backends.explain(episodes=8)
    assert "\nthroughput: latency's 1024 blocks are more than the 132 multiprocessors.\n" in many
    ampere = backends.explain(dtype=torch.float32)
    assert "\nlatency: 4 tiles of 64 pixels are fewer than the 132 multiprocessors.\n" in ampere
    for name in ("stats", *KERNELS):
        assert f"\n{name}: sm" in text
    with pytest.raises(InputError, match="D = 768 is above 512"):
        backends.explain(dim=768)
    monkeypatch.setenv("FASTPROTO_CUDA_KERNELS", "sm80-throughput")
    assert "forward: sm80 throughput, 64 pixels" in backends.explain()
    monkeypatch.setenv("FASTPROTO_CUDA_KERNELS", "sm90")
    assert "forward: sm90 latency" in backends.explain(dim=48, pixels=63, channels_last=True)
    for odd in ({"pixels": 63}, {"dim": 100}):
        with pytest.raises(InputError, match="multiples of 16 bytes"):
            backends.explain(**odd)  # type: ignore[arg-type]


# What torch says of GPUs.
GPUS = [
    SimpleNamespace(
        major=major,
        minor=minor,
        multi_processor_count=100,
        shared_memory_per_block_optin=shared * KIB,
    )
    for major, minor, shared in ((9, 0, 227), (8, 9, 99), (7, 5, 64))
]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One with an H200, an RTX 4090 and a T4, as far as Python can tell."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: GPUS[index])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(library, "why_not_cuda", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(GPUS))
    caches = (chips._chip, backends._choose, support.why_not)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.mark.usefixtures("machine")
def test_every_gpu_of_a_machine_is_asked_by_itself() -> None:
    def why_not(gpu: int, dtype: torch.dtype, dim: int) -> str:
        return backends.why_not("native", f"cuda:{gpu}", dtype, backends.padded_dim(dim)) or ""

    assert why_not(0, torch.float32, 512) == ""
    assert "bytes of shared memory" in why_not(1, torch.float32, 257)
    assert why_not(1, torch.float32, 256) == ""
    assert why_not(1, torch.bfloat16, 512) == ""
    assert "not float64" in why_not(0, torch.float64, 64)
    assert "512 channels at most" in why_not(0, torch.bfloat16, 513)
    assert why_not(0, torch.bfloat16, 512) == ""
    assert chips.chip_of(torch.device("cuda")).capability == 89  # the current one
    assert backends.choose("cuda:0", "native", torch.float32, 512) == "native"
    old = r"cannot run on 'cuda:2'.*found capability 7\.5; allowed: 8\.0 and newer; allowed: ref"
    with pytest.raises(InputError, match=old):
        backends.choose("cuda:2", "native", torch.float32, 512)
    rows = {name: available for name, available, _ in backends.describe()}
    assert [rows[f"native (cuda:{gpu})"] for gpu in range(3)] == [True, True, False]


@pytest.mark.usefixtures("machine")
def test_a_gpu_older_than_the_code_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "build_info", lambda: {"cuda_architectures": "90a 100"})
    assert backends.why_not("native", "cuda:0") is None
    reason = backends.why_not("native", "cuda:1") or ""
    assert "FASTPROTO_CUDA_ARCHS=90a;100, the GPU has capability 8.9" in reason
    assert reason.endswith("FASTPROTO_CUDA_ARCHS='90a;100;89'")
    monkeypatch.setattr(library, "build_info", lambda: {"cuda_architectures": "100"})
    assert "FASTPROTO_CUDA_ARCHS='100;90a'" in (backends.why_not("native", "cuda:0") or "")


@pytest.mark.parametrize(
    ("driver", "reason"),
    [(12080, "the driver knows CUDA 12.8"), (13000, None), (13020, None), (None, None)],
)
def test_a_driver_older_than_the_runtime_is_refused(
    monkeypatch: pytest.MonkeyPatch, driver: int | None, reason: str | None
) -> None:
    monkeypatch.setattr(library, "build_info", lambda: {"cuda_compiler": "13.0.88"})
    monkeypatch.setattr(library, "_driver_knows", lambda: driver)
    found = library._why_not_driver()
    assert (found is None) == (reason is None)
    assert reason is None or reason in (found or "")


def test_a_failed_call_is_explained_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    feat, protos, offsets = PROBLEMS[0].make(torch.bfloat16)
    assert backends.why_failed(feat, protos, offsets) is None
    monkeypatch.setenv("FASTPROTO_CUDA_KERNELS", "sm70")
    assert "found 'sm70'" in (backends.why_failed(feat, protos, offsets) or "")


def test_the_library_that_refuses_is_asked_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch < 2.13 has it: an error without a text."""

    def refuse(*arguments: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(native, "proto_attention", refuse)
    monkeypatch.setattr(backends, "choose", lambda *arguments: "native")
    with FakeTensorMode():
        feat = torch.empty(1, 1, 64, 4, 4, device="cuda", dtype=torch.bfloat16)
        protos = torch.empty(3, 64, device="cuda", dtype=torch.bfloat16)
        offsets = torch.empty(2, device="cuda", dtype=torch.int32)
        with pytest.raises(RuntimeError, match=r"^$"):
            proto_attention(feat, protos, offsets)
        monkeypatch.setenv("FASTPROTO_CUDA_KERNELS", "sm70")
        with pytest.raises(InputError, match=r"backend: found 'native', which has no plan.*'sm70'"):
            proto_attention(feat, protos, offsets)


def test_a_library_that_does_not_load_says_what_the_loader_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    junk = tmp_path / "libfastproto_cuda.so"
    junk.write_text("no library")
    monkeypatch.setattr(library, "_path", lambda name: junk)
    reason = library._load("fastproto_cuda") or ""
    assert "too short" in reason or "invalid ELF" in reason
    assert str(tmp_path) not in reason
