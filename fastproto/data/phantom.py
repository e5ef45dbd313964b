# SPDX-License-Identifier: Apache-2.0
"""Synthetic CT- and MR-like patients: data to try, test and demonstrate fastproto without a scan.

A patient is an abdomen built from ellipsoids in coordinates of its own body (u to the left, v to
the back, w to the head, each about -1..1), which are tilted and smoothly warped. Sizes, positions,
fat, bowel and contrast differ from patient to patient; the intensities of neighbouring organs
overlap, and the same intensity occurs in tissue that has no label (bowel, muscle, vena cava).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import SimpleITK as sitk
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation

from fastproto._files import write_text
from fastproto.data.volume import Volume, write_volume
from fastproto.errors import ArgumentError, OutputError

ORGANS: dict[int, str] = {
    1: "liver",
    2: "spleen",
    3: "right kidney",
    4: "left kidney",
    5: "spine",
    6: "aorta",
    7: "stomach",
    8: "lungs",
    9: "gallbladder",
    10: "psoas muscles",
}

_GENERATOR = "fastproto phantom"


class _Tissue(NamedTuple):
    """Mean and spread from patient to patient, in HU and in MR units, and texture in parts of 1."""

    ct: float
    ct_spread: float
    mr: float
    mr_spread: float
    texture: float


# HU as in a portal venous phase; MR as in a T2-weighted turbo spin echo (flowing blood is dark).
_TISSUES: dict[str, _Tissue] = {
    "air": _Tissue(-1000, 0, 0, 0, 0.0),
    "fat": _Tissue(-100, 8, 255, 30, 0.5),
    "muscle": _Tissue(58, 6, 150, 15, 0.6),
    "rib": _Tissue(420, 60, 180, 25, 1.0),
    "heart": _Tissue(130, 20, 120, 25, 0.4),
    "cava": _Tissue(125, 20, 75, 30, 0.2),
    "canal": _Tissue(25, 8, 720, 60, 0.3),
    "disc": _Tissue(90, 12, 300, 60, 0.6),
    "sinus": _Tissue(-60, 25, 420, 50, 0.8),
    "bowel wall": _Tissue(80, 12, 210, 25, 0.4),
    "bowel": _Tissue(35, 25, 380, 90, 1.2),
    "gas": _Tissue(-850, 40, 25, 10, 0.2),
    "stomach gas": _Tissue(-850, 40, 25, 10, 0.2),
    "liver": _Tissue(105, 12, 205, 25, 0.5),
    "spleen": _Tissue(118, 12, 375, 40, 0.4),
    "right kidney": _Tissue(165, 20, 420, 35, 0.9),
    "left kidney": _Tissue(165, 20, 420, 35, 0.9),
    "spine": _Tissue(240, 40, 230, 30, 1.6),
    "aorta": _Tissue(155, 22, 55, 25, 0.2),
    "stomach": _Tissue(45, 20, 430, 110, 1.0),
    "lungs": _Tissue(-820, 30, 35, 12, 0.9),
    "gallbladder": _Tissue(12, 6, 650, 60, 0.2),
    "psoas muscles": _Tissue(62, 6, 145, 15, 0.6),
}
_TISSUE_INDEX = {name: index for index, name in enumerate(_TISSUES)}
_LABEL_OF_TISSUE = np.zeros(len(_TISSUES), dtype=np.uint8)
for _label, _organ in ORGANS.items():
    _LABEL_OF_TISSUE[_TISSUE_INDEX[_organ]] = _label
for _part, _organ in (("disc", "spine"), ("stomach gas", "stomach")):
    _LABEL_OF_TISSUE[_TISSUE_INDEX[_part]] = _LABEL_OF_TISSUE[_TISSUE_INDEX[_organ]]


def write_phantom(
    folder: str | os.PathLike[str],
    *,
    patients: int = 8,
    modality: str = "ct",
    seed: int = 0,
    shape: Sequence[int] = (48, 128, 128),
    orientation: str | None = None,
) -> Path:
    """Write a data set of synthetic patients: ``images/``, ``labels/`` and ``dataset.json``.

    Patient ``i`` depends on ``(modality, seed, shape, i)`` alone, so a larger data set begins with
    the smaller one. The same seed in CT and MR shows the same anatomy.

    Args:
        folder: Where to write; made if absent. A phantom that is there already is replaced.
        patients: Number of patients, at least 1.
        modality: ``"ct"`` (HU, Gaussian noise) or ``"mr"`` (T2-like, Rician noise, bias field).
        seed: A number of 0 or more.
        shape: Slices, rows and columns of the axial volume. The field of view is that of a body
            whatever the shape, so more voxels mean smaller ones.
        orientation: Stored axes of all volumes, three letters as in ``"LPS"`` (the ends the x, y
            and z axis point to); None varies between ``"LPS"`` and ``"RAS"``.

    Returns:
        The folder, which ``fastproto.data.open_dataset`` reads.

    Raises:
        ArgumentError: An argument is out of range.
        OutputError: ``folder`` holds something else, or cannot be written.
    """
    if not isinstance(patients, int) or patients < 1:
        raise ArgumentError("patients", found=repr(patients), allowed="a whole number from 1")
    folder = Path(folder)
    _check_arguments(modality, seed, shape, orientation)
    _remove_earlier(folder)
    cases = [f"{modality}_{index:03d}" for index in range(patients)]
    description = {
        "name": f"fastproto phantom ({modality.upper()}, seed {seed})",
        "generator": _GENERATOR,
        "modality": modality.upper(),
        "labels": {"0": "background"} | {str(label): name for label, name in ORGANS.items()},
        "cases": cases,
    }
    # Written first, so that a phantom that was interrupted is known as one and can be replaced.
    write_text(folder / "dataset.json", json.dumps(description, indent=1) + "\n")
    for index, case in enumerate(cases):
        image, label = make_patient(
            index, modality=modality, seed=seed, shape=shape, orientation=orientation
        )
        write_volume(folder / "images" / f"{case}.nii.gz", image.array, like=image)
        write_volume(folder / "labels" / f"{case}.nii.gz", label.array, like=label)
    return folder


def make_patient(
    index: int,
    *,
    modality: str = "ct",
    seed: int = 0,
    shape: Sequence[int] = (48, 128, 128),
    orientation: str | None = None,
) -> tuple[Volume, Volume]:
    """One synthetic patient in memory; arguments as for :func:`write_phantom`.

    Returns:
        The image (int16) and its label map (uint8, values of ``ORGANS``) on the same grid.
    """
    _check_arguments(modality, seed, shape, orientation)
    anatomy_rng = np.random.default_rng([seed, index, 0])
    appearance_rng = np.random.default_rng([seed, index, 1 if modality == "ct" else 2])
    size = np.array(shape)
    spacing = np.round(_field_of_view(anatomy_rng) / size, 3)  # (z, y, x), mm
    tissue, light = _anatomy(anatomy_rng, size, spacing)
    if modality == "ct":
        image = _ct(appearance_rng, tissue, light, spacing)
    else:
        image = _mr(appearance_rng, tissue, light, spacing)

    frame = Rotation.from_euler("xyz", anatomy_rng.uniform(-6, 6, 3), degrees=True).as_matrix()
    origin = np.round(anatomy_rng.uniform(-1, 1, 3) * 40 - frame @ (size * spacing)[::-1] / 2, 3)
    stored = orientation or ("LPS", "RAS")[index % 2]
    label = _LABEL_OF_TISSUE[tissue]
    image_volume = _store(image, spacing, origin, frame, stored)
    return image_volume, _store(label, spacing, origin, frame, stored)


def _field_of_view(rng: np.random.Generator) -> np.ndarray:
    """Extent in mm along (z, y, x); a pixel is square on a square grid."""
    width = rng.uniform(350, 410)
    return np.array([rng.uniform(215, 265), width, width])


def _anatomy(
    rng: np.random.Generator, size: np.ndarray, spacing: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Paint one body.

    Returns:
        Tissue index per voxel (uint8 [Z, Y, X]) and the relative texture per voxel (float32).
    """
    u, v, w = _body_coordinates(rng, size, spacing)
    tissue = np.zeros(size, dtype=np.uint8)

    def vary(value: float, spread: float) -> float:
        return float(value + rng.uniform(-spread, spread))

    def blob(
        centre: tuple[float, float, float], radii: tuple[float, float, float], *, lean: float = 0.0
    ) -> np.ndarray:
        """1 at the centre, 0 on the surface; place and size vary, the surface is wavy."""
        cu, cv, cw = (vary(c, 0.035) for c in centre)
        ru, rv, rw = (r * vary(1.0, 0.14) for r in radii)
        along = w - cw
        field = (u - cu - lean * along) / ru
        field *= field
        field += ((v - cv) / rv) ** 2
        field += (along / rw) ** 2
        np.subtract(1, np.sqrt(field, out=field), out=field)
        waves = [
            np.sin(vary(2.2, 0.8) * np.pi * np.linspace(-1, 1, n, dtype=np.float32) + vary(0, 3.1))
            for n in size
        ]
        field += 0.10 * waves[0][:, None, None] * waves[1][:, None] * waves[2]
        return field

    def paint(name: str, where: np.ndarray) -> None:
        tissue[where] = _TISSUE_INDEX[name]

    radius = (np.abs(u) ** 2.3 + np.abs(v) ** 2.3) ** (1 / 2.3)
    outer = 1 - vary(0.15, 0.08)  # the ring outside is subcutaneous fat
    inner = outer - vary(0.085, 0.02)
    cavity = radius < inner
    paint("fat", radius < 1)
    paint("muscle", (radius < outer) & ~cavity)
    ribs = np.sin(vary(17, 2) * (w - 0.35 * v) + vary(0, 3)) > 0.55
    paint("rib", (np.abs(radius - (inner + outer) / 2) < 0.028) & ribs & (w > -0.25))

    for _ in range(rng.integers(14, 23)):
        loop = blob((vary(0, 0.6), vary(-0.18, 0.36), vary(-0.6, 0.45)), (0.17, 0.2, 0.22))
        paint("bowel wall", (loop > 0) & cavity)
        paint("bowel", (loop > 0.16) & cavity)
        if rng.random() < 0.3:
            top = vary(-0.3, 0.2)
            paint("gas", (loop > 0.2) & (v < top) & cavity)

    spine_u, spine_v = vary(0, 0.02), vary(0.45, 0.02)
    for side in (-1, 1):
        back = blob((side * 0.2 + spine_u, spine_v + 0.3, 0.0), (0.2, 0.15, 3.0))
        paint("muscle", (back > 0) & (radius < outer))
        width = np.clip(0.5 - 0.6 * w, 0.0, 1.0)  # tapers off towards the diaphragm
        psoas = blob((side * 0.21 + spine_u, spine_v + 0.02, -0.6), (0.1, 0.15, 1.05))
        paint("psoas muscles", (psoas > 0.35 * (1 - width)) & (w < 0.15) & cavity)
    body = blob((spine_u, spine_v, 0.0), (0.135, 0.19, 6.0))
    process = blob((spine_u, spine_v + 0.27, 0.0), (0.05, 0.19, 6.0))
    wings = blob((spine_u, spine_v + 0.17, 0.0), (0.24, 0.05, 6.0))
    levels = np.sin(vary(20, 2) * w + vary(0, 3))
    bone = (body > 0) | (process > 0) | ((wings > 0) & (levels > -0.1))
    paint("spine", bone & (radius < outer))
    paint("disc", (body > 0) & (levels < -0.8))
    paint("canal", blob((spine_u, spine_v + 0.19, 0.0), (0.06, 0.065, 6.0)) > 0)

    dome = vary(0.72, 0.06) - 0.55 * np.clip(radius / inner, 0, 1) ** 3 - 0.25 * v
    lungs = (w > dome) & (radius < inner - 0.02) & (np.abs(u) > 0.14)
    paint("lungs", lungs & ~bone & (tissue != _TISSUE_INDEX["muscle"]))
    paint("heart", (blob((0.16, -0.32, 1.05), (0.45, 0.42, 0.32)) > 0) & cavity)

    abdomen = radius < inner - 0.015
    right_lobe = blob((-0.44, -0.08, 0.34), (0.44, 0.62, 0.56), lean=-0.1)
    left_lobe = blob((-0.02, -0.42, 0.45), (0.46, 0.3, 0.3), lean=0.25)
    fissure = w > vary(-0.25, 0.1) + 0.45 * u + 0.25 * v - 0.15
    paint("liver", (np.maximum(right_lobe, left_lobe) > 0) & fissure & abdomen & ~bone)
    fundus = blob((0.38, -0.12, 0.42), (0.27, 0.34, 0.3), lean=0.2)
    antrum = blob((0.12, -0.4, 0.1), (0.36, 0.19, 0.17), lean=-0.3)
    stomach = np.maximum(fundus, antrum)
    paint("stomach", (stomach > 0) & abdomen)
    if rng.random() < 0.6:
        paint("stomach gas", (stomach > 0.3) & (v < vary(-0.42, 0.08)))
    spleen = blob((0.62, 0.25, 0.4), (0.23, 0.36, 0.34), lean=-0.1)
    paint("spleen", (spleen > 0) & (stomach < -0.02) & abdomen)
    paint("gallbladder", (blob((-0.3, -0.4, 0.0), (0.12, 0.17, 0.2)) > 0) & abdomen)

    kidney_fields = []
    for side, name, height in ((-1, "right kidney", -0.18), (1, "left kidney", -0.06)):
        centre = (side * 0.43, 0.36, height)
        kidney = blob(centre, (0.18, 0.25, 0.42), lean=-side * 0.12)
        hilum = blob((side * 0.29, 0.3, height), (0.11, 0.11, 0.16), lean=-side * 0.12)
        inside = (kidney > 0) & (radius < inner - 0.01) & (body < -0.1)
        paint(name, inside & (hilum < 0))
        paint("sinus", inside & (hilum >= 0))
        kidney_fields.append(kidney)
    vessel = (0.065, 0.09, 6.0)
    paint("cava", (blob((-0.12 + spine_u, spine_v - 0.24, 0.0), vessel) > 0) & (w < 0.75))
    paint("aorta", blob((0.06 + spine_u, spine_v - 0.25, 0.0), vessel, lean=0.02) > 0)

    # The cortex of a kidney takes up more contrast than the medulla, the edge of a bone is denser.
    light = np.zeros(size, dtype=np.float32)
    cortex = np.maximum(*kidney_fields)
    light[(cortex > 0) & (cortex < 0.3)] = 1.5
    light[(cortex >= 0.3)] = -1.5
    light[(body > 0) & (body < 0.18)] = 2.5
    return tissue, light


def _body_coordinates(
    rng: np.random.Generator, size: np.ndarray, spacing: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Coordinates (u, v, w) of every voxel, float32 [Z, Y, X]: off centre, tilted and warped."""
    axes = [
        (np.arange(n, dtype=np.float32) - (n - 1) / 2) * step + rng.uniform(-8, 8)
        for n, step in zip(size, spacing, strict=True)
    ]
    z, y, x = np.meshgrid(*axes, indexing="ij", sparse=True)
    tilt = Rotation.from_euler("xyz", rng.uniform(-4, 4, 3), degrees=True).as_matrix()
    half_axes = np.array([150, 108, 115]) * rng.uniform(0.91, 1.09, 3)  # mm, along u, v, w
    coordinates = []
    for row, half_axis in zip(tilt, half_axes, strict=True):
        coordinate = np.zeros(size, dtype=np.float32)
        for factor, axis in zip(row, (x, y, z), strict=True):
            coordinate += np.float32(factor) * axis
        for _ in range(3):
            # A sine in every direction, with wavelengths of 150 to 400 mm.
            waves = [np.sin(2 * np.pi * (a / rng.uniform(150, 400) + rng.random())) for a in axes]
            amplitude = np.float32(rng.uniform(3, 8))
            coordinate += amplitude * waves[0][:, None, None] * waves[1][:, None] * waves[2]
        coordinates.append(coordinate / np.float32(half_axis))
    return coordinates[0], coordinates[1], coordinates[2]


def _ct(
    rng: np.random.Generator, tissue: np.ndarray, light: np.ndarray, spacing: np.ndarray
) -> np.ndarray:
    """HU of every voxel, int16."""
    means = _draw_means(rng, [(t.ct, t.ct_spread) for t in _TISSUES.values()])
    image = _render(rng, tissue, light, spacing, means, texture=14.0)
    image += rng.normal(0, rng.uniform(9, 18), image.shape).astype(np.float32)
    return np.clip(np.rint(image), -1024, 3071).astype(np.int16)


def _mr(
    rng: np.random.Generator, tissue: np.ndarray, light: np.ndarray, spacing: np.ndarray
) -> np.ndarray:
    """MR signal of every voxel in arbitrary units that differ between patients, int16."""
    means = _draw_means(rng, [(t.mr, t.mr_spread) for t in _TISSUES.values()])
    image = _render(rng, tissue, light, spacing, means.clip(0), texture=28.0)
    image *= _bias_field(rng, tissue.shape)
    sigma = rng.uniform(12, 24)
    real = image + rng.normal(0, sigma, image.shape).astype(np.float32)
    imaginary = rng.normal(0, sigma, image.shape).astype(np.float32)
    return np.rint(np.hypot(real, imaginary) * rng.uniform(0.5, 4.0)).astype(np.int16)


def _draw_means(rng: np.random.Generator, normals: Sequence[tuple[float, float]]) -> np.ndarray:
    """Mean intensity of every tissue in one patient, float32; both kidneys are alike."""
    means = rng.normal(*np.transpose(normals)).astype(np.float32)
    means[_TISSUE_INDEX["left kidney"]] = means[_TISSUE_INDEX["right kidney"]]
    return means


def _render(
    rng: np.random.Generator,
    tissue: np.ndarray,
    light: np.ndarray,
    spacing: np.ndarray,
    means: np.ndarray,
    *,
    texture: float,
) -> np.ndarray:
    """Noise-free image: mean of each tissue, its texture, and the blur of a scanner, float32."""
    grain = gaussian_filter(rng.standard_normal(tissue.shape, dtype=np.float32), 4.0 / spacing)
    grain *= np.float32(texture / grain.std())
    amplitude = np.array([t.texture for t in _TISSUES.values()], dtype=np.float32)
    image = means[tissue]
    image += amplitude[tissue] * (grain + np.float32(texture) * light)
    return gaussian_filter(image, [0.5, 2.2 / spacing[1], 2.2 / spacing[2]])


def _bias_field(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """A smooth gain, about 0.6 to 1.6, as of a receiver coil."""
    axes = [np.linspace(-1, 1, n, dtype=np.float32) for n in shape]
    z, y, x = np.meshgrid(*axes, indexing="ij", sparse=True)
    a = rng.uniform(-0.2, 0.2, 6).astype(np.float32)
    return np.exp(a[0] * x + a[1] * y + a[2] * z + a[3] * x * y + a[4] * x * x + a[5] * y * y)


def _store(
    array: np.ndarray,
    spacing: np.ndarray,
    origin: np.ndarray,
    frame: np.ndarray,
    orientation: str,
) -> Volume:
    """A volume whose axes are stored as ``orientation`` says, from an axial one."""
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing[::-1].tolist())
    image.SetOrigin(origin.tolist())
    image.SetDirection(frame.ravel().tolist())
    image = sitk.DICOMOrient(image, orientation)
    return Volume(
        array=sitk.GetArrayFromImage(image),
        spacing=image.GetSpacing(),
        origin=image.GetOrigin(),
        direction=image.GetDirection(),
        path=None,
    )


def _check_arguments(
    modality: str, seed: int, shape: Sequence[int], orientation: str | None
) -> None:
    if modality not in ("ct", "mr"):
        raise ArgumentError("modality", found=repr(modality), allowed='"ct" or "mr"')
    if not isinstance(seed, int) or seed < 0:
        raise ArgumentError("seed", found=repr(seed), allowed="a whole number from 0")
    if len(shape) != 3 or shape[0] < 8 or min(shape[1:]) < 32:
        raise ArgumentError(
            "shape",
            found=repr(tuple(shape)),
            allowed="(slices, rows, columns) with at least 8 slices of 32 x 32",
        )
    if orientation is not None and (
        len(orientation) != 3
        or any(len(set(orientation) & set(e)) != 1 for e in ("LR", "AP", "IS"))
    ):
        raise ArgumentError(
            "orientation",
            found=repr(orientation),
            allowed='one letter each of LR, AP and IS in any order, e.g. "LPS" or "PSR"',
        )


def _remove_earlier(folder: Path) -> None:
    """Remove the files of an earlier phantom; raise if ``folder`` holds anything else."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(folder, found="a file", allowed="a folder to write to")
    if not folder.exists() or not any(folder.iterdir()):
        return
    description = folder / "dataset.json"
    if not (description.is_file() and f'"{_GENERATOR}"' in description.read_text(errors="replace")):
        raise OutputError(
            folder,
            found="a folder with other files in it",
            allowed="a new or empty folder, or an earlier phantom",
            fix="Choose another folder, so that nothing of yours is mixed with synthetic data.",
        )
    for part in ("images", "labels"):
        for file in folder.glob(f"{part}/*.nii.gz"):
            if re.fullmatch(r"(ct|mr)_\d{3,}\.nii\.gz", file.name):
                file.unlink()
