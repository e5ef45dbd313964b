# SPDX-License-Identifier: Apache-2.0
"""Datasets on disk: ``images/ labels/ dataset.json``, and nnU-Net's ``imagesTr/labelsTr``."""

from __future__ import annotations

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

from fastproto.data.formats import nrrd
from fastproto.data.formats.dicom_seg import find_segmentation, segment_names
from fastproto.data.formats.reading import reading
from fastproto.data.intensity import guess_modality
from fastproto.data.label_table import LabelTable, find_labels, label_table, read_json
from fastproto.data.scans import find_scans, scan_names
from fastproto.data.volume import READABLE, read_volume, volume_suffix, without_suffix
from fastproto.errors import DatasetError, require, warn

Modality: TypeAlias = Literal["ct", "mr"]

_MR_CHANNELS = ("mr", "t1", "t2", "flair", "pd", "dwi", "adc", "swi")
_LABEL_FOLDERS = ("labels", "labelsTr", "labelsTs")
_DESCRIPTION = "a dataset.json with modality, labels and cases"

_require = partial(require, error=DatasetError)


@dataclass(frozen=True)
class Case:
    """One scan and, where somebody annotated it, its label map."""

    id: str
    image: Path
    label: Path | None


@dataclass(frozen=True)
class Dataset:
    """Cases of one modality that share their labels.

    Attributes:
        name: For people.
        modality: "ct" or "mr".
        labels: Name of every label above 0.
        cases: In the order of ``dataset.json``, or by name where it lists none.
        root: The folder.
        ignore: The label value whose voxels count nowhere; None where there is none.
    """

    name: str
    modality: Modality
    labels: dict[int, str]
    cases: list[Case]
    root: Path
    ignore: int | None = None

    @property
    def values(self) -> dict[int, str]:
        """Every value above 0 that a label map may hold: the labels, and what is ignored."""
        return self.labels if self.ignore is None else {**self.labels, self.ignore: "ignore"}

    def select(self, ids: Iterable[str]) -> list[Case]:
        """The cases of these ids, in their order.

        Raises:
            DatasetError: An id that the dataset does not have.
        """
        known = {case.id: case for case in self.cases}
        ids = list(ids)
        unknown = [id_ for id_ in ids if id_ not in known]
        found = "no case " + ", ".join(id_ or "''" for id_ in unknown)
        _require(not unknown, self.root, found=found, allowed=", ".join(known))
        return [known[id_] for id_ in ids]

    def label_ids(self, labels: Iterable[str | int]) -> list[int]:
        """The numbers of labels given by name, in any case, or number ("6"), in their order.

        Raises:
            LabelError: A label that the dataset does not have.
        """
        return find_labels(labels, self.labels, self.root)


def open_dataset(path: str | os.PathLike[str], *, modality: Modality | None = None) -> Dataset:
    """Read a dataset's description and find its files.

    Two layouts are known with a ``dataset.json``:

    - ``images/CASE.nii.gz`` (any readable format, or a DICOM folder ``images/CASE``),
      ``labels/CASE.nii.gz``; fields ``name``, ``modality`` ("CT" or "MR"),
      ``labels`` {"1": "liver"}, ``cases`` ["CASE"] (without it, every file in ``images``).
    - nnU-Net: ``imagesTr/CASE_0000.nii.gz``, ``labelsTr/CASE.nii.gz``; fields ``channel_names``
      {"0": "CT"} and ``labels`` {"liver": 1}; or the older ``modality``, ``labels`` {"1": "liver"}
      and ``training`` [{"image": ..., "label": ...}]; or, for files anywhere, ``dataset``
      {"CASE": {"images": [...], "label": ...}}. One channel only.

    Labels may be nnU-Net's regions and "ignore", see `fastproto.data.label_table.label_table`.

    A folder without ``dataset.json``, ``images`` and ``imagesTr`` is a plain folder of scans
    without labels, all CT or all MR by the first one's values.

    Cases need no label map, but a label map needs its case; ``labels`` may name none. What is
    slightly wrong but clear is read with a `FastprotoWarning`.

    Args:
        path: The folder.
        modality: "ct" or "mr", where the description does not say.

    Raises:
        DatasetError: The file and the field at fault.
    """
    root = Path(path)
    file = root / "dataset.json"
    _require(root.is_dir(), root, found="no such folder", allowed="a dataset folder")
    allowed = 'None, "ct" or "mr"'
    require(modality in (None, "ct", "mr"), "modality", found=repr(modality), allowed=allowed)
    nnunet, plain = (root / "imagesTr").is_dir(), (root / "images").is_dir()
    if not (file.exists() or nnunet or plain) and (scans := find_scans(root, needed=False)):
        names = zip(scan_names(root, scans), scans, strict=True)
        cases = [Case(name, scan, None) for name, scan in names]
        _check_unique(root, "the folder", cases)
        modality = modality or guess_modality(read_volume(cases[0].image))
        return Dataset(root.resolve().name, modality, {}, cases, root)
    fields = read_json(file, _DESCRIPTION, DatasetError)
    nnunet = nnunet or (not plain and not {"dataset", "training"}.isdisjoint(fields))
    modality = _modality(file, fields, nnunet, modality)
    cases = (_nnunet_cases if nnunet else _plain_cases)(root, file, fields)
    _require(cases, root, found="no case", allowed="at least one image")
    if "dataset" not in fields:  # which may choose some of a folder's files
        _check_stray_labels(root / ("labelsTr" if nnunet else "labels"), cases)
    name = str(fields.get("name", root.resolve().name))
    table = _labels(file, fields)
    return Dataset(name, modality, table.names, cases, root, table.ignore)


def open_datasets(
    paths: Iterable[str | os.PathLike[str]], modality: Modality | None = None
) -> list[Dataset]:
    """Open several, with ``modality`` for those that do not say.

    Raises:
        ArgumentError: A ``modality`` that none of them has: each says another one.
        DatasetError: As `open_dataset`.
    """
    datasets = [open_dataset(path, modality=modality) for path in paths]
    known = sorted({dataset.modality for dataset in datasets})
    fix = f"Correct the description in {datasets[0].root}, or leave the option out."
    allowed = f"{' or '.join(known)}, as the data says"
    require(modality in (None, *known), "modality", found=str(modality), allowed=allowed, fix=fix)
    return datasets


def labels_of(label: Path) -> LabelTable | None:
    """The names in a segmentation of DICOM or 3D Slicer, or in a ``dataset.json``; else None.

    That lies beside the label map, or beside its folder, which is ``labels``, ``labelsTr`` or
    ``labelsTs``, or which it lists.

    Raises:
        VolumeError: The label map cannot be read.
        DatasetError: The ``dataset.json`` cannot be read.
    """
    with reading(label):
        if segmentation := find_segmentation(label):
            return LabelTable(segment_names(segmentation))
        slicer = label.name.lower().endswith(".seg.nrrd")
        if slicer and (names := nrrd.segment_names(label)):
            return LabelTable(names)
    named = [*label.parents[:2]]
    label = label.absolute()
    for root in [*named, *label.parents[len(named) : 2]]:
        file = root / "dataset.json"
        near = label.parent == root.absolute() or label.parent.name in _LABEL_FOLDERS
        try:
            asked = file.is_file() and (near or label.name in file.read_text("utf-8", "replace"))
        except OSError as error:
            found = f"that it cannot be read ({error.strerror})"
            raise DatasetError(file, found=found, allowed=_DESCRIPTION) from error
        if asked:
            fields = read_json(file, _DESCRIPTION, DatasetError)
            if near or label in _listed_labels(file, fields):
                table = _labels(file, fields)
                return table if table.names or table.ignore is not None else None
    return None


def _require_field(
    usable: object, file: Path, field: str, value: object, allowed: str, fix: str | None = None
) -> None:
    found = f"no field {field!r}" if value is None else f"{field} = {json.dumps(value)}"
    _require(usable, file, found=found, allowed=allowed, fix=fix)


def _modality(
    file: Path, fields: Mapping[str, Any], nnunet: bool, given: Modality | None
) -> Modality:
    """What the description says; ``given`` where it does not."""
    field = "modality" if "modality" in fields or not nnunet else "channel_names"
    field = "channel_names" if nnunet and "channel_names" in fields else field
    value, allowed = fields.get(field), '"CT" or "MR"'
    names = [value] if isinstance(value, str) else []
    if nnunet:
        names = list(value.values()) if isinstance(value, dict) else []
        allowed = 'one channel, "CT" or an MR sequence such as "T1", e.g. {"0": "CT"}'
        one = len(names) == 1 or (value is None and given)
        _require_field(one, file, field, value, allowed)
    text = str(names[0]).lower() if names else ""
    said: Modality | None = "mr" if text.startswith(_MR_CHANNELS) else None
    said = "ct" if text == "ct" else said
    fix = "Say which it is: --modality ct, or --modality mr (modality= from Python)."
    _require_field(said or given, file, field, value, allowed, fix)
    return said or given or "ct"


def _labels(file: Path, fields: Mapping[str, Any]) -> LabelTable:
    labels = {} if fields.get("labels") is None else fields["labels"]
    allowed = 'names and values, e.g. {"0": "background", "1": "liver"}'
    _require_field(isinstance(labels, dict), file, "labels", labels, allowed)
    return label_table(labels.items(), f"{file}: labels", DatasetError)


class _Folder:
    """The volumes of a folder by the name of their case; none where there is no such folder."""

    def __init__(self, path: Path):
        self.path = path
        self.volumes: dict[str, list[Path]] = defaultdict(list)
        for volume in _volumes(path) if path.is_dir() else []:
            self.volumes[_case_id(volume)].append(volume)

    def find(self, id_: str) -> Path | None:
        """The volume of a case; None where there is none.

        Raises:
            DatasetError: Several files, or a name that leads out of the folder.
        """
        plain = not re.search(r"[/\\]|^\.\.?$", id_)
        _require(plain, self.path, found=f"case name {id_!r}", allowed="a plain file name")
        found = self.volumes.get(id_, [])
        several = f"several files of case {id_!r} ({', '.join(path.name for path in found)})"
        _require(len(found) <= 1, self.path, found=several, allowed="one file per case")
        return found[0] if found else None


def _plain_cases(root: Path, file: Path, fields: Mapping[str, Any]) -> list[Case]:
    images, labels = _Folder(root / "images"), _Folder(root / "labels")
    ids = fields.get("cases")
    if ids is None:
        ids = [_case_id(path) for path in _volumes(images.path)]
    named = isinstance(ids, list) and all(isinstance(id_, str) and id_ for id_ in ids)
    _require_field(named, file, "cases", ids, "a list of case names")
    cases = []
    for id_ in ids:
        image = images.find(id_)
        if image is None:
            raise DatasetError(
                file,
                found=f"case {id_!r} without an image",
                allowed=f"a file or DICOM folder {root / 'images' / id_}[{'|'.join(READABLE)}]",
                fix="Add the image, or take the case out of the field 'cases'.",
            )
        cases.append(Case(id_, image, labels.find(id_)))
    _check_unique(file, "cases", cases)
    return cases


def _nnunet_cases(root: Path, file: Path, fields: Mapping[str, Any]) -> list[Case]:
    field = next((name for name in ("dataset", "training") if name in fields), None)
    if field is None:
        cases, labels = [], _Folder(root / "labelsTr")
        for image in _volumes(root / "imagesTr"):
            id_, channel = _case_id(image)[:-5], _case_id(image)[-5:]
            allowed = "CASE_0000 with a single channel"
            found = f"the file name {image.name}"
            _require(channel == "_0000" and id_, image, found=found, allowed=allowed)
            cases.append(Case(id_, image, labels.find(id_)))
    else:
        cases = _listed_cases(file, field, fields[field])
    _check_unique(file, field or "imagesTr", cases)
    expected = fields.get("numTraining", len(cases))
    if expected != len(cases):
        warn(file, f"numTraining = {expected}, but there are {len(cases)} images; all are used.")
    return cases


def _listed_cases(file: Path, field: str, listed: Any) -> list[Case]:
    """The cases of nnU-Net's field ``training``, a list, or ``dataset``, by case."""
    mended: list[str] = []
    folder = cache(_Folder)

    def found(text: str, *endings: str) -> Path:
        path, read = file.parent / text, file.parent / text.replace("\\", "/")
        if path.exists():
            return path
        if not read.exists():
            in_folder = (folder(read.parent).find(_case_id(read) + end) for end in endings)
            read = next((path for path in in_folder if path is not None), read)
        _require_field(read.exists(), file, field, text, "an existing file")
        id_ = _case_id(path)
        if read.name != f"{id_}_0000{path.name[len(id_) :]}":  # which is nnU-Net's older way
            mended.append(f"{text!r} as {read}")
        return read

    cases = []
    for id_, image, label in _entries(file, field, listed):
        path = found(image, "", "_0000")
        id_ = id_ or _case_id(path).removesuffix("_0000")
        cases.append(Case(id_, path, found(label, "") if label else None))
    if mended:
        paths = f"paths that lead to no file as written ({len(mended)})"
        warn(file, f"{paths} are read otherwise, such as {mended[0]}.")
    return cases


def _entries(file: Path, field: str, listed: Any) -> list[tuple[str | None, str, str | None]]:
    """Case (None where the file's name says it), image and label as ``dataset.json`` lists them."""
    if field == "dataset":
        allowed = '{"CASE": {"images": [one file], "label": a file}, ...}; one channel only'
        _require_field(isinstance(listed, dict), file, field, listed, allowed)
    else:
        allowed = 'a list of {"image": a file, "label": a file}'
        _require_field(isinstance(listed, list), file, field, listed, allowed)
        listed = [(None, entry) for entry in listed]
    entries = []
    for id_, entry in listed.items() if isinstance(listed, dict) else listed:
        files = entry if isinstance(entry, dict) else {}
        images = [files["image"]] if id_ is None and "image" in files else files.get("images")
        image = images[0] if isinstance(images, list) and len(images) == 1 else None
        label = files.get("label") or None
        usable = isinstance(image, str) and isinstance(label, str | None)
        _require_field(usable, file, field, entry if id_ is None else {id_: entry}, allowed)
        entries.append((id_, str(image), label))
    return entries


def _listed_labels(file: Path, fields: Mapping[str, Any]) -> list[Path]:
    """The label maps that a ``dataset.json`` lists, where it lists any."""
    field = next((name for name in ("dataset", "training") if name in fields), None)
    entries = _entries(file, field, fields[field]) if field else []
    paths = (label.replace("\\", "/") for *_, label in entries if label)
    return [Path(os.path.normpath(file.parent / path)) for path in paths]


def _check_unique(file: Path, field: str, cases: list[Case]) -> None:
    counts = Counter(case.id for case in cases)
    twice = ", ".join(repr(id_) for id_, count in counts.items() if count > 1)
    _require(not twice, file, found=f"{field} with {twice} twice", allowed="each case once")


def _check_stray_labels(folder: Path, cases: list[Case]) -> None:
    """A misspelt file name would silently make a case unlabelled."""
    used = {case.label.resolve() for case in cases if case.label is not None}
    known = {case.id for case in cases}
    for path in _volumes(folder) if folder.is_dir() else []:
        _require(
            path.resolve() in used or _case_id(path) in known,
            path,
            found="a label map without a case",
            allowed="labels named like their case",
            fix="Rename it, or add the case to dataset.json.",
        )


def _volumes(folder: Path) -> list[Path]:
    """Volume files and DICOM folders in a folder, by name."""
    _require(folder.is_dir(), folder, found="no such folder", allowed="a folder with volumes")
    paths = (path for path in folder.iterdir() if path.name[0] != ".")
    return sorted(path for path in paths if path.is_dir() or volume_suffix(path))


def _case_id(path: Path) -> str:
    return path.name if path.is_dir() else without_suffix(path.name)
