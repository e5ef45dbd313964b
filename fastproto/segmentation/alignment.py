# SPDX-License-Identifier: Apache-2.0
"""Which point of one scan lies where a point of another does: affine and deformable registration.

Points are (slice, row, column) in mm along the canonical axes of a scan, counted from the centre of
its first voxel. Where the scanner says the patient lay plays no part.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.ndimage
import SimpleITK as sitk

from fastproto.data.preprocessing import body_mask, linear_weights
from fastproto.data.volume import Volume

# A picture has about this many voxels, and no side longer than this.
VOXELS = 400_000
LONGEST_SIDE = 128
CT_WINDOW = (-200.0, 300.0)  # HU; wider than the network's: fat and bone guide the alignment

_BODY_GRID = 128
_BINS = 32
_SEED = 1


@dataclass(frozen=True, eq=False)
class Picture:
    """A scan at low resolution, as much of it as holds the body.

    Attributes:
        array: [n, h, w] uint8.
        first: Position of the first voxel in mm.
        step: Side of a voxel in mm, the same along all axes.
    """

    array: np.ndarray
    first: np.ndarray
    step: float

    def image(self) -> sitk.Image:
        """For SimpleITK, whose x, y, z are our columns, rows, slices."""
        image = sitk.GetImageFromArray(self.array.astype(np.float32))
        image.SetSpacing([self.step] * 3)
        image.SetOrigin(self.first[::-1].tolist())
        return image


@dataclass(frozen=True, eq=False)
class Alignment:
    """Maps points of a query to points of the annotated scan.

    Attributes:
        matrix, offset: [3, 3] and [3], the affine part.
        displacement: [3, n, h, w] in mm, added to a query's point before the affine part; or None.
        first, step: The displacement's grid, as a `Picture`'s.
    """

    matrix: np.ndarray
    offset: np.ndarray
    displacement: np.ndarray | None = None
    first: np.ndarray | None = None
    step: float = 1.0

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """[..., 3] -> [..., 3]."""
        if self.displacement is not None:
            index = np.moveaxis((points - self.first) / self.step, -1, 0)
            moved = [
                scipy.ndimage.map_coordinates(component, index, order=1, mode="nearest")
                for component in self.displacement
            ]
            points = points + np.stack(moved, axis=-1)
        return points @ self.matrix.T + self.offset

    @property
    def scale(self) -> float:
        """Mean length in the annotated scan of a millimetre in the query."""
        return float(np.cbrt(abs(np.linalg.det(self.matrix))))


def body_box(seen: Volume, modality: str) -> np.ndarray:
    """[2, 3] mm, the first and the last corner of the body's box in a canonical volume.

    A volume without a body gives its whole box.
    """
    shape, spacing = np.array(seen.array.shape), np.array(seen.spacing[::-1])
    steps = -(-shape // _BODY_GRID)
    body = body_mask(seen.array[tuple(slice(None, None, step) for step in steps)], modality)
    box = np.stack([-0.5 * spacing, (shape - 0.5) * spacing])
    for axis in range(3) if body.any() else ():
        hit = np.flatnonzero(body.any(axis=tuple({0, 1, 2} - {axis})))
        ends = np.array([hit[0] - 0.5, hit[-1] + 0.5]) * steps[axis] * spacing[axis]
        box[:, axis] = ends.clip(*box[:, axis])
    return box


def make_picture(
    seen: Volume, modality: str, box: np.ndarray, step: float | None = None
) -> Picture:
    """The part of a canonical volume within ``box`` [2, 3] mm as a `Picture`.

    Args:
        seen: The volume, in canonical orientation.
        modality: "ct": the window [-200, 300] HU. "mr": up to the 99.5 % value of the body.
        box: The part to show.
        step: Voxel side in mm; None takes one that suits the box. It grows where the picture would
            have too many voxels.
    """
    spacing, sides = np.array(seen.spacing[::-1]), box[1] - box[0]
    least = max(np.cbrt(sides.prod() / VOXELS), sides.max() / LONGEST_SIDE, spacing.min())
    step = float(max(step or 0, least))
    size = np.ceil(sides / step).astype(int)
    first = box.mean(axis=0) - (size - 1) / 2 * step
    weights = [
        linear_weights(
            (first[axis] + np.arange(size[axis]) * step) / spacing[axis], length, ratio
        ).numpy()
        for axis, (length, ratio) in enumerate(zip(seen.array.shape, step / spacing, strict=True))
    ]
    low, high = _window(seen.array, modality)
    used = np.flatnonzero(weights[0].any(axis=0))
    planes = np.empty((len(used), size[1], size[2]), np.float32)
    for plane, index in zip(planes, used, strict=True):
        values = np.clip(seen.array[index], low, high, dtype=np.float32) - np.float32(low)
        plane[...] = weights[1] @ values @ weights[2].T
    array = np.tensordot(weights[0][:, used], planes, axes=1)
    array *= 255 / (high - low) if high > low else 0
    return Picture(np.rint(array).astype(np.uint8), first, step)


def align_boxes(query: np.ndarray, atlas: np.ndarray) -> Alignment:
    """Scale and shift one box [2, 3] onto another, axis by axis."""
    scale = (atlas[1] - atlas[0]) / (query[1] - query[0])
    return Alignment(np.diag(scale), atlas[0] - scale * query[0])


def align_affine(query: Picture, atlas: Picture, start: Alignment) -> Alignment:
    """Refine ``start`` by mutual information (Mattes), coarse to fine.

    Raises:
        RuntimeError: SimpleITK gave up, e.g. for lack of overlap.
    """
    fixed, moving = query.image(), atlas.image()
    centre = query.first + (np.array(query.array.shape) - 1) / 2 * query.step
    transform = sitk.AffineTransform(3)
    transform.SetCenter(centre[::-1].tolist())
    transform.SetMatrix(start.matrix[::-1, ::-1].ravel().tolist())
    transform.SetTranslation((start(centre) - centre)[::-1].tolist())
    method = _method(transform)
    method.SetOptimizerAsRegularStepGradientDescent(1.0, 1e-3, 100, 0.5, 1e-4)
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel([4, 2])
    method.SetSmoothingSigmasPerLevel([2.0, 1.0])
    method.SetMetricSamplingPercentagePerLevel([0.5, 0.1], _SEED)
    method.Execute(fixed, moving)
    matrix = np.array(transform.GetMatrix()).reshape(3, 3)[::-1, ::-1]
    target = centre + np.array(transform.GetTranslation())[::-1]
    if not np.isfinite(matrix).all() or not np.isfinite(target).all():
        raise RuntimeError("the registration diverged")
    return Alignment(matrix.copy(), target - matrix @ centre)


def correlation(query: Picture, atlas: Picture, alignment: Alignment) -> float:
    """Normalised cross-correlation of the two, where they overlap; 0 where nothing varies."""
    grid = np.moveaxis(np.indices(query.array.shape), 0, -1) * query.step + query.first
    index = np.moveaxis((alignment(grid) - atlas.first) / atlas.step, -1, 0)
    moved = scipy.ndimage.map_coordinates(
        atlas.array.astype(np.float32), index, order=1, cval=-1.0, prefilter=False
    )
    both = moved >= 0
    pair = np.stack([query.array[both], moved[both]])
    if pair.shape[1] < 2 or not (pair.std(axis=1) > 0).all():
        return 0.0
    return float(np.corrcoef(pair)[0, 1])


def _method(transform: sitk.Transform) -> sitk.ImageRegistrationMethod:
    method = sitk.ImageRegistrationMethod()
    method.SetNumberOfThreads(1)  # sums in one order: the same scans give the same bits
    method.SetMetricAsMattesMutualInformation(_BINS)
    method.SetMetricSamplingStrategy(method.RANDOM)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetInitialTransform(transform, inPlace=True)
    return method


def _window(array: np.ndarray, modality: str) -> tuple[float, float]:
    if modality == "ct":
        return CT_WINDOW
    coarse = array[tuple(slice(None, None, -(-length // _BODY_GRID)) for length in array.shape)]
    body = body_mask(coarse, modality)
    low = float(np.percentile(coarse, 0.5))
    return low, float(np.percentile(coarse[body], 99.5)) if body.any() else low
