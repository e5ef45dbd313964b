# SPDX-License-Identifier: Apache-2.0
"""Where the organs lie: on bodies of ellipsoids, whose places are known exactly."""

from __future__ import annotations

import functools
import gc
import json
import tracemalloc
import weakref
from dataclasses import replace

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
def atlas():
    return Atlas.make(*scan(), [3, 9], "mr", "deformable")


ELSEWHERE = {"shape": (40, 60, 56), "spacing": (4.0, 2.4, 2.6), "shift": (8, -6, 9)}
CHANGED = {**ELSEWHERE, "scale": (1.1, 0.9, 1.05), "seed": 1}
OTHER = {"scale": (1, 0.92, 1.08), "seed": 2}


@pytest.fixture(scope="module")
def located(atlas):
    """The prior in the changed scan, of each kind once."""
    image, _ = scan(**CHANGED)
    return functools.cache(lambda kind: locate(atlas, image, kind))


@pytest.mark.parametrize("kind", ["box", "affine", "deformable"])
def test_finds_organs_shifted_scaled_and_on_another_grid(located, kind):
    _, label = scan(**CHANGED)
    prior = located(kind)
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


@pytest.mark.parametrize(
    ("kind", "annotated", "seen", "changes"),
    [
        *(("affine", (0, 48), seen, {}) for seen in ((0, 40), (12, 48))),
        *(("affine", (0, 48), seen, OTHER) for seen in ((26, 31), (30, 48))),
        *(
            pytest.param("affine", (0, 48), seen, OTHER, marks=pytest.mark.slow)
            for seen in ((26, 33), (20, 48))
        ),
        ("deformable", (0, 36), (14, 48), OTHER),
        ("deformable", (16, 48), (0, 34), OTHER),
    ],
)
def test_finds_the_place_where_either_covers_what_the_other_does_not(
    kind, annotated, seen, changes
):
    """The affine part says which slices correspond, also of a bent alignment."""
    parts = (Volume(v.array[slice(*annotated)], v.spacing) for v in scan())
    atlas = Atlas.make(*parts, [3], "mr", kind)
    image, truth = scan(**changes)
    prior = locate(atlas, Volume(image.array[slice(*seen)], image.spacing))
    assert (prior.kind, prior.fallback) == (kind, None)
    least = 0.9 if kind == "affine" else 0.85
    assert dice(prior.label_map(), truth.array[slice(*seen)], 3) > least
    numbers = np.arange(*seen) - annotated[0]
    atol = 1.5 if changes else 0.6
    np.testing.assert_allclose(prior.slice_positions(), numbers, atol=atol)


def test_starts_that_fail_do_not_end_the_search(atlas, monkeypatch):
    image, label = scan(**CHANGED)
    calls, failing = [], [1]

    def align(*arguments, across):
        calls.append(across)
        if len(calls) in failing:
            raise RuntimeError(f"start {len(calls)} fails")
        return align_affine(*arguments, across=across)

    monkeypatch.setattr("fastproto.segmentation.prior.align_affine", align)
    prior = locate(atlas, image, "affine")
    assert prior.fallback is None
    assert dice(prior.label_map(), label.array, 3) > 0.85
    calls.clear()
    failing[:] = range(1, 99)
    prior = locate(atlas, image, "affine")
    assert (prior.kind, prior.fallback) == ("box", "start 1 fails")


def test_failed_starts_do_not_keep_the_scan_in_memory(atlas, monkeypatch):
    def align(*_, across):
        raise RuntimeError("fails")

    monkeypatch.setattr("fastproto.segmentation.prior.align_affine", align)
    image, _ = scan(**CHANGED)
    held = weakref.ref(image.array)
    gc.disable()
    try:
        locate(atlas, image, "affine")
        del image
        assert held() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("step", ["align_affine", "align_deformable"])
def test_a_lack_of_memory_is_no_failed_registration(atlas, monkeypatch, step):
    def align(*_, **__):
        raise RuntimeError("std::bad_alloc")

    monkeypatch.setattr(f"fastproto.segmentation.prior.{step}", align)
    with pytest.raises(RuntimeError, match="bad_alloc"):
        locate(atlas, scan(**CHANGED)[0])


def test_across_leaves_the_slices_axis_alone(atlas):
    image, _ = scan(**CHANGED)
    query = make_picture(image, "mr", volume_box(image), 100_000)
    start = Alignment(np.diag([1.0, 1.1, 0.95]), np.array([5.0, -3.0, 2.0]))
    found = align_affine(query, atlas.pictures[0], start, across=True)
    assert found.matrix[0].tolist() == [1, 0, 0]
    assert found.matrix[1:, 0].tolist() == [0, 0]
    assert not np.allclose(found.matrix, start.matrix)


def test_pictures_that_do_not_meet_are_unlike(atlas):
    picture = atlas.pictures[1]
    apart = Alignment(np.eye(3), np.array([1e4, 0.0, 0.0]))
    assert unlikeness(picture, picture, apart) == float("inf")
    assert unlikeness(picture, picture, Alignment(np.eye(3), np.zeros(3))) == 0


@pytest.mark.parametrize("kind", ["box", "affine"])
def test_neither_stored_axes_nor_the_origin_matter(atlas, located, kind):
    image, _ = scan(**CHANGED)
    # The same voxels, stored as column, slice, row, with columns and slices running backwards.
    array = image.array.transpose(2, 0, 1)[::-1, ::-1]
    x, y, z = image.spacing
    direction = (0.0, 0.0, -1.0, 1.0, 0.0, 0.0, 0.0, -1.0, 0.0)
    flipped = Volume(array, (y, z, x), (500.0, -900.0, 40.0), direction)
    one, other = located(kind), locate(atlas, flipped, kind)
    assert one.shape == other.shape == image.array.shape
    assert torch.equal(one.signed_distance(3, 9), other.signed_distance(3, 9))
    assert one.box(5) == other.box(5)
    stored = other.label_map()
    assert stored.shape == array.shape
    np.testing.assert_array_equal(stored[::-1, ::-1].transpose(1, 2, 0), one.label_map())


def test_the_same_scans_give_the_same_bits_and_a_task_file_keeps_them(atlas, located):
    """Bent from the affine alignment, whose bits it needs."""
    tensors, fields = atlas.to_parts()
    again = Atlas.from_parts(load(save(tensors)), json.loads(json.dumps(fields)))
    assert sum(tensor.nbytes for tensor in tensors.values()) < 1 << 20
    one = located("deformable")
    with torch.inference_mode():
        other = locate(again, scan(**CHANGED)[0], "deformable")
    assert torch.equal(one.signed_distance(0, 40), other.signed_distance(0, 40))
    assert one.quality == other.quality


def test_a_box_atlas_holds_no_image_and_serves_no_more(located):
    box = Atlas.make(*scan(), [3, 9], "mr", "box")
    tensors, fields = box.to_parts()
    assert set(tensors) == {"distance.0", "distance.1"}
    assert fields["pictures"] == []
    image, _ = scan(**CHANGED)
    expected = located("box").signed_distance(0, 40)
    assert torch.equal(locate(box, image).signed_distance(0, 40), expected)
    with pytest.raises(ArgumentError, match="kind: found 'affine'"):
        locate(box, image, "affine")


def noise(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(
    "array",
    [
        pytest.param(np.zeros((6, 7, 8), np.int16), id="zeros"),
        pytest.param(np.full((48, 52, 60), 40.0, np.float32), id="constant"),
        pytest.param(np.zeros((1, 1, 1), np.uint8), id="one voxel"),
        pytest.param(noise(1, 40, 40), id="one slice of noise"),
        pytest.param(noise(3, 2, 50), id="a rod of noise"),
        *(scan()[0].array[28 : 28 + slices] for slices in (1, 2, 3)),
    ],
)
def test_odd_scans_get_a_prior_all_the_same(atlas, array):
    prior = locate(atlas, Volume(array, (2.5, 2.5, 3.0)))
    if not np.ptp(array):
        assert prior.kind == "box"
        assert prior.fallback
    distance = prior.signed_distance(0, len(array))
    assert distance.shape == (len(array), 2, *array.shape[1:])
    assert torch.isfinite(distance).all()
    found = prior.label_map()
    assert found.shape == array.shape
    assert found.any() or array.shape[1:] != (52, 60)  # as large as the annotated scan
    for (first, stop), length in zip(prior.box(10), array.shape, strict=True):
        assert 0 <= first < stop <= length
    assert np.isfinite(prior.slice_positions()).all()


def test_ct_and_another_plane():
    image, label = scan()
    hounsfield = replace(image, array=image.array - 500)
    atlas = Atlas.make(hounsfield, label, [9], "ct", "affine", plane="coronal")
    prior = locate(atlas, hounsfield)
    assert prior.shape == (52, 48, 60)
    assert dice(prior.label_map(), label.array, 9) > 0.9


def test_distances_and_boxes(atlas):
    image, label = scan()
    prior = locate(atlas, image, "box")
    found = prior.label_map()
    assert min(dice(found, label.array, value) for value in (3, 9)) > 0.97
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


def test_a_map_knows_the_organs_volume():
    z, y, x = np.indices((40, 60, 80))
    ball = ((z - 20) * 3) ** 2 + ((y - 30) * 2) ** 2 + (x - 40) ** 2 < 36**2
    shape = DistanceMap.of_mask(ball, np.array([3.0, 2.0, 1.0]))
    assert shape.millilitres == pytest.approx(ball.sum() * 6 / 1000, rel=0.03)


def test_a_thin_small_organ_survives_the_grid():
    mask = np.zeros((5, 300, 300), bool)
    mask[2, 10:290, 150] = True
    map_ = DistanceMap.of_mask(mask, np.array([5.0, 0.7, 0.7]))
    assert max(map_.values.shape) <= 48
    assert map_.values.min() < 0


def test_memory_of_sampling_a_large_ct(atlas):
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


def test_says_what_is_wrong(atlas):
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
