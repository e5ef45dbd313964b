# SPDX-License-Identifier: Apache-2.0
"""The emulated GPU: each of its primitives against a plain formula, and what it says of misuse."""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

SOURCES = Path(__file__).resolve().parents[3] / "csrc"
SEEDS = (0, 1, 2, 3)


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The small kernels of csrc/cuda/emulator/tests."""
    source = SOURCES / "cuda/emulator/tests/primitives.cpp"
    if not source.is_file():
        pytest.skip("no C++ sources beside the tests")
    names = [os.environ.get("CXX", ""), "g++", "clang++"]
    compiler = next((name for name in names if name and shutil.which(name)), None)
    if compiler is None:
        pytest.skip("no C++ compiler")
    binary = tmp_path_factory.mktemp("emulator") / "primitives.so"
    flags = "-std=gnu++20 -O1 -fPIC -shared -DFASTPROTO_EMULATE -Wall -Wextra -Werror -Wno-psabi"
    built = subprocess.run(
        [compiler, *flags.split(), str(source), "-o", str(binary)], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    return ctypes.CDLL(str(binary))


@pytest.fixture(params=SEEDS, ids=lambda seed: f"seed{seed}")
def emulator(library: ctypes.CDLL, request: pytest.FixtureRequest) -> Iterator[ctypes.CDLL]:
    """The same with the fixed order of threads (0) and random ones."""
    library.set_seed(ctypes.c_int64(request.param))
    yield library
    library.set_seed(ctypes.c_int64(-1))


def call(library: ctypes.CDLL, name: str, *arguments: object) -> str:
    """The error text of a launch, empty where there is none."""
    function = getattr(library, name)
    function.restype = ctypes.c_char_p
    converted = [
        ctypes.c_void_p(x.ctypes.data) if isinstance(x, np.ndarray) else x for x in arguments
    ]
    error = function(*converted)
    return "" if error is None else error.decode()


def to_bits(x: np.ndarray, kind: str) -> np.ndarray:
    if kind == "half":
        return x.astype(np.float16).view(np.uint16)
    return torch.from_numpy(x).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


def to_values(bits: np.ndarray, kind: str) -> np.ndarray:
    if kind == "half":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << 16).view(np.float32)


def random_bits(
    generator: np.random.Generator, shape: tuple[int, ...], kind: str
) -> tuple[np.ndarray, np.ndarray]:
    """Random two-byte numbers: their bits, and as float32."""
    bits = np.ascontiguousarray(to_bits(generator.standard_normal(shape, np.float32), kind))
    return bits, to_values(bits, kind)


def swizzled(box: np.ndarray) -> np.ndarray:
    """Rows of 64 two-byte numbers as the 128-byte swizzle places them."""
    rows = box.reshape(-1, 8, 8)
    places = np.arange(8)[None, :] ^ (np.arange(len(rows)) % 8)[:, None]
    result = np.empty_like(rows)
    np.put_along_axis(result, places[:, :, None].repeat(8, 2), rows, axis=1)
    return result.reshape(-1)


KINDS = ("bf16", "half")


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("kind", KINDS)
def test_all_two_byte_numbers(library: ctypes.CDLL, kind: str) -> None:
    bits = np.arange(65536, dtype=np.uint16)
    values = np.empty(65536, np.float32)
    assert call(library, "to_floats", KINDS.index(kind), bits, values, 65536) == ""
    expected = to_values(bits, kind)
    np.testing.assert_array_equal(
        values.view(np.uint32)[~np.isnan(expected)], expected.view(np.uint32)[~np.isnan(expected)]
    )
    assert np.isnan(values[np.isnan(expected)]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_rounding_to_nearest_even(library: ctypes.CDLL, kind: str) -> None:
    generator = np.random.default_rng(0)
    patterns = generator.integers(0, 1 << 32, 200_000, dtype=np.uint64).astype(np.uint32)
    # Every two-byte number, the point halfway to the next one, and both its neighbours.
    numbers = to_values(np.arange(65536, dtype=np.uint16), kind)
    numbers = numbers[np.isfinite(numbers)]
    step = 1 << 12 if kind == "half" else 1 << 15
    near = [(numbers.view(np.uint32) + np.uint32(step + d)) for d in (-1, 0, 1)]
    small = generator.standard_normal(50_000).astype(np.float32) * np.float32(3e-6)
    x = np.concatenate(
        [
            patterns.view(np.float32),
            numbers,
            *[n.view(np.float32) for n in near],
            small,
            np.array([65504, 65519.996, 65520, 3.3e38, 3.4e38, np.inf], np.float32),
        ]
    )
    result = np.empty(len(x), np.uint16)
    call(library, "from_floats", KINDS.index(kind), x, result, len(x))
    with np.errstate(over="ignore"):
        expected = to_bits(x, kind)
    np.testing.assert_array_equal(result[~np.isnan(x)], expected[~np.isnan(x)])
    assert (result[np.isnan(x)] == 0x7FFF).all()


def test_tf32_rounds_ties_away(library: ctypes.CDLL) -> None:
    generator = np.random.default_rng(0)
    x = np.concatenate([generator.standard_normal(10_000), [1 + 2.0**-11, -1 - 2.0**-11]])
    x = np.concatenate([x, [1 + 2.0**-11 - 2.0**-23, 0, np.inf, np.nan]]).astype(np.float32)
    result = np.empty_like(x)
    call(library, "numbers", 0, x, result, len(x))
    assert np.isnan(result[-1])
    mantissa, exponent = np.frexp(x[:-2].astype(np.float64))
    scaled = np.abs(mantissa) * 2**11
    expected = np.sign(mantissa) * np.floor(scaled + 0.5) * 2.0 ** (exponent - 11)
    np.testing.assert_array_equal(result[:-2], expected)
    assert result[-2] == np.inf


def test_exponentials_flush_subnormal_numbers(library: ctypes.CDLL) -> None:
    x = np.array([0, 1, -1, 0.5, -126, -126.5, -140, 128, -np.inf], np.float32)
    result = np.empty_like(x)
    call(library, "numbers", 1, x, result, len(x))
    expected = np.array([1, 2, 0.5, 2**0.5, 2.0**-126, 0, 0, np.inf, 0], np.float32)
    np.testing.assert_allclose(result, expected, rtol=1e-6, atol=0)
    x = np.array([1, 2, 0.125, 1e-40, 0, np.inf], np.float32)
    result = np.empty_like(x)
    call(library, "numbers", 2, x, result, len(x))
    np.testing.assert_array_equal(
        result, np.array([0, 1, -3, -np.inf, -np.inf, np.inf], np.float32)
    )


# ---------------------------------------------------------------- warps


@pytest.mark.parametrize("kind", KINDS)
def test_mma(emulator: ctypes.CDLL, kind: str) -> None:
    generator = np.random.default_rng(1)
    a_bits, a = random_bits(generator, (16, 16), kind)
    b_bits, b = random_bits(generator, (16, 8), kind)
    c = generator.standard_normal((16, 8), np.float32)
    expected = c + a.astype(np.float64) @ b
    assert call(emulator, "mma", KINDS.index(kind), a_bits, b_bits, c, 1, 1) == ""
    np.testing.assert_allclose(c, expected, rtol=2e-7, atol=1e-8)


def test_mma_tf32_ignores_the_low_bits(emulator: ctypes.CDLL) -> None:
    generator = np.random.default_rng(2)
    a = generator.standard_normal((16, 8), np.float32)
    b = generator.standard_normal((8, 8), np.float32)
    c = generator.standard_normal((16, 8), np.float32)
    a32, b32 = ((x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32) for x in (a, b))
    expected = c + a32.astype(np.float64) @ b32
    assert call(emulator, "mma", 2, a, b, c, 1, 1) == ""
    np.testing.assert_allclose(c, expected, rtol=2e-7, atol=1e-8)


@pytest.mark.parametrize("transpose", [0, 1])
def test_matrices_loaded_and_stored(emulator: ctypes.CDLL, transpose: int) -> None:
    matrices = np.arange(256, dtype=np.uint16).reshape(4, 8, 8)
    registers = np.empty((32, 4), np.uint32)
    back = np.empty_like(matrices)
    assert call(emulator, "matrices", transpose, matrices, registers, back) == ""
    for lane, m in itertools.product(range(32), range(4)):
        g, i = divmod(lane, 4)
        matrix = (matrices[m].T if transpose else matrices[m]).astype(int)
        assert registers[lane, m] == matrix[g, 2 * i] | matrix[g, 2 * i + 1] << 16
    np.testing.assert_array_equal(back, matrices)


def test_shuffles_and_ballot(emulator: ctypes.CDLL) -> None:
    sums, first, votes = np.empty(32, np.float32), np.empty(32, np.int32), np.empty(32, np.uint32)
    assert call(emulator, "shuffles", sums, first, votes) == ""
    assert (sums == 31 * 16 + 7).all()
    assert (first == 105).all()
    assert (votes == sum(1 << i for i in range(0, 32, 3))).all()


# ---------------------------------------------------------------- copies and barriers


@pytest.mark.parametrize("valid", [0, 4, 6, 16])
def test_copies_are_seen_after_the_wait_alone(emulator: ctypes.CDLL, valid: int) -> None:
    x = np.random.default_rng(3).standard_normal((64, 4), np.float32)
    early, late = np.empty_like(x), np.empty_like(x)
    assert call(emulator, "copies", x, early, late, valid) == ""
    assert np.isnan(early).all()
    expected = x.copy()
    expected.view(np.uint8)[:, valid:] = 0
    np.testing.assert_array_equal(late, expected)


def test_named_barriers(emulator: ctypes.CDLL) -> None:
    sums = np.zeros(128, np.float32)
    assert call(emulator, "pass", sums, 5, 0) == ""
    np.testing.assert_array_equal(sums[32:], 5 * np.arange(96) + 10)


@pytest.mark.parametrize("broken", [1, 2])
def test_a_missing_wait_at_a_named_barrier_shows(library: ctypes.CDLL, broken: int) -> None:
    seen = []
    for seed in range(8):
        library.set_seed(ctypes.c_int64(seed))
        sums = np.zeros(128, np.float32)
        error = call(library, "pass", sums, 5, broken)
        seen.append(error != "" or not np.array_equal(sums[32:], 5 * np.arange(96) + 10))
    library.set_seed(ctypes.c_int64(-1))
    assert any(seen)


def test_a_wrong_number_of_threads_at_a_barrier(emulator: ctypes.CDLL) -> None:
    error = call(emulator, "pass", np.zeros(128, np.float32), 5, 3)
    assert "160 threads of a block of 128" in error


def test_block_barrier_counts_those_who_have_not_ended(emulator: ctypes.CDLL) -> None:
    sums = np.zeros((3, 64), np.int32)
    assert call(emulator, "block_sum", sums, 3, 0) == ""
    np.testing.assert_array_equal(sums, (63 * 32 + 64 * np.arange(3))[:, None].repeat(64, 1))
    assert call(emulator, "block_sum", sums, 3, 1) == ""
    assert not np.array_equal(sums[0], np.full(64, 63 * 32))  # shared memory was never written


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("operations", "different operations: ballot"),
        ("operations", "shuffle"),
        ("lane missing", "124 threads wait at sync_warp, 4 have ended"),
        ("ldmatrix alignment", "load_matrix: shared address 8 is not a multiple of 16"),
        ("ldmatrix outside", "16 bytes at 32768 are not in the block's 32768 bytes"),
        ("copy alignment", "copy_async_16: shared address 4"),
        ("copy from", "copy_async_16: global address"),
        ("load alignment", "load_global_16"),
        ("past the end", "wrote at 32785, past its 32768 bytes"),
        ("before the start", "wrote 1 bytes before"),
        ("barrier id", "barrier 16"),
        ("arrivals", "one arrival more than the 1"),
        ("no init", "no barrier_init of the barrier at 0"),
        ("wgmma begin", "no wgmma_begin"),
        ("wgmma start", "b starts at 128"),
        ("wgmma touched", "written while a product was under way"),
        ("wgmma no begin", "no wgmma_begin since"),
        ("wgmma no wait", "wgmma_wait<0>"),
        ("wgmma warps", "warps of a warpgroup run different products"),
        ("exception", "exception: thrown"),
    ],
)
def test_misuse(library: ctypes.CDLL, kind: str, text: str) -> None:
    library.set_seed(ctypes.c_int64(0))
    error = call(library, "misuse", kind.encode(), np.zeros(64, np.float64))
    library.set_seed(ctypes.c_int64(-1))
    assert text in error


@pytest.fixture
def proxies(library: ctypes.CDLL) -> Iterator[None]:
    """What TMA and WGMMA use must have been fenced by who wrote it."""
    library.set_proxies(1)
    yield
    library.set_proxies(-1)


@pytest.mark.usefixtures("proxies")
@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (
            "fence missing",
            "thread 0 wrote to the 16 bytes of shared memory at 0 and has run",
        ),
        ("fence of another", "thread 0 wrote"),
        ("fence", ""),
    ],
)
def test_only_its_writers_fence_lets_wgmma_see_memory(
    emulator: ctypes.CDLL, kind: str, text: str
) -> None:
    error = call(emulator, "misuse", kind.encode(), np.zeros(64, np.float64))
    assert text in error if text else error == ""


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ((1, 48, 1, 0), "warps of 32"),
        ((1, 2048, 1, 0), "up to 1024"),
        ((3, 64, 2, 0), "clusters of 2"),
        ((1, 64, 1, 227 * 1024 + 1), "bytes of shared memory"),
    ],
)
def test_shapes_of_grids(library: ctypes.CDLL, shape: tuple[int, ...], text: str) -> None:
    assert text in call(library, "shape", *shape)


# ---------------------------------------------------------------- mbarriers and TMA


def test_deadlock_names_the_barrier(emulator: ctypes.CDLL) -> None:
    error = call(emulator, "misuse", b"barrier", np.zeros(4))
    assert error == (
        "deadlock: block 0: 128 threads wait at barrier_wait(barrier at 0, parity 0; "
        "its phase has parity 0, misses 1 of 2 arrivals and 0 bytes)."
    )


def boxed(x: np.ndarray, at: tuple[int, ...], box: tuple[int, ...]) -> np.ndarray:
    """The box at `at`, outermost first, with zeros outside."""
    result = np.zeros(box, x.dtype)
    for index in np.ndindex(*box):
        place = tuple(a + i for a, i in zip(at, index, strict=True))
        if all(0 <= p < n for p, n in zip(place, x.shape, strict=True)):
            result[index] = x[place]
    return result


def array(kind: type, values: tuple[int, ...]) -> np.ndarray:
    return np.array(values[::-1], dtype=kind)


CASES = [
    # sizes, box, corner; outermost first
    ((24, 128), (16, 64), (3, 0)),
    ((24, 128), (16, 64), (-5, 64)),
    ((24, 72), (8, 64), (20, 24)),
    ((3, 10, 80), (2, 8, 64), (2, 4, -8)),
    ((2, 3, 4, 64), (2, 3, 4, 64), (0, 1, 0, 0)),
    ((2, 2, 3, 4, 64), (2, 1, 3, 4, 64), (1, 1, -1, 2, 3)),
]


@pytest.mark.parametrize(("sizes", "box", "at"), CASES)
def test_boxes_loaded(
    emulator: ctypes.CDLL, sizes: tuple[int, ...], box: tuple[int, ...], at: tuple[int, ...]
) -> None:
    x = np.random.default_rng(4).integers(1, 60000, sizes).astype(np.uint16)
    early, late = np.empty(np.prod(box), np.uint16), np.empty(np.prod(box), np.uint16)
    strides = array(np.uint64, x.strides[:-1])
    arguments = (
        len(sizes),
        x,
        array(np.uint64, sizes),
        strides,
        array(np.uint32, box),
        array(np.int32, at),
    )
    assert call(emulator, "load_box", *arguments, late.nbytes, early, late) == ""
    assert (early == 0xFFFF).all()
    np.testing.assert_array_equal(late, swizzled(boxed(x, at, box)))

    error = call(emulator, "load_box", *arguments, late.nbytes + 128, early, late)
    assert "deadlock" in error
    assert "misses 0 of 1 arrivals and 128 bytes" in error
    error = call(emulator, "load_box", *arguments, late.nbytes - 128, early, late)
    assert "deadlock" in error
    assert "-128 bytes" in error


@pytest.mark.parametrize(
    ("sizes", "strides", "box", "text"),
    [
        ((24, 128), (250,), (8, 64), "multiples of 16"),
        ((24, 128), (256,), (257, 64), "256"),
        ((24, 128), (256,), (8, 128), "64 numbers"),
    ],
)
def test_tensor_maps_refused(
    library: ctypes.CDLL,
    sizes: tuple[int, ...],
    strides: tuple[int, ...],
    box: tuple[int, ...],
    text: str,
) -> None:
    x = np.zeros(sizes, np.uint16)
    error = call(
        library,
        "load_box",
        2,
        x,
        array(np.uint64, sizes),
        array(np.uint64, strides),
        array(np.uint32, box),
        array(np.int32, (0, 0)),
        0,
        x,
        x,
    )
    assert text in error


@pytest.mark.usefixtures("proxies")
@pytest.mark.parametrize(("sizes", "box", "at"), [CASES[3], ((2, 20, 64), (1, 16, 64), (1, 8, 0))])
def test_boxes_stored(
    emulator: ctypes.CDLL, sizes: tuple[int, ...], box: tuple[int, ...], at: tuple[int, ...]
) -> None:
    generator = np.random.default_rng(5)
    values = generator.integers(1, 60000, box).astype(np.uint16)
    x = np.zeros(sizes, np.uint16)
    shared = np.ascontiguousarray(swizzled(values))
    arguments = (
        x,
        array(np.uint64, sizes),
        array(np.uint64, x.strides[:-1]),
        array(np.uint32, box),
        array(np.int32, at),
        shared,
    )
    assert call(emulator, "store_box", *arguments, 0) == ""
    inside = boxed(np.ones(sizes, np.uint16), at, box)
    np.testing.assert_array_equal(boxed(x, at, box), values * inside)
    assert np.count_nonzero(x) == inside.sum()

    assert call(emulator, "store_box", *arguments, 1) == ""
    assert not x.any()  # overwritten with zeros before the wait
    assert "tma_store under way" in call(emulator, "store_box", *arguments, 2)
    assert "tma_store: thread" in call(emulator, "store_box", *arguments, 3)


def test_ring_of_stages(emulator: ctypes.CDLL) -> None:
    bits = to_bits(np.random.default_rng(6).integers(-9, 9, (64, 64)).astype(np.float32), "bf16")
    bits = np.ascontiguousarray(bits)
    sums = np.zeros(64, np.float32)
    assert call(emulator, "ring", bits, 8, sums, 0) == ""
    np.testing.assert_array_equal(sums, to_values(bits, "bf16").sum(0))


@pytest.mark.parametrize("broken", [1, 2])
def test_a_missing_wait_in_a_ring_shows(library: ctypes.CDLL, broken: int) -> None:
    values = 2.0 ** np.arange(8, dtype=np.float32).repeat(8)[:, None].repeat(64, 1)
    bits = np.ascontiguousarray(to_bits(values, "bf16"))
    seen = []
    for seed in range(1, 9):
        library.set_seed(ctypes.c_int64(seed))
        sums = np.zeros(64, np.float32)
        error = call(library, "ring", bits, 8, sums, broken)
        seen.append(error != "" or not np.array_equal(sums, values.sum(0)))
    library.set_seed(ctypes.c_int64(-1))
    assert all(seen)


# ---------------------------------------------------------------- WGMMA


@pytest.mark.parametrize("columns", [64, 128, 256])
@pytest.mark.parametrize(
    ("transpose_a", "transpose_b", "registers"),
    [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0), (0, 0, 1), (0, 1, 1)],
)
@pytest.mark.parametrize("kind", KINDS)
def test_wgmma(
    library: ctypes.CDLL,
    kind: str,
    transpose_a: int,
    transpose_b: int,
    registers: int,
    columns: int,
) -> None:
    generator = np.random.default_rng(7)
    depth = 128
    a_bits, a = random_bits(generator, (64, depth), kind)
    b_bits, b = random_bits(generator, (columns, depth), kind)
    expected = a.astype(np.float64) @ b.T
    a_bits = np.ascontiguousarray(a_bits.T if transpose_a else a_bits)
    b_bits = np.ascontiguousarray(b_bits.T if transpose_b else b_bits)
    c = np.empty((64, columns), np.float32)
    arguments = (KINDS.index(kind), columns, transpose_a, transpose_b, registers, a_bits, b_bits, c)
    for seed in (0, 1):
        library.set_seed(ctypes.c_int64(seed))
        assert call(library, "wgmma_product", *arguments, depth, 0) == ""
        np.testing.assert_allclose(c, expected, rtol=1e-5, atol=2e-5)
    # Too early: an operand overwritten, a result read.
    for early in (1, 2):
        seen = []
        for seed in range(4):
            library.set_seed(ctypes.c_int64(seed))
            error = call(library, "wgmma_product", *arguments, depth, early)
            seen.append(error != "" or not np.allclose(c, expected, rtol=1e-5, atol=2e-5))
        assert seen[0]
    library.set_seed(ctypes.c_int64(-1))


# ---------------------------------------------------------------- clusters


def test_cluster(emulator: ctypes.CDLL) -> None:
    sums, pulled = np.zeros(8, np.int32), np.zeros(8, np.int32)
    assert call(emulator, "clusters", sums, pulled, 8, 0) == ""
    np.testing.assert_array_equal(sums, [10] * 4 + [26] * 4)
    rank = np.arange(8) % 4
    np.testing.assert_array_equal(pulled, rank + 10 * ((rank + 3) % 4 + 3) + 100 * (rank + 1))


def test_a_missing_barrier_in_a_cluster_shows(library: ctypes.CDLL) -> None:
    seen = {1: False, 2: False, 3: False}
    for seed, broken in itertools.product(range(8), seen):
        library.set_seed(ctypes.c_int64(seed))
        sums, pulled = np.zeros(8, np.int32), np.zeros(8, np.int32)
        error = call(library, "clusters", sums, pulled, 8, broken)
        seen[broken] |= error != "" or not np.array_equal(sums, [10] * 4 + [26] * 4)
    library.set_seed(ctypes.c_int64(-1))
    assert all(seen.values())
