# SPDX-License-Identifier: Apache-2.0
"""The emulated GPU: each of its primitives against a plain formula, and what it says of misuse."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch
from support import emulator

KINDS = {"bf16": torch.bfloat16, "half": torch.float16}
Sizes = tuple[int, ...]


@pytest.fixture(scope="session")
def library() -> ctypes.CDLL:
    """The small kernels of this folder."""
    if emulator.compiler() is None:
        pytest.skip("no C++ compiler")
    flags = ["-O1", "-fvisibility=default", "-Wall", "-Wextra", "-Werror", "-Wno-psabi"]
    units = sorted(Path(__file__).parent.glob("*.cpp"))
    return ctypes.CDLL(str(emulator.build("primitives", units, [*flags, "-Wno-unknown-pragmas"])))


@pytest.fixture(params=range(4), ids=lambda seed: f"seed{seed}")
def gpu(
    library: ctypes.CDLL, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> ctypes.CDLL:
    """The same with the fixed order of threads (0) and random ones."""
    monkeypatch.setenv("FASTPROTO_EMULATE_SEED", str(request.param))
    return library


@pytest.fixture
def _proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    """What TMA and WGMMA use must have been fenced by who wrote it."""
    monkeypatch.setenv("FASTPROTO_EMULATE_PROXIES", "1")


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
    return torch.from_numpy(x).to(KINDS[kind]).view(torch.int16).numpy().view(np.uint16)


def to_values(bits: np.ndarray, kind: str) -> np.ndarray:
    return torch.from_numpy(bits.view(np.int16)).view(KINDS[kind]).float().numpy()


def random_bits(
    generator: np.random.Generator, shape: Sizes, kind: str
) -> tuple[np.ndarray, np.ndarray]:
    """Random numbers as instructions take them, and as float32."""
    if kind == "tf32":
        x = generator.standard_normal(shape, np.float32)
        return x, (x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
    bits = np.ascontiguousarray(to_bits(generator.standard_normal(shape, np.float32), kind))
    return bits, to_values(bits, kind)


def swizzled(box: np.ndarray) -> np.ndarray:
    """Rows of 64 two-byte numbers as the 128-byte swizzle places them."""
    rows = box.reshape(-1, 8, 8)
    places = np.arange(8)[None, :] ^ (np.arange(len(rows)) % 8)[:, None]
    result = np.empty_like(rows)
    np.put_along_axis(result, places[:, :, None].repeat(8, 2), rows, axis=1)
    return result.reshape(-1)


# ---------------------------------------------------------------- numbers

NUMBERS = ("from bf16", "from half", "to bf16", "to half", "to tf32", "exp2", "log2")


def numbers(library: ctypes.CDLL, function: str, x: np.ndarray) -> np.ndarray:
    """The bits of a function of numbers of 32 bits."""
    result = np.empty(len(x), np.uint32)
    assert call(library, "numbers", NUMBERS.index(function), x, result, len(x)) == ""
    return result


@pytest.mark.parametrize("kind", KINDS)
def test_two_byte_numbers_and_rounding_to_nearest_even(library: ctypes.CDLL, kind: str) -> None:
    bits = np.arange(65536, dtype=np.uint32)
    exact = to_values(bits.astype(np.uint16), kind)
    values, is_nan = numbers(library, f"from {kind}", bits), np.isnan(exact)
    np.testing.assert_array_equal(values[~is_nan], exact.view(np.uint32)[~is_nan])
    assert np.isnan(values.view(np.float32)[is_nan]).all()

    # Every two-byte number, the point halfway to the next one, and both its neighbours.
    exact = exact[np.isfinite(exact)]
    half_step = 1 << 12 if kind == "half" else 1 << 15
    near = [(exact.view(np.uint32) + np.uint32(half_step + d)) for d in (-1, 0, 1)]
    generator = np.random.default_rng(0)
    patterns = generator.integers(0, 1 << 32, 200_000, dtype=np.uint64).astype(np.uint32)
    small = generator.standard_normal(50_000).astype(np.float32) * np.float32(3e-6)
    large = np.array([65504, 65519.996, 65520, 3.3e38, 3.4e38, np.inf], np.float32)
    x = np.concatenate([exact, *[n.view(np.float32) for n in (*near, patterns)], small, large])
    expected = to_bits(x, kind)
    expected[np.isnan(x)] = 0x7FFF
    np.testing.assert_array_equal(numbers(library, f"to {kind}", x), expected)


def test_tf32_rounds_ties_away(library: ctypes.CDLL) -> None:
    tie = 1 + 2.0**-11
    x = np.r_[np.random.default_rng(0).standard_normal(10_000), tie, -tie, tie - 2.0**-23, 0]
    x = np.r_[x, np.inf, np.nan].astype(np.float32)
    mantissa, exponent = np.frexp(x[:-2].astype(np.float64))
    rounded = np.sign(mantissa) * np.floor(np.abs(mantissa) * 2**11 + 0.5) * 2.0 ** (exponent - 11)
    found = numbers(library, "to tf32", x).view(np.float32)
    np.testing.assert_array_equal(found, np.r_[rounded, np.inf, np.nan])


def test_exponentials_flush_subnormal_numbers(library: ctypes.CDLL) -> None:
    x = np.array([0, 1, -1, 0.5, -126, -126.5, -140, 128, -np.inf], np.float32)
    expected = np.array([1, 2, 0.5, 2**0.5, 2.0**-126, 0, 0, np.inf, 0], np.float32)
    found = numbers(library, "exp2", x).view(np.float32)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=0)
    x = np.array([1, 2, 0.125, 1e-40, 0, np.inf], np.float32)
    found = numbers(library, "log2", x).view(np.float32)
    np.testing.assert_array_equal(found, [0, 1, -3, -np.inf, -np.inf, np.inf])


# ---------------------------------------------------------------- products


@pytest.mark.parametrize("kind", [*KINDS, "tf32"])
def test_mma(gpu: ctypes.CDLL, kind: str) -> None:
    """Of tf32 the low bits are ignored."""
    generator = np.random.default_rng(1)
    depth = 8 if kind == "tf32" else 16
    (a_bits, a), (b_bits, b) = (random_bits(generator, s, kind) for s in ((16, depth), (depth, 8)))
    c = generator.standard_normal((16, 8), np.float32)
    expected = c + a.astype(np.float64) @ b
    assert call(gpu, "mma", [*KINDS, "tf32"].index(kind), a_bits, b_bits, c) == ""
    np.testing.assert_allclose(c, expected, rtol=2e-7, atol=1e-8)


@pytest.mark.parametrize("columns", [64, 128, 256])
@pytest.mark.parametrize(
    "layout",  # of a and b: transposed; a in registers
    [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0), (0, 0, 1), (0, 1, 1)],
)
@pytest.mark.parametrize("kind", KINDS)
def test_wgmma(library: ctypes.CDLL, kind: str, layout: Sizes, columns: int) -> None:
    generator = np.random.default_rng(7)
    depth = 128
    a_bits, a = random_bits(generator, (64, depth), kind)
    b_bits, b = random_bits(generator, (columns, depth), kind)
    images = []
    for x, transposed in ((a_bits, layout[0]), (b_bits, layout[1])):
        rows = x.T if transposed else x
        images.append(swizzled(np.concatenate(np.split(rows, rows.shape[1] // 64, axis=1))))
    expected = a.astype(np.float64) @ b.T
    c = np.empty((64, columns), np.float32)
    arguments = (kind == "half", columns, *layout, *images, a_bits, c, depth)
    # Too early: an operand overwritten (1), a result read (2).
    for seed, early in ((0, 0), (1, 0), (0, 1), (0, 2)):
        with emulator.pretending(seed=seed):
            error = call(library, "wgmma", *arguments, early)
        right = error == "" and np.allclose(c, expected, rtol=1e-5, atol=2e-5)
        assert right == (early == 0), (seed, early, error)


# ---------------------------------------------------------------- warps, copies, barriers


@pytest.mark.parametrize("transpose", [0, 1])
def test_matrices_loaded_and_stored(gpu: ctypes.CDLL, transpose: int) -> None:
    matrices = np.arange(256, dtype=np.uint16).reshape(4, 8, 8)
    registers = np.empty((32, 4), np.uint32)
    back = np.empty_like(matrices)
    assert call(gpu, "matrices", transpose, matrices, registers, back) == ""
    fragments = matrices.swapaxes(1, 2) if transpose else matrices  # a pair of numbers a lane
    pairs = np.ascontiguousarray(fragments).view(np.uint32).reshape(4, 32)
    np.testing.assert_array_equal(registers, pairs.T)
    np.testing.assert_array_equal(back, matrices)


def test_shuffles_and_ballot(gpu: ctypes.CDLL) -> None:
    sums, first, votes = np.empty(32, np.float32), np.empty(32, np.int32), np.empty(32, np.uint32)
    assert call(gpu, "shuffles", sums, first, votes) == ""
    assert (sums == 31 * 16 + 7).all()
    assert (first == 105).all()
    assert (votes == sum(1 << i for i in range(0, 32, 3))).all()


@pytest.mark.parametrize("valid", [0, 4, 6, 16])
def test_copies_are_seen_after_the_wait_alone(gpu: ctypes.CDLL, valid: int) -> None:
    x = np.random.default_rng(3).standard_normal((64, 4), np.float32)
    early, late = np.empty_like(x), np.empty_like(x)
    assert call(gpu, "copies", x, early, late, valid) == ""
    assert np.isnan(early).all()
    expected = x.copy()
    expected.view(np.uint8)[:, valid:] = 0
    np.testing.assert_array_equal(late, expected)


def test_block_barrier_counts_those_who_have_not_ended(gpu: ctypes.CDLL) -> None:
    sums = np.zeros((3, 64), np.int32)
    assert call(gpu, "block_sum", sums, 3, 128, 1, 256, 0) == ""
    np.testing.assert_array_equal(sums, (63 * 32 + 64 * np.arange(3))[:, None].repeat(64, 1))
    assert call(gpu, "block_sum", sums, 3, 128, 1, 256, 1) == ""
    assert not np.array_equal(sums[0], np.full(64, 63 * 32))  # shared memory was never written


POWERS = 2.0 ** np.arange(8, dtype=np.float32).repeat(8)[:, None].repeat(64, 1)
RANK = np.arange(8) % 4
PULLED = RANK + 10 * ((RANK + 3) % 4 + 3) + 100 * (RANK + 1)
EXCHANGES = {  # what the kernel fills, and with what arguments
    "pass": (np.r_[np.zeros(32), 5 * np.arange(96) + 10].astype(np.float32), (5,)),
    "ring": (POWERS.sum(0), (np.ascontiguousarray(to_bits(POWERS, "bf16")), 8)),
    "clusters": (np.r_[[10] * 4, [26] * 4, PULLED].astype(np.int32), (8,)),
}


def is_exchanged(library: ctypes.CDLL, name: str, broken: int) -> bool:
    expected, arguments = EXCHANGES[name]
    found = np.zeros_like(expected)
    error = call(library, name, found, *arguments, broken)
    assert broken or not error
    return error == "" and np.array_equal(found, expected)


@pytest.mark.parametrize("name", EXCHANGES)
def test_threads_that_wait_for_each_other_exchange_numbers(gpu: ctypes.CDLL, name: str) -> None:
    """At named barriers, in a ring of boxes that TMA loads, in clusters."""
    assert is_exchanged(gpu, name, 0)


@pytest.mark.parametrize(
    ("name", "broken"),
    [("pass", 1), ("pass", 2), ("ring", 1), ("ring", 2), *(("clusters", n) for n in (1, 2, 3))],
)
def test_a_missing_wait_shows(library: ctypes.CDLL, name: str, broken: int) -> None:
    shown = []
    for seed in range(1, 9):
        with emulator.pretending(seed=seed):
            shown.append(not is_exchanged(library, name, broken))
    assert all(shown) if name == "ring" else any(shown)


# ---------------------------------------------------------------- misuse


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("operations", "different operations: ballot here, shuffle before"),
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
        (
            "barrier",
            "deadlock: block 0: 128 threads wait at barrier_wait(barrier at 0, parity 0; "
            "its phase has parity 0, misses 1 of 2 arrivals and 0 bytes).",
        ),
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
    assert text in call(library, "misuse", kind.encode(), np.zeros(64))


@pytest.mark.usefixtures("_proxies")
def test_only_its_writers_fence_lets_wgmma_see_memory(gpu: ctypes.CDLL) -> None:
    text = "thread 0 wrote to the 16 bytes of shared memory at 0 and has run no fence_async"
    assert text in call(gpu, "misuse", b"fence missing", None)
    assert text in call(gpu, "misuse", b"fence of another", None)
    assert call(gpu, "misuse", b"fence", None) == ""


def test_the_numbers_of_threads_that_are_refused(gpu: ctypes.CDLL) -> None:
    error = call(gpu, "pass", np.zeros(128, np.float32), 5, 3)
    assert "160 threads of a block of 128" in error
    for shape, text in (
        ((1, 48, 1, 0), "warps of 32"),
        ((1, 2048, 1, 0), "up to 1024"),
        ((3, 64, 2, 0), "clusters of 2"),
        ((1, 64, 1, 227 * 1024 + 1), "bytes of shared memory"),
    ):
        assert text in call(gpu, "block_sum", np.zeros(64, np.int32), *shape, 0)


# ---------------------------------------------------------------- TMA


def boxed(x: np.ndarray, at: Sizes, box: Sizes) -> np.ndarray:
    """The box at `at`, outermost first, with zeros outside."""
    result = np.zeros(box, x.dtype)
    for index in np.ndindex(*box):
        place = tuple(a + i for a, i in zip(at, index, strict=True))
        if all(0 <= p < n for p, n in zip(place, x.shape, strict=True)):
            result[index] = x[place]
    return result


def tensor_map(x: np.ndarray, box: Sizes, at: Sizes, strides: Sizes = ()) -> tuple[np.ndarray, ...]:
    """The arguments of load_box and store_box, outermost first here."""
    kinds = (np.uint64, np.uint64, np.uint32, np.int32)
    values = (x.shape, strides or x.strides[:-1], box, at)
    return (x, *(np.array(v[::-1], k) for v, k in zip(values, kinds, strict=True)))


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
def test_boxes_loaded(gpu: ctypes.CDLL, sizes: Sizes, box: Sizes, at: Sizes) -> None:
    x = np.random.default_rng(4).integers(1, 60000, sizes).astype(np.uint16)
    early, late = np.empty(np.prod(box), np.uint16), np.empty(np.prod(box), np.uint16)

    def load(announced: int) -> str:
        return call(gpu, "load_box", len(sizes), *tensor_map(x, box, at), announced, early, late)

    assert load(late.nbytes) == ""
    assert (early == 0xFFFF).all()
    np.testing.assert_array_equal(late, swizzled(boxed(x, at, box)))
    for wrong, text in ((128, "misses 0 of 1 arrivals and 128 bytes"), (-128, "-128 bytes")):
        error = load(late.nbytes + wrong)
        assert "deadlock" in error
        assert text in error


def test_tensor_maps_refused(library: ctypes.CDLL) -> None:
    x = np.zeros((24, 128), np.uint16)
    for stride, box, text in (
        (250, (8, 64), "multiples of 16"),
        (256, (257, 64), "256"),
        (256, (8, 128), "64 numbers"),
    ):
        arguments = tensor_map(x, box, (0, 0), (stride,))
        assert text in call(library, "load_box", 2, *arguments, 0, x, x)


@pytest.mark.usefixtures("_proxies")
@pytest.mark.parametrize(("sizes", "box", "at"), [CASES[3], ((2, 20, 64), (1, 16, 64), (1, 8, 0))])
def test_boxes_stored(gpu: ctypes.CDLL, sizes: Sizes, box: Sizes, at: Sizes) -> None:
    values = np.random.default_rng(5).integers(1, 60000, box).astype(np.uint16)
    x = np.zeros(sizes, np.uint16)
    arguments = (*tensor_map(x, box, at), np.ascontiguousarray(swizzled(values)))
    assert call(gpu, "store_box", *arguments, 0) == ""
    inside = boxed(np.ones(sizes, np.uint16), at, box)
    np.testing.assert_array_equal(boxed(x, at, box), values * inside)
    assert np.count_nonzero(x) == inside.sum()

    assert call(gpu, "store_box", *arguments, 1) == ""
    assert not x.any()  # overwritten with zeros before the wait
    assert "tma_store under way" in call(gpu, "store_box", *arguments, 2)
    assert "tma_store: thread" in call(gpu, "store_box", *arguments, 3)
