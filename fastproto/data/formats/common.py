# SPDX-License-Identifier: Apache-2.0
"""What the formats share: calling SimpleITK, and what must hold for every volume."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from fastproto.errors import GeometryError, VolumeError, require

Numbers = tuple[float, ...]
# Array [Z, Y, X], spacing, origin and direction, as the fields of Volume.
Voxels = tuple[np.ndarray, Numbers, Numbers, Numbers]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence file descriptor 2 while native code runs.

    ITK, MetaIO, GDCM and niftilib each write diagnostics there that no SimpleITK switch turns off.
    What they complain about is checked and reported by the caller, with the file's name.
    """
    try:
        saved = os.dup(2)
    except OSError:  # the process has no stderr
        yield
        return
    try:
        with open(os.devnull, "wb") as sink:
            os.dup2(sink.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def reason(error: RuntimeError) -> str:
    """The sentence of a SimpleITK error that says what was wrong, on one line."""
    text = re.split(r"ERROR: ", str(error))[-1]
    text = re.sub(r"^\w+\(0x[0-9a-f]+\): ", "", text)
    return " ".join(text.split())


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Let SimpleITK read a file: silently, and with errors of our own.

    Raises:
        VolumeError, GeometryError: What SimpleITK says against the file.
    """
    try:
        with quiet():
            yield
    except RuntimeError as error:
        kind = GeometryError if "spacing" in str(error) or "cosines" in str(error) else VolumeError
        raise kind(
            path,
            found=f"a file that SimpleITK cannot read ({reason(error)})",
            allowed="a complete, valid volume",
            fix="Copy or export the file again.",
        ) from error


def read_image(path: Path) -> Voxels:
    """Read a file that SimpleITK checks well enough.

    Raises:
        VolumeError, GeometryError: Unreadable, or no 3-D scalar volume.
    """
    with reading(path):
        image = sitk.ReadImage(str(path))
    size, channels = image.GetSize(), image.GetNumberOfComponentsPerPixel()
    require(
        channels <= 1 and "complex" not in image.GetPixelIDTypeAsString(),
        path,
        error=VolumeError,
        found=f"{max(channels, 2)} values per voxel",
        allowed="one number per voxel",
    )
    check_three_dimensions(path, size, "image")
    axes = np.array(image.GetDirection()).reshape(len(size), len(size))[:3, :3]
    return (
        sitk.GetArrayFromImage(image).reshape(size[2::-1]),
        image.GetSpacing()[:3],
        image.GetOrigin()[:3],
        tuple(axes.ravel().tolist()),
    )


def check_three_dimensions(path: Path, size: tuple[int, ...], what: str) -> None:
    """Refuse sizes (x first) of other than three dimensions; further ones may have size 1.

    Raises:
        VolumeError: So they are.
    """
    require(
        len(size) >= 3 and all(extent == 1 for extent in size[3:]),
        path,
        error=VolumeError,
        found=f"a {len(size)}-D {what} of {' x '.join(map(str, size))} voxels",
        allowed="one 3-D volume (further dimensions of size 1 are fine)",
        fix="Save one volume of it as a file of its own.",
    )


def check_orthonormal(path: object, direction: np.ndarray) -> None:
    """Refuse axes that are sheared or not of unit length.

    Args:
        path: The file, for the message.
        direction: [3, 3], one unit vector per column.

    Raises:
        GeometryError: The columns are not orthonormal to 1e-3.
    """
    require(
        np.allclose(direction.T @ direction, np.eye(3), rtol=0, atol=1e-3),
        path,
        error=GeometryError,
        found=lambda: f"sheared or non-orthonormal axes {np.round(direction, 4).tolist()}",
        allowed="three axes at right angles",
        fix="Resample the volume to an orthogonal grid.",
    )


def write_image(path: Path, image: sitk.Image) -> None:
    """Write a compressed file.

    Raises:
        RuntimeError: SimpleITK cannot.
    """
    with quiet():
        sitk.WriteImage(image, str(path), useCompression=True)
