# SPDX-License-Identifier: Apache-2.0
"""Supervoxels cover the body, only the body, at nested sizes in millilitres."""

from __future__ import annotations

import io
import itertools
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fastproto.data import Preprocessing, open_dataset, read_volume
from fastproto.errors import ArgumentError, TrainingError
from fastproto.training import supervoxels as module
from fastproto.training.supervoxels import (
    Supervoxels,
    all_supervoxels,
    body_mask,
    cached_supervoxels,
    supervoxels,
)

_C = pytest.importorskip("fastproto._C", reason="installed without native code")

SPACING = (5.0, 2.0, 2.0)


def body(slices: int = 16, seed: int = 0) -> np.ndarray:
    """A cylinder with four organs, a dark cavity and noise, in air with a small bright object."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:96, :96] * (128 / 96)
    image = np.where((x - 64) ** 2 + (y - 64) ** 2 < 50**2, 0.5, 0.0)
    for cy, cx, value in ((45, 45, 0.9), (45, 85, 0.8), (85, 45, 0.3), (85, 85, 0.7)):
        image[(x - cx) ** 2 + (y - cy) ** 2 < 13**2] = value
    image[(x - 64) ** 2 + (y - 64) ** 2 < 5**2] = 0.0
    image[5:10, 5:10] = 1.0
    image = np.broadcast_to(image, (slices, 96, 96))
    return (image + rng.normal(0, 0.002, image.shape)).astype(np.float32)


def native(image, mask=None, spacing=(1.0, 1.0, 1.0), scale=0.0, min_sizes=(1,), **options):
    """``_C.supervoxels`` of nested lists or arrays."""
    image = np.asarray(image, np.float32)
    mask = np.ones(image.shape, np.uint8) if mask is None else np.asarray(mask)
    return _C.supervoxels(image, mask, spacing, scale, list(min_sizes), **options)


def is_nested(fine: np.ndarray, coarse: np.ndarray) -> bool:
    """Whether each number of ``fine`` lies in one of ``coarse``."""
    pairs = np.unique(np.stack([fine.ravel(), coarse.ravel()]), axis=1)
    return len(pairs[0]) == len(np.unique(pairs[0]))


def scales(found: Supervoxels) -> list[np.ndarray]:
    """The labels at every scale."""
    return [parents[found.finest] for parents in found.parents]


# The native function, by hand.


def test_equal_voxels_are_one_component_each_plateau_its_own():
    image = [[[0, 0, 5, 5], [0, 0, 5, 5]], [[0, 0, 5, 5], [9, 9, 9, 9]]]
    labels = native(image)
    assert labels.dtype == np.int32
    assert labels.tolist() == [[[[1, 1, 2, 2], [1, 1, 2, 2]], [[1, 1, 2, 2], [3, 3, 3, 3]]]]


def test_diagonal_neighbours_are_linked():
    mask = np.eye(3, dtype=bool)[:, None, :] & np.eye(3, dtype=bool)[:, :, None]  # a space diagonal
    for flipped in (mask, mask[:, ::-1], mask[:, :, ::-1], mask[::-1]):
        assert native(np.zeros((3, 3, 3)), flipped)[0].max() == 1


@pytest.mark.parametrize(("scale", "count"), [(0.5, 5), (1.0, 3), (3.0, 2)])
def test_the_scale_says_what_a_component_forgives(scale: float, count: int):
    """Steps of 1, 2, 1, 3: a pair forgives 1 + scale / 2, by the paper's predicate."""
    assert native([[[0, 1, 3, 4, 7]]], scale=scale)[0].max() == count


def test_what_is_too_small_joins_its_nearest_neighbour():
    image = [[[0, 0, 0, 4, 7, 7, 7, 7]]]
    assert native(image, min_sizes=(1, 2, 5))[:, 0, 0].tolist() == [
        [1, 1, 1, 2, 3, 3, 3, 3],
        [1, 1, 1, 2, 2, 2, 2, 2],
        [1, 1, 1, 1, 1, 1, 1, 1],
    ]


def test_the_mask_is_respected_and_pieces_of_their_own_stay_small():
    image = np.zeros((1, 1, 7))
    labels = native(image, [[[0, 1, 1, 1, 0, 2, 0]]], min_sizes=(3,))
    assert labels[0, 0, 0].tolist() == [0, 1, 1, 1, 0, 2, 0]


def test_masked_voxels_may_be_nan_others_not():
    image, mask = np.zeros((1, 2, 2)), np.ones((1, 2, 2), bool)
    image[0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        native(image, mask)
    mask[0, 0, 0] = False
    assert native(image, mask)[0].max() == 1


@pytest.mark.parametrize(
    ("spacing", "exponent", "joins"),
    [((1, 1, 1), 2.0, "slice"), ((3, 1, 1), 2.0, "row"), ((3, 1, 1), 0.0, "slice")],
)
def test_distance_makes_edges_heavier(spacing: tuple, exponent: float, joins: str):
    """The 5 is nearer to the other slice's 7 than to its own row's 2, but for the distance."""
    image = [[[0, 0, 7, 7]], [[2, 2, 5, 0]]]
    mask = [[[0, 0, 1, 1]], [[1, 1, 1, 0]]]
    labels = native(image, mask, spacing, min_sizes=(2,), exponent=exponent)[0]
    assert labels.max() == 2
    assert labels[1, 0, 2] == (labels[0, 0, 2] if joins == "slice" else labels[1, 0, 1])


def test_thick_slices_are_linked():
    image = np.zeros((6, 8, 8))
    image[:, 4:] = 1
    image += np.random.default_rng(0).normal(0, 0.01, image.shape)
    labels = native(image, spacing=(7.7, 1.25, 1.25), min_sizes=(100,), exponent=3.0)[0]
    assert labels.max() == 2
    assert (labels[:, :4] == 1).all()
    assert (labels[:, 4:] == 2).all()


@pytest.mark.parametrize("scale", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 40, 30), (9, 20, 31)])
def test_sizes_nesting_numbers_and_repeatability(shape: tuple[int, ...], scale: float):
    rng = np.random.default_rng(1)
    image, mask = rng.normal(size=shape).astype(np.float32), rng.random(shape) < 0.9
    sizes = (1, 5, 5, 40, 200)
    labels = native(image, mask, (3.0, 1.0, 1.5), scale, sizes)
    assert np.array_equal(labels, native(image, mask, (3.0, 1.0, 1.5), scale, sizes))
    assert np.array_equal(labels == 0, np.broadcast_to(~mask, labels.shape))
    pieces = native(np.zeros(shape), mask)[0]  # what hangs together at all
    smallest_piece = np.bincount(pieces.ravel())[1:].min(initial=mask.size)
    for size, label in zip(sizes, labels, strict=True):
        numbers, counts = np.unique(label[mask], return_counts=True)
        assert numbers.tolist() == list(range(1, len(numbers) + 1))
        assert counts.min(initial=mask.size) >= min(size, smallest_piece)
        assert is_nested(label, pieces)
    for fine, coarse in itertools.pairwise(labels):
        assert is_nested(fine, coarse)
    assert np.array_equal(labels[1], labels[2])


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [("image", np.zeros((2, 2)), "2 dimensions"), ("image", np.zeros((0, 2, 2)), "shape"),
     ("mask", np.ones((2, 2, 3)), "another shape"), ("spacing", (0.0, 1.0, 1.0), ""),
     ("spacing", (1.0, np.nan, 1.0), ""), ("scale", -1.0, ""), ("scale", np.inf, ""),
     ("exponent", -1.0, ""), ("min_sizes", (), ""), ("min_sizes", (0, 1), ""),
     ("min_sizes", (2, 1), ""), ("min_sizes", (1, 1 << 60), "")],
)  # fmt: skip
def test_unusable_arguments_are_named(name: str, value: object, found: str):
    with pytest.raises(ValueError, match=f"{name}: found {found}"):
        native(**{"image": np.zeros((2, 2, 2)), name: value})


def test_absurd_spacings_and_intensities_do_no_harm():
    image = np.array([[[3e38, -3e38, 0]], [[0, 0, 3e38]]])
    for spacing in ((1e300, 1e-300, 1e-300), (1e-300, 1e300, 1.0)):
        assert native(image, spacing=spacing, scale=1.0, min_sizes=(6,))[0].max() == 1


# Of a volume.


def test_the_body_has_its_holes_filled_and_its_arm_kept():
    image = body()
    image[:, 20:76, 87:] = 0.5
    mask = body_mask(image)
    assert mask[:, 48, 48].all()
    assert mask[:, 48, 90].all()
    assert not mask[:, 7, 7].any()
    assert mask.sum() == pytest.approx(16 * (np.pi * 37.5**2 + 56 * 9), rel=0.02)


@pytest.fixture(scope="module")
def found() -> Supervoxels:
    return supervoxels(body(), SPACING)


def test_supervoxels_partition_the_body(found: Supervoxels):
    mask = body_mask(body())
    assert found.min_volumes == (2.0, 6.0, 20.0, 60.0)  # 0.7 mL is 35 voxels
    assert found.finest.dtype == np.int16
    assert found.parents[0].tolist() == list(range(found.finest.max() + 1))
    for volume, labels in zip(found.min_volumes, scales(found), strict=True):
        assert np.array_equal(labels > 0, mask)
        numbers, counts = np.unique(labels[mask], return_counts=True)
        assert numbers.tolist() == list(range(1, len(numbers) + 1))
        assert counts.min() * 0.02 >= volume
        assert is_nested(found.finest, labels)


def test_an_organ_is_a_supervoxel(found: Supervoxels):
    y, x = np.mgrid[:96, :96] * (128 / 96)
    organ = np.broadcast_to((x - 45) ** 2 + (y - 45) ** 2 < 13**2, (16, 96, 96))
    overlaps = []
    for labels in scales(found):
        most = labels == np.bincount(labels[organ]).argmax()
        overlaps.append((organ & most).sum() / (organ | most).sum())
    assert max(overlaps) > 0.9


@pytest.mark.parametrize("factor", [1.0, 250.0])
def test_intensities_are_relative_and_floats_of_any_size_do(found: Supervoxels, factor: float):
    other = supervoxels((body() * factor).astype(np.float64), SPACING)
    assert (other.finest != found.finest).mean() < 0.05


def test_volumes_go_by_the_spacing():
    image = body()
    small = supervoxels(image, (1.0, 1.0, 1.0))
    assert small.min_volumes == (0.7, 2.0, 6.0)  # 60 mL of body
    tiny = supervoxels(image[:1, ::8, ::8], (1.0, 1.0, 1.0))
    assert len(tiny.min_volumes) == 1
    assert tiny.finest.max() == 1


@pytest.mark.parametrize("value", [0.0, 7.0])
def test_a_volume_without_body_has_none(value: float):
    found = supervoxels(np.full((4, 16, 16), value), SPACING)
    assert not found.finest.any()
    assert found.parents.shape == (1, 1)


def test_slabs_are_numbered_on(monkeypatch: pytest.MonkeyPatch):
    image = body()
    monkeypatch.setattr(module, "_SLAB_VOXELS", image.size // 2)
    found = supervoxels(image, SPACING)
    for labels in scales(found):
        lower, upper = (np.unique(half[half > 0]) for half in (labels[:8], labels[8:]))
        assert np.concatenate([lower, upper]).tolist() == list(range(1, labels.max() + 1))
        assert is_nested(found.finest, labels)


def test_many_numbers_take_more_bits(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "MIN_VOXELS", 1)
    monkeypatch.setattr(module, "MIN_VOLUMES", (0.001,))
    monkeypatch.setattr(module, "SIGMA", 0.0)
    image = np.random.default_rng(0).random((40, 100, 100)) + 1
    image[0, :4, :4] = 0
    found = supervoxels(image, (1.0, 1.0, 1.0))
    assert found.finest.dtype == found.parents.dtype == np.int32
    assert found.finest.max() > 32767


@pytest.mark.parametrize(
    ("image", "spacing", "name"),
    [(np.zeros((4, 4)), SPACING, "image"), (np.zeros((0, 4, 4)), SPACING, "image"),
     (np.full((2, 4, 4), np.nan), SPACING, "image"),
     (np.zeros((2, 4, 4)), (1.0, 0.0, 1.0), "spacing"),
     (np.zeros((2, 4, 4)), (1.0, 1.0), "spacing")],
)  # fmt: skip
def test_unusable_volumes_are_refused(image: np.ndarray, spacing: tuple, name: str):
    with pytest.raises(ArgumentError, match=name):
        supervoxels(image, spacing)


def test_without_native_code_a_compiler_is_asked_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr("fastproto._C")
    monkeypatch.setitem(sys.modules, "fastproto._C", None)
    for call in (lambda: supervoxels(body(2), SPACING), lambda: all_supervoxels({}, "kept")):
        with pytest.raises(TrainingError, match=r"C\+\+ compiler"):
            call()


# Kept and in numbers.


def same(one: Supervoxels, other: Supervoxels) -> bool:
    """Equal in every field."""
    equal = np.array_equal(one.finest, other.finest) and np.array_equal(one.parents, other.parents)
    return equal and (one.finest.dtype, one.min_volumes) == (other.finest.dtype, other.min_volumes)


def test_a_kept_volume_is_read_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    image, folder = body(6), tmp_path / "new"
    made = cached_supervoxels(image, SPACING, folder)
    monkeypatch.setattr(module, "supervoxels", None)
    assert same(cached_supervoxels(image, SPACING, folder), made)
    assert same(cached_supervoxels(image.copy("F"), SPACING, folder), made)
    for other, spacing in ((image + 1, SPACING), (image, (5.0, 2.0, 2.5))):
        with pytest.raises(TypeError):
            cached_supervoxels(other, spacing, folder)
    monkeypatch.setattr(module, "_VERSION", -1)
    with pytest.raises(TypeError):
        cached_supervoxels(image, SPACING, folder)
    assert len(list(folder.iterdir())) == 1


def archive(**arrays: object) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


@pytest.mark.parametrize(
    "damaged",
    [
        lambda content: content[:-100],
        lambda content: content[:999] + bytes([content[999] ^ 255]) + content[1000:],
        lambda _: b"not an archive",
        lambda _: b"",
        lambda _: archive(key="another", finest=[1], parents=[[0, 1]], min_volumes=[1.0]),
        lambda _: archive(finest=np.array([{}], dtype=object)),
    ],
)
def test_a_damaged_or_foreign_file_is_made_again(tmp_path: Path, damaged: Callable[[bytes], bytes]):
    image = body(6)
    made = cached_supervoxels(image, SPACING, tmp_path)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    path.write_bytes(damaged(content))
    assert same(cached_supervoxels(image, SPACING, tmp_path), made)
    assert path.read_bytes() == content


def test_a_folder_that_cannot_be_written_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    (tmp_path / "file").write_text("in the way")
    with caplog.at_level(logging.WARNING, "fastproto"):
        found = cached_supervoxels(body(6), SPACING, tmp_path / "file")
    assert same(found, supervoxels(body(6), SPACING))
    assert "not kept" in caplog.text


def test_one_failure_does_not_stop_the_others(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    volumes = {
        "b": (body(6).astype(np.float16), SPACING),
        "broken": (np.full((2, 8, 8), np.inf, np.float32), SPACING),
        "a": (body(6, seed=1), SPACING),
    }
    with caplog.at_level(logging.WARNING, "fastproto"):
        found = all_supervoxels(volumes, tmp_path, progress=False)
    assert list(found) == ["b", "a"]
    assert same(found["a"], supervoxels(*volumes["a"]))
    assert "broken is left out" in caplog.text
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "size", "volumes"),
    [
        ("ixi_brain_mr", 120, (2.0, 6.0, 20.0, 60.0)),
        ("openkbp_hn_ct", 128, (6.0, 20.0, 60.0)),
        ("chaos_t2_mr", 256, (2.0, 6.0, 20.0, 60.0)),
    ],
)
def test_real_scans(test_data: Path, name: str, size: int, volumes: tuple[float, ...]):
    """Nearly all pieces span several slices, and a body is cut into tens to thousands of them."""
    if not (test_data / name).is_dir():
        pytest.skip(f"no {name} at {test_data}")
    dataset = open_dataset(test_data / name)
    volume = read_volume(dataset.cases[4].image)
    prepared = Preprocessing.fit([volume], dataset.modality, size).prepare(volume)
    image = prepared.images(0, len(prepared))[:, 0].numpy()
    found = supervoxels(image, (prepared.spacing[0], prepared.pixel_size, prepared.pixel_size))
    assert found.min_volumes == volumes
    assert 0.1 < (found.finest > 0).mean() < 0.9
    for labels in scales(found):
        spans = np.bincount(np.concatenate([np.unique(part[part > 0]) for part in labels]))[1:]
        assert (spans > 1).mean() > 0.9
        assert 20 < labels.max() < 6000
