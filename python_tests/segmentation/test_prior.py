# SPDX-License-Identifier: Apache-2.0
"""Where the organs lie: on bodies of ellipsoids, whose places are known exactly."""

from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from fastproto.data import Volume
from fastproto.errors import ArgumentError, GeometryError, LabelError
from fastproto.segmentation.alignment import (
    Alignment,
    align_affine,
    make_picture,
    unlikeness,
    volume_box,
)
from fastproto.segmentation.prior import Atlas, DistanceMap, Prior, locate

# Value, intensity, centre and half axes (slice, row, column) in mm; the first is the body, those
# without a value are there to be aligned.
BODY = (
    (0, 300, (0, 0, 0), (70, 50, 60)),
    (0, 120, (25, 15, -10), (20, 15, 15)),
    (0, 700, (-5, 35, 0), (50, 6, 6)),
    (0, 500, (-35, -10, 25), (15, 20, 15)),
    (3, 600, (15, -10, 25), (20, 14, 16)),
    (9, 450, (-15, 5, -30), (12, 9, 10)),
)


def scan(
    shape=(48, 52, 60), spacing=(3.0, 2.5, 2.5), *, scale=(1, 1, 1), shift=(0, 0, 0), seed=0
) -> tuple[Volume, Volume]:
    """A scan and its labels; a point p of the body lies at ``scale * p + shift`` mm, seen from the
    middle of the volume.
    """
    sides = [(np.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, spacing, strict=True)]
    grid = np.stack(np.meshgrid(*sides, indexing="ij"), axis=-1)
    body = (grid - shift) / scale
    image = np.random.default_rng(seed).normal(20, 5, shape)
    label = np.zeros(shape, np.uint8)
    for value, grey, centre, half in BODY:
        inside = (((body - centre) / half) ** 2).sum(axis=-1) < 1
        image[inside] += grey - image[inside] / 2
        label[inside] = value
    geometry = (spacing[::-1], (-7.0, 30.0, 11.0))
    return Volume(image.astype(np.float32), *geometry), Volume(label, *geometry)


def dice(found: np.ndarray, label: np.ndarray, value: int) -> float:
    a, b = found == value, label == value
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def centres(label: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    return np.stack([np.argwhere(label == v).mean(axis=0) * spacing[::-1] for v in (3, 9)])


@pytest.fixture(scope="module")
def atlas() -> Atlas:
    return Atlas.make(*scan(), [3, 9], "mr", "deformable")


CHANGED = {
    "shape": (40, 60, 56),
    "spacing": (4.0, 2.4, 2.6),
    "scale": (1.1, 0.9, 1.05),
    "shift": (8, -6, 9),
    "seed": 1,
}


@pytest.mark.parametrize("kind", ["box", "affine", "deformable"])
def test_finds_organs_shifted_scaled_and_on_another_grid(atlas: Atlas, kind: str) -> None:
    image, label = scan(**CHANGED)
    prior = locate(atlas, image, kind)
    assert (prior.kind, prior.fallback) == (kind, None)
    found = prior.label_map()
    assert found.dtype == np.uint8
    assert found.shape == label.array.shape
    off = np.abs(centres(found, label.spacing) - centres(label.array, label.spacing))
    assert off.max() < (4 if kind == "box" else 2.5), "mm"
    for value in (3, 9):
        assert dice(found, label.array, value) > (0.75 if kind == "box" else 0.85)
    if kind != "box":
        assert prior.quality > 0.9


def test_the_scan_itself_comes_back(atlas: Atlas) -> None:
    image, label = scan()
    found = locate(atlas, image, "box").label_map()
    assert min(dice(found, label.array, value) for value in (3, 9)) > 0.97


@pytest.mark.parametrize("covered", [slice(0, 40), slice(12, 48)])
def test_affine_finds_the_place_in_a_scan_that_covers_less(atlas: Atlas, covered: slice) -> None:
    image, label = scan()
    less = [Volume(v.array[covered], v.spacing) for v in (image, label)]
    prior = locate(atlas, less[0], "affine")
    assert prior.fallback is None
    assert dice(prior.label_map(), less[1].array, 3) > 0.9
    expected = np.arange(48)[covered]
    np.testing.assert_allclose(prior.slice_positions(), expected, atol=0.6)


@pytest.mark.parametrize(
    "seen", [slice(26, 31), slice(26, 33), slice(30, 48), slice(20, 48)], ids=str
)
def test_affine_finds_the_place_in_a_thin_scan(seen: slice) -> None:
    atlas = Atlas.make(*scan(), [3], "mr", "affine")
    other, truth = scan(scale=(1, 0.92, 1.08), seed=2)
    prior = locate(atlas, Volume(other.array[seen], other.spacing), "affine")
    assert prior.fallback is None
    assert dice(prior.label_map(), truth.array[seen], 3) > 0.9


@pytest.mark.parametrize("slices", [1, 2, 3])
def test_a_scan_of_few_slices_has_a_prior(atlas: Atlas, slices: int) -> None:
    image, _ = scan()
    few = Volume(image.array[28 : 28 + slices], image.spacing)
    for kind in ("affine", "deformable"):
        assert locate(atlas, few, kind).label_map().any()


def test_starts_that_fail_do_not_end_the_search(
    atlas: Atlas, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, label = scan(**CHANGED)
    calls: list[bool] = []

    def failing(*arguments: object, across: bool = False) -> Alignment:
        calls.append(across)
        if failures(len(calls)):
            raise RuntimeError(f"start {len(calls)} fails")
        return align_affine(*arguments, across=across)  # type: ignore[arg-type]

    monkeypatch.setattr("fastproto.segmentation.prior.align_affine", failing)
    failures = lambda number: number == 1  # noqa: E731
    prior = locate(atlas, image, "affine")
    assert prior.fallback is None
    assert dice(prior.label_map(), label.array, 3) > 0.85
    calls.clear()
    failures = lambda number: True  # noqa: E731
    prior = locate(atlas, image, "affine")
    assert (prior.kind, prior.fallback) == ("box", "start 1 fails")


def test_across_leaves_the_slices_axis_alone(atlas: Atlas) -> None:
    image, _ = scan(**CHANGED)
    query = make_picture(image, "mr", volume_box(image), 100_000)
    start = Alignment(np.diag([1.0, 1.1, 0.95]), np.array([5.0, -3.0, 2.0]))
    found = align_affine(query, atlas.pictures[0], start, across=True)
    assert found.matrix[0].tolist() == [1, 0, 0]
    assert found.matrix[1:, 0].tolist() == [0, 0]
    assert not np.allclose(found.matrix, start.matrix)


def test_pictures_that_do_not_meet_are_unlike(atlas: Atlas) -> None:
    picture = atlas.pictures[1]
    apart = Alignment(np.eye(3), np.array([1e4, 0.0, 0.0]))
    assert unlikeness(picture, picture, apart) == float("inf")
    assert unlikeness(picture, picture, Alignment(np.eye(3), np.zeros(3))) == 0


@pytest.mark.parametrize("kind", ["affine", "deformable"])
@pytest.mark.parametrize(
    ("annotated", "seen"), [(slice(0, 36), slice(14, 48)), (slice(16, 48), slice(0, 34))]
)
def test_finds_the_place_where_either_covers_what_the_other_does_not(
    annotated: slice, seen: slice, kind: str
) -> None:
    parts = (Volume(v.array[annotated], v.spacing) for v in scan())
    atlas = Atlas.make(*parts, [3], "mr", kind)
    other, truth = scan(scale=(1, 0.92, 1.08), seed=2)
    prior = locate(atlas, Volume(other.array[seen], other.spacing), kind)
    assert dice(prior.label_map(), truth.array[seen], 3) > 0.85
    numbers = np.arange(48)[seen] - annotated.start
    np.testing.assert_allclose(prior.slice_positions(), numbers, atol=1.5)


@pytest.mark.parametrize("kind", ["box", "affine"])
def test_neither_stored_axes_nor_the_origin_matter(atlas: Atlas, kind: str) -> None:
    image, _ = scan(**CHANGED)
    # The same voxels, stored as column, slice, row, with columns and slices running backwards.
    array = image.array.transpose(2, 0, 1)[::-1, ::-1]
    x, y, z = image.spacing
    direction = (0.0, 0.0, -1.0, 1.0, 0.0, 0.0, 0.0, -1.0, 0.0)
    flipped = Volume(array, (y, z, x), (500.0, -900.0, 40.0), direction)
    one, other = locate(atlas, image, kind), locate(atlas, flipped, kind)
    assert one.shape == other.shape == image.array.shape
    assert torch.equal(one.signed_distance(3, 9), other.signed_distance(3, 9))
    assert one.box(5) == other.box(5)
    stored = other.label_map()
    assert stored.shape == array.shape
    np.testing.assert_array_equal(stored[::-1, ::-1].transpose(1, 2, 0), one.label_map())


@pytest.mark.parametrize("kind", ["affine", "deformable"])
def test_the_same_scans_give_the_same_bits_and_a_task_file_keeps_them(
    atlas: Atlas, kind: str
) -> None:
    image, _ = scan(**CHANGED)
    tensors, fields = atlas.to_parts()
    again = Atlas.from_parts(load(save(tensors)), json.loads(json.dumps(fields)))
    assert sum(tensor.nbytes for tensor in tensors.values()) < 1 << 20
    one = locate(atlas, image, kind)
    with torch.inference_mode():
        other = locate(again, image, kind)
    assert torch.equal(one.signed_distance(0, 40), other.signed_distance(0, 40))
    assert one.quality == other.quality


def test_a_box_atlas_holds_no_image_and_serves_no_more(atlas: Atlas) -> None:
    box = Atlas.make(*scan(), [3, 9], "mr", "box")
    tensors, fields = box.to_parts()
    assert set(tensors) == {"distance.0", "distance.1"}
    assert fields["pictures"] == []
    image, _ = scan(**CHANGED)
    expected = locate(atlas, image, "box").signed_distance(0, 40)
    assert torch.equal(locate(box, image).signed_distance(0, 40), expected)
    with pytest.raises(ArgumentError, match="kind: found 'affine'"):
        locate(box, image, "affine")


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((6, 7, 8), np.int16),
        np.full((48, 52, 60), 40.0, np.float32),
        np.arange(1, dtype=np.uint8).reshape(1, 1, 1),
        np.random.default_rng(0).normal(size=(1, 40, 40)).astype(np.float32),
        np.random.default_rng(0).normal(size=(3, 2, 50)).astype(np.float32),
    ],
    ids=["zeros", "constant", "one voxel", "one slice of noise", "a rod of noise"],
)
def test_odd_scans_get_a_prior_all_the_same(atlas: Atlas, array: np.ndarray) -> None:
    prior = locate(atlas, Volume(array, (2.0, 2.0, 5.0)))
    if not np.ptp(array):
        assert prior.kind == "box"
        assert prior.fallback
    distance = prior.signed_distance(0, len(array))
    assert distance.shape == (len(array), 2, *array.shape[1:])
    assert torch.isfinite(distance).all()
    assert prior.label_map().shape == array.shape
    box = prior.box(10)
    assert all(
        0 <= first < stop <= length for (first, stop), length in zip(box, array.shape, strict=True)
    )
    assert np.isfinite(prior.slice_positions()).all()


def test_ct_and_another_plane() -> None:
    image, label = scan()
    hounsfield = Volume(image.array - 500, image.spacing)
    label = Volume(label.array, label.spacing)
    atlas = Atlas.make(hounsfield, label, [9], "ct", "affine", plane="coronal")
    prior = locate(atlas, hounsfield)
    assert prior.shape == (52, 48, 60)
    assert dice(prior.label_map(), label.array, 9) > 0.9


def test_distances_and_boxes(atlas: Atlas) -> None:
    image, label = scan()
    prior = locate(atlas, image, "box")
    distance = prior.signed_distance(0, 48)
    # The organ of half axes 20, 14, 16 mm around (15, -10, 25) mm off the middle. Interpolation
    # blunts the peak.
    middle = [round(23.5 + 15 / 3), round(25.5 - 10 / 2.5), round(29.5 + 25 / 2.5)]
    assert distance[middle[0], 0, middle[1], middle[2]] == pytest.approx(-12, abs=2)
    along = distance[:, 0, middle[1], middle[2]].numpy()
    mm = np.abs((np.arange(48) - 23.5) * 3 - 15) - 20
    np.testing.assert_allclose(along[mm > -5], mm[mm > -5], atol=2.5)

    occupied = np.argwhere(label.array > 0)
    for margin in (0.0, 9.0):
        for axis, (first, stop) in enumerate(prior.box(margin)):
            step = image.spacing[::-1][axis]
            assert first == pytest.approx(occupied[:, axis].min() - margin / step, abs=1.5)
            assert stop - 1 == pytest.approx(occupied[:, axis].max() + margin / step, abs=1.5)

    with pytest.raises(ArgumentError, match="start, stop"):
        prior.signed_distance(40, 49)


def test_a_thin_small_organ_survives_the_grid() -> None:
    mask = np.zeros((5, 300, 300), bool)
    mask[2, 10:290, 150] = True
    map_ = DistanceMap.of_mask(mask, np.array([5.0, 0.7, 0.7]))
    assert max(map_.values.shape) <= 48
    assert map_.values.min() < 0


def test_memory_of_sampling_a_large_ct(atlas: Atlas) -> None:
    """13 organs in 512 x 512 x 600 voxels: what grows is what is asked for."""
    prior = locate(atlas, scan()[0], "box")
    large = Volume(np.broadcast_to(np.int16(0), (600, 512, 512)), (0.8, 0.8, 1.0))
    maps = prior.maps[:1] * 13
    prior = Prior("box", None, 0.0, tuple(range(1, 14)), maps, prior.alignment, large, "axial", 1.0)
    assert sum(map_.values.nbytes for map_ in prior.maps) < 8 << 20
    tracemalloc.start()
    distance = prior.signed_distance(300, 301)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert distance.shape == (1, 13, 512, 512)
    assert peak < 8 << 20  # NumPy's part; the tensors are the result and a copy of it


def test_says_what_is_wrong(atlas: Atlas) -> None:
    image, label = scan()
    with pytest.raises(LabelError, match="label 4"):
        Atlas.make(image, label, [3, 4], "mr")
    with pytest.raises(GeometryError):
        Atlas.make(image, Volume(label.array[:-1], label.spacing), [3], "mr")
    with pytest.raises(ArgumentError, match="kind"):
        Atlas.make(image, label, [3], "mr", "elastic")
    tensors, fields = atlas.to_parts()
    for bad in ({"maps": []}, {"values": [3]}, {"body": 1}, {"kind": "box"}):
        with pytest.raises(ArgumentError):
            Atlas.from_parts(tensors, {**fields, **bad})
    with pytest.raises(ArgumentError, match="atlas"):
        Atlas.from_parts({**tensors, "picture.1": torch.zeros(3)}, fields)
    tensors.pop("distance.1")
    with pytest.raises(ArgumentError, match=r"distance\.1"):
        Atlas.from_parts(tensors, fields)
