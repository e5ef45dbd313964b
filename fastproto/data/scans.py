# SPDX-License-Identifier: Apache-2.0
"""Which scans a folder holds, what is left out and why, and what their results are called."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from fastproto.data.formats.dicom_header import (
    Other,
    dicom_files,
    listing,
    read_header,
    read_headers,
)
from fastproto.data.formats.dicom_seg_writer import require_highdicom
from fastproto.data.formats.table import CONVERT
from fastproto.data.volume import (
    LABELS_WRITABLE,
    READABLE,
    label_suffix,
    volume_suffix,
    without_suffix,
)
from fastproto.errors import VolumeError, first_of, require, warn

_LABEL_MAP = re.compile(r"(.*[\W_])?(masks?|labels?(tr|ts)?|segs?|segmentations?)", re.IGNORECASE)
_DATA_SETS = (("images", "labels"), ("imagesTr", "labelsTr"))


def find_scans(
    path: Path, *, series: str | None = None, output: Path | None = None, needed: bool = True
) -> list[Path]:
    """The scans that ``path`` stands for: itself, or what the folder holds.

    Image files count in the folder and in its subfolders (``PATIENT/scan.nii.gz``), folders of
    DICOM slices at any depth. A folder with slices is one scan, and image files beside the slices
    are no scans; multi-frame DICOM files, each a series of its own, are scans themselves. Beside
    scans, what is called as label maps are ("mask", "ct_seg", "labels/") is none. What looks like
    a scan and does not count is named in a warning.

    Args:
        path: An image file, a DICOM folder or a folder of these.
        series: SeriesInstanceUID; only DICOM folders that hold it count.
        output: Where results go, which are no scans.
        needed: Refuse a folder without any scan.

    Raises:
        VolumeError: There is no scan, or ``path`` is a data set that holds label maps too.
    """
    if not path.is_dir():
        return [path]
    for images, labels in _DATA_SETS:
        require(
            not ((path / images).is_dir() and (path / labels).is_dir()),
            path,
            found=f"a data set, with label maps in {labels}",
            allowed="a folder of scans",
            fix=f"Name {path / images}.",
            error=VolumeError,
        )
    search = _Search(series, output)
    try:
        scans = search.folder(path)
    except OSError as error:
        raise VolumeError(
            path, found=f"what cannot be read ({error})", allowed="files and folders you may read"
        ) from error
    require(
        scans or not needed,
        path,
        found=lambda: "; ".join(
            ["no image file and no DICOM series", *filter(None, [listing(search.left, path)])]
        ),
        allowed=f"files ending in {', '.join(READABLE)}, or folders of DICOM slices",
        error=VolumeError,
    )
    if left := listing([item for item in search.left if item.image], path):
        warn(path, f"left out {left}.")
    return scans


class _Search:
    """A walk through folders that notes what it leaves out."""

    def __init__(self, series: str | None, output: Path | None):
        self.series = series
        self.left: list[Other] = []
        self._results = _results(output) if output else set()
        self._seen: set[str] = set()  # links may lead back

    def folder(self, folder: Path, depth: int = 0) -> list[Path]:
        """The scans of a folder by name, those at its own level first.

        Raises:
            OSError: It cannot be read.
        """
        real = os.path.realpath(folder)
        if real in self._seen:
            self._leave(folder, "folders that were searched under another name")
            return []
        self._seen.add(real)
        entries = [
            item for item in sorted(folder.iterdir()) if os.path.realpath(item) not in self._results
        ]
        hidden = [item for item in entries if item.name.startswith(".")]
        entries = [item for item in entries if not item.name.startswith(".")]
        files = [item for item in entries if item.is_file()]
        images = [item for item in files if volume_suffix(item)]
        scans = self._dicom(folder, [item for item in files if not volume_suffix(item)])
        slices = scans == [folder]
        for item in hidden:
            if volume_suffix(item) and not item.name.startswith(("._", ".partial-")):
                self._leave(item, "files whose names begin with a dot")
        for item in entries:
            broken = item.is_symlink() and not item.exists()
            if broken and (volume_suffix(item) or not slices):  # or else `read_volume` names it
                self._leave(item, "broken links")
            elif item.name.lower().endswith(tuple(CONVERT)):
                self._leave(item, "files of a format that is not read")
        if why := self._no_scans(slices, depth):
            for item in images:
                self._leave(item, why)
            images = []
        maps = [
            item
            for item in entries
            if _LABEL_MAP.fullmatch(without_suffix(item.name)) or volume_suffix(item) == ".seg.nrrd"
        ]
        scans += [item for item in images if item not in maps]
        scans += self._below([item for item in entries if item not in maps], depth)
        labels = [item for item in images if item in maps] + self._below(maps, depth)
        if not scans:
            return labels
        for item in labels:
            self._leave(item, "label maps, by their names")
        return scans

    def _no_scans(self, slices: bool, depth: int) -> str | None:
        """Why the image files of a folder do not count; None where they do."""
        if slices:
            return "image files beside the slices of a DICOM series"
        if self.series is not None:
            return "image files, which have no series"
        return "image files more than one folder down" if depth > 1 else None

    def _below(self, entries: Sequence[Path], depth: int) -> list[Path]:
        """The scans in the folders among ``entries``."""
        scans = []
        for item in filter(Path.is_dir, entries):
            try:
                scans += self.folder(item, depth + 1)
            except OSError as error:
                self._leave(item, f"what cannot be read ({error.strerror})")
        return scans

    def _leave(self, path: Path, why: str) -> None:
        self.left.append(Other(path, None, why))

    def _dicom(self, folder: Path, files: Sequence[Path]) -> list[Path]:
        """The folder, if it holds slices; or its multi-frame files, where each is a series."""
        if self.series is not None:
            slices, others = read_headers(files)
            known = {item.series for item in slices} | {item.series for item in others}
            return [folder] if self.series in known else []
        frames: dict[Path, str] = {}
        others = []
        found, closed = dicom_files(files)
        self.left += closed
        for path in found:
            header = read_header(path)
            if isinstance(header, Other):
                others.append(header)
            elif header[0].frames == 1:
                return [folder]  # `read_volume` says whether it is a series, and what is wrong
            else:
                frames[path] = header[0].series
        if any(item.damaged for item in others):
            return [folder]
        several = len(frames) > 1 and len(set(frames.values())) == len(frames)
        if frames and not several:
            return [folder]
        self.left += others
        return [*frames]


def _results(output: Path) -> set[str]:
    """Where the results of `segment -o OUTPUT` lie: there, or beside a file also what it adds."""
    added = ("-uncertainty.nii.gz", "-probabilities") if label_suffix(output) else ()
    beside = [output.parent / f"{stem(output)}{ending}" for ending in added]
    return {os.path.realpath(path) for path in (output, *beside)}


def scan_names(source: Path, scans: Sequence[Path]) -> list[str]:
    """A name for each scan of ``find_scans(source)``, for its result.

    A scan in a subfolder is called after the subfolder, or where that holds several scans,
    ``PATIENT-SCAN``. nnU-Net's mark of a single channel is left out where all scans have it.
    """
    names = []
    below = [
        scan.relative_to(source).parts if scan.is_relative_to(source) else () for scan in scans
    ]
    counts = Counter(parts[0] for parts in below if parts)
    taken = {stem(scan) for scan, parts in zip(scans, below, strict=True) if len(parts) < 2}
    for scan, parts in zip(scans, below, strict=True):
        alone = len(parts) > 1 and counts[parts[0]] == 1 and parts[0] not in taken
        joined = "-".join([*parts[:-1], stem(scan)])
        names.append(parts[0] if alone else joined)
    if all(name.endswith("_0000") for name in names):
        names = [name.removesuffix("_0000") for name in names]
    return names


def plan_outputs(
    source: Path, scans: Sequence[Path], output: Path, format_: str | None = None
) -> list[tuple[Path, Path]]:
    """Pair every scan found at ``source`` with the label map to write for it.

    Where there is one scan, ``output`` may be a file.

    Args:
        source: Where the scans were found.
        scans: They.
        output: A folder, or a file.
        format_: How the names in a folder end, without the dot; None is "nii.gz". A file has its
            ending already.

    Raises:
        ArgumentError: Several scans for one file, two scans of one name, a result that would
            overwrite a scan, a format that is not written, or not of these scans or here.
    """
    suffix = label_suffix(output)
    if volume_suffix(output) or (suffix and not output.is_dir()):
        require(suffix, "--output", found=str(output), allowed=", ".join(LABELS_WRITABLE))
        require(
            format_ is None or suffix == f".{format_}",
            "--format",
            found=f"{format_} for the file {output}",
            allowed="it for a folder of results; the name of a file says its format",
        )
        listed = first_of(
            scan.name if scan == source else scan.relative_to(source) for scan in scans
        )
        found = f"the file {output} for the {len(scans)} scans of a folder ({listed})"
        require(len(scans) == 1, "--output", found=found, allowed="a folder")
        jobs = [(scans[0], output)]
    else:
        like_a_file = output.name.lower().endswith((*CONVERT, ".dcm", ".gz", ".png", ".task"))
        allowed = f"a folder, or a file ending in {', '.join(LABELS_WRITABLE)}"
        usable = output.is_dir() or not like_a_file
        require(usable, "--output", found=str(output), allowed=allowed)
        names = scan_names(source, scans)
        suffix = f".{format_ or 'nii.gz'}"
        jobs = [(scan, output / f"{name}{suffix}") for scan, name in zip(scans, names, strict=True)]
    if suffix == ".dcm":
        require_highdicom()
        images = [scan for scan in scans if volume_suffix(scan) and scan.is_file()]
        require(
            len(images) < len(scans),
            images[0] if images else source,
            found="a scan that is no DICOM series",
            allowed="one, for a DICOM segmentation (.dcm), which refers to it",
            fix="Write the result as .seg.nrrd or .nii.gz.",
        )
    inputs = {os.path.realpath(scan) for scan in scans}
    taken: set[Path] = set()
    for scan, target in jobs:
        require(
            os.path.realpath(target) not in inputs and target not in taken,
            "--output",
            found=f"that the result of {scan} would overwrite another file of this command",
            allowed="a name of its own for each result",
            fix="Choose another output folder, rename one of the scans, or move results of an "
            "earlier run away from the scans.",
        )
        taken.add(target)
    return jobs


def stem(path: Path) -> str:
    """A file's name without its image suffix, of a link its own; a folder's whole name."""
    if path.name in ("", ".."):
        return path.resolve().name
    dicom = path.suffix.lower() == ".dcm" and not path.is_dir()
    return path.stem if dicom else without_suffix(path.name)
