# SPDX-License-Identifier: Apache-2.0
"""Which CUDA kernels a problem runs with: a pure function, for chips that are not here."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastproto import _C, InputError, backends
from fastproto.testing.problems import PROBLEMS, Problem

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


def sizes_of(problem: Problem) -> dict[str, int]:
    return {
        "episodes": problem.episodes,
        "queries": problem.queries,
        "ways": problem.ways,
        "dim": problem.dim,
        "pixels": problem.height * problem.width,
        "total": sum(map(sum, problem.bags)) + problem.spare,
    }


def check(found: dict[str, Any], sizes: dict[str, int], chip: str, has_backward: bool) -> None:
    """Every pixel, prototype and channel has a block, and every block has room."""
    maps = sizes["episodes"] * sizes["queries"] * sizes["ways"]
    work = {
        "forward": maps * -(-sizes["pixels"] // found["forward"]["tile_m"]),
        "backward_query": sizes["episodes"]
        * sizes["queries"]
        * -(-sizes["pixels"] // found["backward_query"]["tile_m"]),
        # Bags begin anywhere: one tile more for each, and one for the rows of none.
        "backward_protos": sizes["total"] // found["backward_protos"]["tile_n"]
        + sizes["episodes"] * sizes["ways"]
        + 1,
    }
    for name in KERNELS if has_backward else KERNELS[:1]:
        one = found[name]
        assert one["shared_bytes"] <= CHIPS[chip]["shared_memory"]
        assert one["dim"] >= sizes["dim"]
        assert one["dim"] % one["slices"] == 0
        assert one["threads"] % 32 == 0
        assert one["blocks"] % one["cluster"] == 0
        if name == "forward" and one["kernel"] == "sm90 throughput":  # blocks take turns
            assert one["blocks"] == min(work[name], CHIPS[chip]["multiprocessors"])
        else:
            assert one["blocks"] == work[name] * one["slices"]
        if not one["kernel"].startswith("sm80"):
            assert chip == "H200"
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
    for sizes in [*map(sizes_of, PROBLEMS), ONE, MANY]:
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
    assert plan()["backward_protos"]["kernel"] == "sm90 throughput"
    for change, reason in (
        ({"dtype": "float32"}, "WGMMA cannot transpose float32"),
        ({"tma_ok": False}, "multiples of 16 bytes"),
        ({"has_sm90": False}, "no code for sm_90a"),
        ({"chip": "B200"}, "capability 9.0 alone"),
    ):
        found = plan(**change)
        assert all(found[name]["kernel"] == "sm80 latency" for name in KERNELS)
        assert any(reason in sentence for sentence in found["reasons"])


def test_the_number_of_prototypes_changes_no_forward() -> None:
    for sizes in (ONE, MANY):
        few, many = (plan(**sizes | {"total": total}) for total in (1, 2**20))
        assert few["forward"] == many["forward"]
        assert few["backward_query"] == many["backward_query"]


@pytest.mark.parametrize(
    ("wanted", "kernel"),
    [
        ("sm80", "sm80 latency"),
        ("sm80-latency", "sm80 latency"),
        ("sm80-throughput", "sm80 throughput"),
        ("sm90", "sm90 latency"),
        ("sm90-latency", "sm90 latency"),
        ("sm90-throughput", "sm90 throughput"),
    ],
)
def test_the_environment_forces_a_family(wanted: str, kernel: str) -> None:
    found = plan(kernels=wanted)
    assert found["forward"]["kernel"] == kernel
    assert found["backward_query"]["kernel"].startswith(wanted[:4])
    assert any("FASTPROTO_CUDA_KERNELS" in r for r in found["reasons"]) or wanted == "sm90"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 768}, "D = 768 is above 512"),
        ({"capability": 75}, "found capability 7.5; allowed: 8.0 and newer"),
        ({"dtype": "float64"}, "found float64; allowed on CUDA: float32, bfloat16, float16"),
        ({"pixels": 2**23}, "found 512 x 8388608 values per image"),
        ({"total": 2**23}, "found 8388608 x 512 values; allowed: at most 2147483647"),
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
    assert "fewer than" in text
    for name in ("stats", *KERNELS):
        assert f"\n{name}: sm" in text
    with pytest.raises(InputError, match="D = 768 is above 512"):
        backends.explain(dim=768)
    monkeypatch.setenv("FASTPROTO_CUDA_KERNELS", "sm80-throughput")
    assert "forward: sm80 throughput, 64 pixels" in backends.explain()
    assert "float64" in (backends._why_no_plan(torch.float64, False) or "")
    assert "above 512" in (backends._why_no_plan(torch.bfloat16, True) or "")
