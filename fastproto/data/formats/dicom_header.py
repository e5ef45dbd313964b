# SPDX-License-Identifier: Apache-2.0
"""What the headers of DICOM files say: which hold slices of a scan, and where each slice lies.

pydicom reads them and nothing here looks at pixels. A slice is a single-frame file, or one frame of
an enhanced multi-frame file, whose functional groups say where it lies (PS3.3 C.7.6.16).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fastproto.data.formats.checks import require_volume
from fastproto.errors import FastprotoError, VolumeError, first_of

if TYPE_CHECKING:
    from pydicom import Dataset

EXPORT_AGAIN = "Export the series again, uncompressed, or remove the file if it is no slice of it."
INDEX = "DICOMDIR"  # what PS3.10 calls the index of a disc
SEGMENTATIONS = {"1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7"}
_FOREIGN = "files that are not DICOM"
_TAGS = [
    *("SOPClassUID", "Modality", "SeriesInstanceUID", "ImagePositionPatient", "SliceThickness"),
    *("ImageOrientationPatient", "PixelSpacing", "Rows", "Columns", "NumberOfFrames"),
    *("SamplesPerPixel", "PhotometricInterpretation", "BitsStored", "PixelRepresentation"),
    *("RescaleSlope", "RescaleIntercept", "RescaleType", "ModalityLUTSequence"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
]


class Slice(NamedTuple):
    """What a header says of one slice; NaN stands for numbers that are absent or damaged.

    Attributes:
        frame: Its number in the file, from 0.
        frames: How many the file has.
        size: Rows and columns.
        axes: [2, 3], where columns and rows grow (ImageOrientationPatient).
        pixel_spacing: (x, y) in mm.
        slope, intercept: A value is slope * stored + intercept.
        rescaled: Whether the file says so; without, they are 1 and 0.
        limits: Least and largest number that its bits can store.
        unit: RescaleType, "" where it is absent.
    """

    path: Path
    frame: int
    frames: int
    series: str
    modality: str
    size: tuple[int, int]
    position: np.ndarray
    axes: np.ndarray
    pixel_spacing: np.ndarray
    thickness: float
    slope: float
    intercept: float
    rescaled: bool
    limits: tuple[int, int]
    unit: str

    @property
    def name(self) -> str:
        """What messages call it."""
        many = f" frame {self.frame + 1}" if self.frames > 1 else ""
        return f"{self.path.name}{many}"

    @property
    def placed(self) -> bool:
        """Whether it says where it lies."""
        return bool(np.isfinite(self.position).all() and np.isfinite(self.axes).all())


class Other(NamedTuple):
    """A DICOM file that holds no usable slice.

    Attributes:
        series: Its SeriesInstanceUID; None where that cannot be known.
        why: What it is.
        damaged: Whether it may be a slice of ``series``.
        image: Whether it is or may be an image at all.
    """

    path: Path
    series: str | None
    why: str
    damaged: bool = False
    image: bool = True


@contextlib.contextmanager
def pydicom_reading(path: Path) -> Iterator[None]:
    """Turn whatever pydicom raises of a damaged file into one message; its warnings are ours.

    Raises:
        VolumeError: Of the file at ``path``.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except (FastprotoError, OSError, MemoryError):
            raise
        # A damaged element shows as almost any exception, from struct.error to AttributeError.
        except Exception as error:
            cause = " ".join(str(error).split()) or type(error).__name__
            raise VolumeError(
                path,
                found=f"a damaged or truncated DICOM file ({cause})",
                allowed="a complete DICOM file",
                fix=EXPORT_AGAIN,
            ) from error


def is_dicom(path: Path) -> bool:
    """Whether a file begins as DICOM: with the preamble, or in old files with its first element."""
    with open(path, "rb") as file:
        head = file.read(132)
    old = (b"\x08\x00\x00\x00", b"\x08\x00\x05\x00", b"\x08\x00\x08\x00")
    return path.name != INDEX and (head[128:] == b"DICM" or head[:4] in old)


def dicom_files(paths: Iterable[Path]) -> tuple[list[Path], list[Other]]:
    """Which of ``paths`` are DICOM files, and which cannot be opened."""
    found, closed = [], []
    for path in paths:
        try:
            if is_dicom(path):
                found.append(path)
        except OSError as error:
            closed.append(Other(path, None, f"no access ({error.strerror})"))
    return found, closed


def sop_classes(dataset: Dataset) -> set[str]:
    """What kind of object it is by its UID, in the file's meta information and in its own."""
    meta = getattr(dataset, "file_meta", {})
    both = meta.get("MediaStorageSOPClassUID"), dataset.get("SOPClassUID")
    return {str(uid) for uid in both if uid}


def read_headers(paths: Iterable[Path]) -> tuple[list[Slice], list[Other]]:
    """The slices in the DICOM files among ``paths``, and what else of DICOM is there.

    Files that are not DICOM are passed over, unless they are named as the slices are and may have
    been one: those count as damaged.
    """
    slices: list[Slice] = []
    others: list[Other] = []
    strange = []
    for path in paths:
        try:
            if path.name.startswith("."):
                if not path.name.startswith("._") and path.is_file() and is_dicom(path):
                    others.append(Other(path, None, "files whose names begin with a dot"))
            elif path.is_symlink() and not path.exists():
                strange.append((path, "broken links"))
            elif path.is_file() and is_dicom(path):
                found = read_header(path)
                if isinstance(found, Other):
                    others.append(found)
                else:
                    slices += found
            elif path.is_file() and path.name != INDEX:
                strange.append((path, _content(path)))
        except OSError as error:
            strange.append((path, f"no access ({error.strerror})"))
    endings = {item.path.suffix for item in slices}
    for path, why in strange:
        alike = path.suffix in endings
        if alike and why == "text":
            alike = path.suffix.lower() == ".dcm"
        if alike or why not in (_FOREIGN, "text"):
            others.append(Other(path, None, why, damaged=alike))
    return slices, others


def _content(path: Path) -> str:
    with open(path, "rb") as file:
        head = file.read(1024)
    return (_FOREIGN if b"\0" in head else "text") if head else "empty files"


def listing(others: Iterable[Other], root: Path) -> str:
    """How many there are of each kind, and the names of the first, from ``root`` on."""
    kinds: dict[str, list[str]] = {}
    for item in others:
        kinds.setdefault(item.why, []).append(str(item.path.relative_to(root)))
    return "; ".join(f"{why} ({len(names)}: {first_of(names, 4)})" for why, names in kinds.items())


def read_header(path: Path) -> list[Slice] | Other:
    """The slices of a DICOM file, one for each frame, or why it has none."""
    import pydicom

    series = None
    try:
        with pydicom_reading(path):
            tags = [*_TAGS]
            dataset = pydicom.dcmread(path, stop_before_pixels=True, force=True, specific_tags=tags)
            series = _text(dataset, "SeriesInstanceUID") or None
            if kind := _without_image(dataset):
                return Other(path, series, f"objects without images ({kind})", image=False)
            if why := _no_slice(dataset):
                return Other(path, series, why)
            return _slices(path, dataset)
    except (VolumeError, OSError) as error:
        found = error.found if isinstance(error, VolumeError) else f"no access ({error.strerror})"
        return Other(path, series, found, damaged=True)


def _without_image(dataset: Dataset) -> str | None:
    """What it is, of an object that is no image by its kind: a report, structures, a dose."""
    from pydicom.uid import UID

    for uid in sop_classes(dataset):
        # The registry calls what has pixels "... Image Storage"; an unknown UID is its own name.
        if UID(uid).name != uid and "Image" not in UID(uid).name:
            return UID(uid).name
    return None


def _no_slice(dataset: Dataset) -> str | None:
    """Why an image is no slice of a scan; None where it should be one."""
    from pydicom.uid import UID

    samples = dataset.get("SamplesPerPixel")
    colours = _text(dataset, "PhotometricInterpretation").startswith(("RGB", "YBR", "PALETTE"))
    if samples in (3, 4) or colours:
        return "colour images"
    frames = int(dataset.get("NumberOfFrames") or 1)
    # Such a file says it, unless it is truncated.
    cut = any("Enhanced" in UID(uid).name for uid in sop_classes(dataset))
    placed = "PerFrameFunctionalGroupsSequence" in dataset or "ImagePositionPatient" in dataset
    if frames > 1 and not placed and not cut:
        return "multi-frame files that do not say where their frames lie"
    return None


def _slices(path: Path, dataset: Dataset) -> list[Slice]:
    rows, columns = (int(dataset.get(name) or 0) for name in ("Rows", "Columns"))
    require_volume(
        rows > 0
        and columns > 0
        and 0 < int(dataset.get("BitsStored") or 0) <= 32
        and dataset.get("SamplesPerPixel") in (1, None),
        path,
        found="a damaged or truncated DICOM file (no size of a grey image, or no bits)",
        allowed="a complete DICOM file",
        fix=EXPORT_AGAIN,
    )
    frames = int(dataset.get("NumberOfFrames") or 1)
    groups = list(
        dataset.get("PerFrameFunctionalGroupsSequence") or ([None] if frames == 1 else [])
    )
    require_volume(
        len(groups) == frames,
        path,
        found=f"a damaged DICOM file ({len(groups)} positions for {frames} frames)",
        allowed="one position for each frame",
        fix=EXPORT_AGAIN,
    )
    signed, bits = int(dataset.get("PixelRepresentation") or 0), int(dataset.BitsStored)
    slices = []
    for frame, group in enumerate(groups):
        where = [group] if group is not None else []
        where += list(dataset.get("SharedFunctionalGroupsSequence") or [])[:1]
        rescaling = functional_group(where, dataset, "PixelValueTransformationSequence")
        measures = functional_group(where, dataset, "PixelMeasuresSequence")
        position = functional_group(where, dataset, "PlanePositionSequence")
        axes = functional_group(where, dataset, "PlaneOrientationSequence")
        require_volume(
            not rescaling.get("ModalityLUTSequence"),
            path,
            found="a Modality LUT, a table that gives the pixels' values",
            allowed="RescaleSlope and RescaleIntercept",
            fix="Convert the series to NIfTI first.",
        )
        names = ("RescaleSlope", "RescaleIntercept")
        rescaled = any(rescaling.get(name) is not None for name in names)
        slices.append(
            Slice(
                path=path,
                frame=frame,
                frames=frames,
                series=_text(dataset, "SeriesInstanceUID"),
                modality=_text(dataset, "Modality"),
                size=(rows, columns),
                position=numbers(position, "ImagePositionPatient", 3),
                axes=numbers(axes, "ImageOrientationPatient", 6).reshape(2, 3),
                # DICOM gives the distance of rows (y) first.
                pixel_spacing=numbers(measures, "PixelSpacing", 2)[::-1],
                thickness=float(numbers(measures, "SliceThickness", 1)[0]),
                slope=float(numbers(rescaling, names[0], 1)[0]) if rescaled else 1.0,
                intercept=float(numbers(rescaling, names[1], 1)[0]) if rescaled else 0.0,
                rescaled=rescaled,
                limits=(-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1),
                unit=_text(rescaling, "RescaleType"),
            )
        )
    return slices


def functional_group(where: Iterable[Dataset], dataset: Dataset, name: str) -> Dataset:
    """The first of the groups ``where`` that has the sequence ``name``; else the dataset itself."""
    for group in where:
        if items := group.get(name):
            return items[0]
    return dataset


def numbers(dataset: Dataset, keyword: str, count: int) -> np.ndarray:
    """``count`` numbers of an element; NaN where it is absent, damaged or has another length."""
    try:
        found = np.atleast_1d(np.array(dataset.get(keyword), float))
    except (TypeError, ValueError):
        found = np.empty(0)
    return found if found.shape == (count,) else np.full(count, np.nan)


def _text(dataset: Dataset, keyword: str) -> str:
    return str(dataset.get(keyword) or "").strip("\0 ")
