# SPDX-License-Identifier: Apache-2.0
"""Synthetic CT- and MR-like patients: data to try, test and demonstrate fastproto without a scan.

Sizes, positions, fat, bowel and contrast differ from patient to patient; the intensities of
neighbouring organs overlap, and the same intensity occurs in tissue that has no label (bowel,
muscle, vena cava).
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from scipy.spatial.transform import Rotation

from fastproto._files import write_text
from fastproto.data.phantom_anatomy import LABEL_OF_TISSUE, ORGANS, anatomy
from fastproto.data.phantom_image import ct_image, mr_image
from fastproto.data.volume import Volume, write_volume
from fastproto.errors import OutputError, require

_GENERATOR = "fastproto phantom"


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
        folder: Where to write; made if absent. A phantom that is there already is replaced, if
            nothing was added to its images and labels.
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
    folder = Path(folder)
    _check_number("patients", patients, 1)
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
    width = anatomy_rng.uniform(350, 410)  # of the field of view, mm
    extent = np.array([anatomy_rng.uniform(215, 265), width, width])
    spacing = np.round(extent / size, 3)  # (z, y, x)
    tissue, light = anatomy(anatomy_rng, size, spacing)
    make = ct_image if modality == "ct" else mr_image
    image = make(appearance_rng, tissue, light, spacing)

    frame = Rotation.from_euler("xyz", anatomy_rng.uniform(-6, 6, 3), degrees=True).as_matrix()
    origin = np.round(anatomy_rng.uniform(-1, 1, 3) * 40 - frame @ (size * spacing)[::-1] / 2, 3)
    stored = orientation or ("LPS", "RAS")[index % 2]
    image_volume = _store(image, spacing, origin, frame, stored)
    return image_volume, _store(LABEL_OF_TISSUE[tissue], spacing, origin, frame, stored)


def _store(
    array: np.ndarray, spacing: np.ndarray, origin: np.ndarray, frame: np.ndarray, orientation: str
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
    )


def _check_arguments(
    modality: str, seed: int, shape: Sequence[int], orientation: str | None
) -> None:
    require(modality in ("ct", "mr"), "modality", found=repr(modality), allowed='"ct" or "mr"')
    _check_number("seed", seed, 0)
    large = len(shape) == 3 and shape[0] >= 8 and min(shape[1:]) >= 32
    allowed = "(slices, rows, columns) with at least 8 slices of 32 x 32"
    require(large, "shape", found=repr(tuple(shape)), allowed=allowed)
    letters = "LPS" if orientation is None else orientation
    require(
        len(letters) == 3 and all(set(letters) & set(ends) for ends in ("LR", "AP", "IS")),
        "orientation",
        found=repr(orientation),
        allowed='one letter each of LR, AP and IS in any order, e.g. "LPS" or "PSR"',
    )


def _check_number(name: str, number: object, least: int) -> None:
    whole = isinstance(number, int) and number >= least
    require(whole, name, found=repr(number), allowed=f"a whole number from {least}")


def _remove_earlier(folder: Path) -> None:
    """Remove the patients of an earlier phantom; raise if ``folder`` holds other scans, or more."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    refuse = partial(
        require,
        subject=folder,
        error=OutputError,
        allowed="a new or empty folder, or an earlier phantom",
        fix="Choose another folder, so that nothing of yours is lost or mixed with synthetic data.",
    )
    refuse(folder.is_dir(), found="a file")
    try:
        description = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
        cases = description["cases"] if description["generator"] == _GENERATOR else None
    except (OSError, ValueError, KeyError, TypeError):
        cases = None
    refuse(isinstance(cases, list), found="a folder with other files in it")
    own = {f"{case}.nii.gz" for case in cases or ()}
    files = [file for part in ("images", "labels") for file in folder.glob(f"{part}/*")]
    made = [file for file in files if file.name in own or file.name.startswith(".partial-")]
    foreign = ", ".join(sorted(file.name for file in files if file not in made))
    refuse(not foreign, found=f"a phantom to which somebody added {foreign}")
    for file in made:
        file.unlink()
