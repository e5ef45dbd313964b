# SPDX-License-Identifier: Apache-2.0
"""Which point of one scan lies where a point of another does: affine and deformable registration.

Points are (slice, row, column) in mm along the canonical axes of a scan, counted from the centre of
its first voxel. Where the scanner says the patient lay plays no part.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.adam import adam

from fastproto.data.geometry import linear_weights
from fastproto.data.intensity import body_mask
from fastproto.data.volume import Volume
from fastproto.segmentation.distance import extent, sample

LONGEST_SIDE = 128  # of a picture, in voxels
CT_WINDOW = (-200.0, 300.0)  # HU; wider than the network's: fat and bone guide the alignment

_GRID = 128  # voxels a side, at most, to find the body in
_SEARCH_MM = 20.0  # between the places along the slices at which the affine search may start
_STARTS = 4  # of them, the best
_SEARCH_SIDE = 24  # voxels a side, about, to compare them
_SCALES = (0.5, 2.0)  # what an affine map may do to lengths; anything beyond has gone astray
_BINS = 32
_SEED = 1

# Deformation, coarse to fine: (voxels of the picture to a cell, steps).
_LEVELS = ((4, 40), (2, 40), (1, 20))
_RATE = 0.5  # cells a step
_STIFFNESS = 0.5
_BRIGHTNESS = 0.3  # what a standard deviation of brightness weighs against the other features
_EPS = 1e-6


@dataclass(frozen=True, eq=False)
class Picture:
    """A part of a scan at low resolution.

    Attributes:
        array: [n, h, w] uint8.
        first: Position of the first voxel in mm.
        step: Side of a voxel in mm, the same along all axes.
    """

    array: np.ndarray
    first: np.ndarray
    step: float

    def points(self, stride: int = 1) -> np.ndarray:
        """[n, h, w, 3] positions of every ``stride``-th voxel in mm."""
        sides = [np.arange(0, size, stride) for size in self.array.shape]
        return np.stack(np.meshgrid(*sides, indexing="ij"), axis=-1) * self.step + self.first

    def at(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Values at [..., 3] as float32, the border's beyond it; whether they lie within."""
        index = (points - self.first) / self.step
        within = ((index >= -0.5) & (index <= np.array(self.array.shape) - 0.5)).all(axis=-1)
        return sample(self.array, points, self.first, self.step), within

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
        matrix, offset: [3, 3] and [3] mm, the affine part.
        displacement: [3, n, h, w] in mm, added to a query's point before the affine part; or None.
        first, step: The displacement's grid, as a `Picture`'s.
    """

    matrix: np.ndarray
    offset: np.ndarray
    displacement: np.ndarray | None = None
    first: np.ndarray | float = 0.0
    step: float = 1.0

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """[..., 3] -> [..., 3]."""
        if self.displacement is not None:
            moved = [sample(part, points, self.first, self.step) for part in self.displacement]
            points = points + np.stack(moved, axis=-1)
        return points @ self.matrix.T + self.offset

    def box_in_query(self, box: np.ndarray) -> np.ndarray:
        """[2, 3] of the annotated scan -> the box around its place in the query, affine part."""
        corners = np.array(list(itertools.product(*box.T)))
        moved = np.linalg.solve(self.matrix, (corners - self.offset).T).T
        return np.stack([moved.min(axis=0), moved.max(axis=0)])

    @property
    def scale(self) -> float:
        """Mean length in the annotated scan of a millimetre in the query."""
        return float(np.cbrt(abs(np.linalg.det(self.matrix))))


def body_box(seen: Volume, modality: str) -> np.ndarray:
    """[2, 3] mm, the first and the last corner of the body's box in a canonical volume.

    A volume without a body gives its whole box.
    """
    coarse, strides = _coarse(seen.array)
    body, box = body_mask(coarse, modality), volume_box(seen)
    if not body.any():
        return box
    first, last = extent(body)
    return (np.stack([first - 0.5, last + 0.5]) * strides * seen.spacing[::-1]).clip(*box)


def volume_box(seen: Volume) -> np.ndarray:
    """[2, 3] mm, the first and the last corner of a canonical volume."""
    shape, spacing = np.array(seen.array.shape), np.array(seen.spacing[::-1])
    return np.stack([-0.5 * spacing, (shape - 0.5) * spacing])


def make_picture(
    seen: Volume, modality: str, box: np.ndarray, voxels: int, step: float = 0.0
) -> Picture:
    """The part of a canonical volume within ``box`` [2, 3] mm, of about ``voxels`` at most.

    "ct" shows the window [-200, 300] HU, "mr" all up to the 99.5 % value of the body. Voxels have
    the side ``step`` mm, or for 0 the finest of the volume's own; more if there were too many.
    """
    spacing, sides = np.array(seen.spacing[::-1]), box[1] - box[0]
    finest = max(np.cbrt(sides.prod() / voxels), sides.max() / LONGEST_SIDE)
    step = float(max(step or spacing.min(), finest))
    size = np.ceil(sides / step).astype(int)
    first = box.mean(axis=0) - (size - 1) / 2 * step
    weights = [
        linear_weights(
            (first[axis] + np.arange(size[axis]) * step) / side, length, step / side
        ).numpy()
        for axis, (length, side) in enumerate(zip(seen.array.shape, spacing, strict=True))
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


def good_starts(query: Picture, atlas: Picture, boxes: Alignment) -> list[Alignment]:
    """``boxes``, and the same without scaling along the slices at places that fit; the best first.

    Two scans seldom cover the same length of the body. They are taken to share at least half of
    the shorter one. Of neighbouring places the best one counts, and of all `_STARTS`.
    """
    lengths = [picture.array.shape[0] * picture.step for picture in (query, atlas)]
    starts = []
    matrix = np.diag([1.0, *np.diag(boxes.matrix)[1:]])
    low, high = -lengths[0] + min(lengths) / 2, lengths[1] - min(lengths) / 2
    for shift in np.linspace(low, high, int((high - low) / _SEARCH_MM) + 2):
        first = atlas.first[0] + shift - query.first[0]
        starts.append(Alignment(matrix, np.array([first, *boxes.offset[1:]])))
    stride = max(1, max(query.array.shape) // _SEARCH_SIDE)
    fits = np.array([correlation(query, atlas, start, stride) for start in starts])
    beside = np.pad(fits, 1, constant_values=-np.inf)
    peaks = np.flatnonzero((fits >= beside[:-2]) & (fits > beside[2:]))
    found = [(fits[i], starts[i]) for i in peaks]
    found.append((correlation(query, atlas, boxes, stride), boxes))
    return [start for _, start in sorted(found, key=lambda pair: -pair[0])][:_STARTS]


def align_affine(
    query: Picture, atlas: Picture, start: Alignment, *, across: bool = False
) -> Alignment:
    """Refine ``start`` by mutual information (Mattes), coarse to fine.

    With ``across``, the slices' axis is shifted, but neither stretched nor tilted: where the two
    cover different lengths of the body, stretching one onto the other is a trap.

    Raises:
        RuntimeError: It found nothing usable, e.g. for lack of overlap.
    """
    centre = query.first + (np.array(query.array.shape) - 1) / 2 * query.step
    transform = sitk.AffineTransform(3)
    transform.SetCenter(centre[::-1].tolist())
    transform.SetMatrix(start.matrix[::-1, ::-1].ravel().tolist())
    transform.SetTranslation((start(centre) - centre)[::-1].tolist())
    method = sitk.ImageRegistrationMethod()
    method.SetNumberOfThreads(1)
    method.SetNumberOfWorkUnits(1)  # sums in one order: the same scans give the same bits
    method.SetMetricAsMattesMutualInformation(_BINS)
    method.SetMetricSamplingStrategy(method.RANDOM)
    method.SetMetricSamplingPercentagePerLevel([1.0, 0.5, 0.1], _SEED)
    method.SetShrinkFactorsPerLevel([4, 2, 1])
    method.SetSmoothingSigmasPerLevel([2.0, 1.0, 0.0])
    method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOff()
    method.SetOptimizerAsRegularStepGradientDescent(1.0, 1e-3, 200, 0.5, 1e-5)
    method.SetOptimizerScalesFromPhysicalShift()
    if across:  # of x, y, z: the matrix row by row, then the translation
        method.SetOptimizerWeights([1, 1, 0, 1, 1, 0, 0, 0, 0, 1, 1, 1])
    method.SetInterpolator(sitk.sitkLinear)
    method.SetInitialTransform(transform, inPlace=True)
    method.Execute(query.image(), atlas.image())
    matrix = np.array(transform.GetMatrix()).reshape(3, 3)[::-1, ::-1].copy()
    if not np.isfinite(matrix).all():
        raise RuntimeError("the affine alignment went astray (numbers that are not finite)")
    scales = np.linalg.svd(matrix, compute_uv=False)
    if not (_SCALES[0] <= scales.min() and scales.max() <= _SCALES[1]):
        raise RuntimeError(f"the affine alignment went astray (scales {scales.round(2).tolist()})")
    return Alignment(matrix, centre + np.array(transform.GetTranslation())[::-1] - matrix @ centre)


@torch.inference_mode(False)
def align_deformable(query: Picture, atlas: Picture, start: Alignment) -> Alignment:
    """Bend an affine ``start`` until the two look alike, by gradient descent.

    What is compared is each voxel's likeness to its neighbours (MIND-SSC, Heinrich et al. 2013),
    which changes of contrast and brightness leave alone.
    """
    return _bend(query, start, (_descriptor(query.array), *_there(query, atlas, start)), _LEVELS)


@torch.enable_grad()
def _bend(
    query: Picture, start: Alignment, seen: Sequence[Tensor], levels: Sequence[tuple[int, int]]
) -> Alignment:
    """``start`` with a displacement that makes the query look like the annotated scan.

    ``seen`` holds the descriptors of the two at the query's voxels, and what each voxel weighs.
    """
    field, scale = torch.zeros(1, 3, 1, 1, 1), 1.0  # in cells of so many voxels
    for cell, steps in levels:
        fixed, moving, weight = (
            F.avg_pool3d(each, cell, ceil_mode=True, count_include_pad=False) for each in seen
        )
        size = fixed.shape[2:]
        grid = torch.stack(torch.meshgrid(*(torch.arange(n) for n in size), indexing="ij"), dim=-1)
        to_unit = 2 / (torch.tensor(size) - 1).clamp(min=1)
        rough = F.interpolate(field * (scale / cell), size=size, mode="trilinear").requires_grad_()
        first, second, count = torch.zeros_like(rough), torch.zeros_like(rough), torch.tensor(0.0)
        for _ in range(steps):
            smooth = _smooth(rough)
            places = ((grid + smooth[0].movedim(0, -1)) * to_unit - 1).flip(-1)[None]
            moved = F.grid_sample(moving, places, padding_mode="border", align_corners=True)
            bent = sum(smooth.diff(dim=axis).square().sum() for axis in (2, 3, 4))
            bending = bent / grid[..., 0].numel()
            apart = (weight * (moved - fixed).square().sum(1, keepdim=True)).mean()
            slope = torch.autograd.grad(apart + _STIFFNESS * bending / 3, [rough])
            with torch.no_grad():  # torch.optim.Adam imports torch's compiler, in three seconds
                adam(
                    [rough], list(slope), [first], [second], [], [count], lr=_RATE, beta1=0.9,
                    beta2=0.999, eps=1e-8, weight_decay=0, amsgrad=False, maximize=False,
                )  # fmt: skip
        field, scale = _smooth(rough).detach(), cell
    field = F.interpolate(field * scale, size=query.array.shape, mode="trilinear")
    displacement = field[0].numpy() * np.float32(query.step)
    return Alignment(start.matrix, start.offset, displacement, query.first, query.step)


def correlation(query: Picture, atlas: Picture, alignment: Alignment, stride: int = 1) -> float:
    """Normalised cross-correlation of the two, where they overlap; 0 where nothing varies."""
    values, within = atlas.at(alignment(query.points(stride)))
    pair = np.stack([query.array[::stride, ::stride, ::stride][within], values[within]])
    if pair.shape[1] < 2 or not (pair.std(axis=1) > 0).all():
        return 0.0
    return float(np.corrcoef(pair)[0, 1])


@torch.inference_mode(False)
def unlikeness(query: Picture, atlas: Picture, alignment: Alignment) -> float:
    """How far an affine alignment is from right: what a rough bend leaves that does not fit.

    It is what `align_deformable` makes small, per voxel where the two overlap; infinite if nowhere.
    The affine alignment alone does not tell: organs of one height differ more in shape than organs
    and what lies a few slices on.
    """
    fixed, there = _descriptor(query.array), _there(query, atlas, alignment)
    bent = _bend(query, alignment, (fixed, *there), _LEVELS[:1])
    # A bend may blur what fits already.
    return min(_rest(fixed, *there), _rest(fixed, *_there(query, atlas, bent)))


def _rest(fixed: Tensor, moving: Tensor, weight: Tensor) -> float:
    # In one order whatever the threads: a choice hangs on it.
    rest = ((fixed - moving).square().sum(1) * weight[0]).numpy().sum(dtype=np.float64)
    seen = float(weight.numpy().sum(dtype=np.float64))
    return float(rest) / seen if seen else float("inf")


def _there(query: Picture, atlas: Picture, alignment: Alignment) -> tuple[Tensor, Tensor]:
    """Descriptor of what the annotated scan has at the query's voxels, and where it has any."""
    values, within = atlas.at(alignment(query.points()))
    return _descriptor(values), torch.from_numpy(within.astype(np.float32))[None, None]


def _smooth(field: Tensor) -> Tensor:
    for _ in range(3):
        field = _mean3(field)
    return field


def _mean3(x: Tensor) -> Tensor:
    """Means over 3 x 3 x 3 voxels, over fewer at the border."""
    if min(x.shape[2:]) >= 3:
        return F.avg_pool3d(x, 3, stride=1, padding=1, count_include_pad=False)
    # The pooling above refuses thin ones.
    total, count = (
        F.avg_pool3d(F.pad(each, [1] * 6), 3, stride=1) for each in (x, torch.ones_like(x))
    )
    return total / count


def _descriptor(array: np.ndarray) -> Tensor:
    """``[n, h, w]`` -> ``[1, 13, n, h, w]``: MIND-SSC in 0..1, and the brightness."""
    image = torch.from_numpy(array.astype(np.float32))
    padded = F.pad(image[None, None], [1] * 6, mode="replicate")
    shifted = [
        padded.roll(-sign, axis)[:, :, 1:-1, 1:-1, 1:-1] for axis in (2, 3, 4) for sign in (-1, 1)
    ]
    pairs = [(a, b) for a, b in itertools.combinations(range(6), 2) if a // 2 != b // 2]
    squares = _mean3(torch.cat([(shifted[a] - shifted[b]).square() for a, b in pairs], dim=1))
    squares -= squares.amin(dim=1, keepdim=True)
    noise = squares.mean(dim=1, keepdim=True)
    typical = noise.mean() + _EPS
    likeness = torch.exp(-squares / noise.clamp(typical * 1e-3, typical * 1e3))
    brightness = (image - image.mean()) * (_BRIGHTNESS / (image.std() + _EPS))
    return torch.cat([likeness, brightness[None, None]], dim=1)


def _coarse(array: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """Every so many-th voxel, at most `_GRID` a side, and how many."""
    strides = [-(-length // _GRID) for length in array.shape]
    return array[tuple(slice(None, None, stride) for stride in strides)], strides


def _window(array: np.ndarray, modality: str) -> tuple[float, float]:
    if modality == "ct":
        return CT_WINDOW
    coarse, _ = _coarse(array)
    body = body_mask(coarse, modality)
    low = float(np.percentile(coarse, 0.5))
    return low, float(np.percentile(coarse[body], 99.5)) if body.any() else low
