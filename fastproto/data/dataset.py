# SPDX-License-Identifier: Apache-2.0
"""Datasets on disk: ``images/ labels/ dataset.json``, and nnU-Net's ``imagesTr/labelsTr``."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from fastproto.data.intensity import guess_modality
from fastproto.data.scans import find_scans, scan_names
from fastproto.data.volume import READABLE, read_volume, volume_suffix, without_suffix
from fastproto.errors import DatasetError, LabelError, require

_MR_CHANNELS = ("mr", "t1", "t2", "flair", "pd", "dwi", "adc", "swi")

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
    """

    name: str
    modality: Literal["ct", "mr"]
    labels: dict[int, str]
    cases: list[Case]
    root: Path

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
        """The numbers of labels given by name or number ("6" is one), in their order.

        Raises:
            LabelError: A label that the dataset does not have.
        """
        by_name = {name: number for number, name in self.labels.items()}
        by_name |= {str(number): number for number in self.labels}
        labels = list(labels)
        unknown = ", ".join(repr(label) for label in labels if str(label) not in by_name)
        known = ", ".join(f"{number} {name}" for number, name in sorted(self.labels.items()))
        if unknown:
            raise LabelError(self.root, found=f"no label {unknown}", allowed=known)
        return [by_name[str(label)] for label in labels]


def open_dataset(path: str | os.PathLike[str]) -> Dataset:
    """Read a dataset's description and find its files.

    Two layouts are known with a ``dataset.json``:

    - ``images/CASE.nii.gz`` (any readable format, or a DICOM folder ``images/CASE``),
      ``labels/CASE.nii.gz``; fields ``name``, ``modality`` ("CT" or "MR"),
      ``labels`` {"1": "liver"}, ``cases`` ["CASE"] (without it, every file in ``images``).
    - nnU-Net: ``imagesTr/CASE_0000.nii.gz``, ``labelsTr/CASE.nii.gz``; fields ``channel_names``
      {"0": "CT"} and ``labels`` {"liver": 1}; or the older ``modality``, ``labels`` {"1": "liver"}
      and ``training`` [{"image": ..., "label": ...}]. One channel only.

    A folder without ``dataset.json``, ``images`` and ``imagesTr`` is a plain folder of scans
    without labels, all CT or all MR by the first one's values.

    Cases need no label map, but a label map needs its case; ``labels`` may name none.

    Raises:
        DatasetError: The file and the field at fault.
    """
    root = Path(path)
    file = root / "dataset.json"
    _require(root.is_dir(), root, found="no such folder", allowed="a dataset folder")
    nnunet = (root / "imagesTr").is_dir()
    if not (file.exists() or nnunet or (root / "images").is_dir()) and (
        scans := find_scans(root, needed=False)
    ):
        names = zip(scan_names(root, scans), scans, strict=True)
        cases = [Case(name, scan, None) for name, scan in names]
        _check_unique(root, "the folder", cases)
        modality = guess_modality(read_volume(cases[0].image))
        return Dataset(root.resolve().name, modality, {}, cases, root)
    fields = _read_json(file)
    if nnunet:
        modality = _modality_of_channels(file, fields)
        cases = _nnunet_cases(root, file, fields)
    else:
        modality = _modality(file, fields.get("modality"))
        cases = _plain_cases(root, file, fields)
    _require(cases, root, found="no case", allowed="at least one image")
    _check_stray_labels(root / ("labelsTr" if nnunet else "labels"), cases)
    name = fields.get("name", root.resolve().name)
    return Dataset(str(name), modality, _labels(file, fields.get("labels")), cases, root)


def _read_json(file: Path) -> dict[str, Any]:
    allowed = "a dataset.json with modality, labels and cases"
    _require(file.exists(), file, found="no such file", allowed=allowed)
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DatasetError(file, found=f"invalid JSON ({error})", allowed="valid JSON") from error
    found = f"a {type(fields).__name__}"
    _require(isinstance(fields, dict), file, found=found, allowed="a JSON object")
    return fields


def _require_field(usable: object, file: Path, field: str, value: object, allowed: str) -> None:
    found = f"no field {field!r}" if value is None else f"{field} = {json.dumps(value)}"
    _require(usable, file, found=found, allowed=allowed)


def _modality(file: Path, value: object) -> Literal["ct", "mr"]:
    name = value.lower() if isinstance(value, str) else ""
    _require_field(name in ("ct", "mr", "mri"), file, "modality", value, '"CT" or "MR"')
    return "ct" if name == "ct" else "mr"


def _modality_of_channels(file: Path, fields: Mapping[str, Any]) -> Literal["ct", "mr"]:
    channels = fields.get("channel_names", fields.get("modality"))
    names = [str(name).lower() for name in channels.values()] if isinstance(channels, dict) else []
    _require_field(
        len(names) == 1 and (names[0] == "ct" or names[0].startswith(_MR_CHANNELS)),
        file,
        "channel_names",
        channels,
        'one channel, "CT" or an MR sequence such as "T1", e.g. {"0": "CT"}',
    )
    return "ct" if names == ["ct"] else "mr"


def _labels(file: Path, value: object) -> dict[int, str]:
    """``{"1": "liver"}`` or nnU-Net's ``{"liver": 1}``; background is left out."""
    allowed = 'names and numbers up to 65535, each once, e.g. {"0": "background", "1": "liver"}'
    entries = {} if value is None else value
    _require_field(isinstance(entries, dict), file, "labels", entries, allowed)
    assert isinstance(entries, dict)
    labels: dict[int, str] = {}
    for key, entry in entries.items():
        number, name = (key, entry) if isinstance(entry, str) else (entry, key)
        if isinstance(number, str) and number.isdecimal():
            number = int(number)
        usable = type(number) is int and 0 <= number <= 65535 and name.strip()
        usable = usable and number not in labels and name not in labels.values()
        _require_field(usable, file, "labels", {key: entry}, allowed)
        labels[number] = name
    labels.pop(0, None)
    return labels


def _plain_cases(root: Path, file: Path, fields: Mapping[str, Any]) -> list[Case]:
    ids = fields.get("cases")
    if ids is None:
        ids = [_case_id(path) for path in _volumes(root / "images")]
    named = isinstance(ids, list) and all(isinstance(id_, str) and id_ for id_ in ids)
    _require_field(named, file, "cases", ids, "a list of case names")
    cases = []
    for id_ in ids:
        image = _find(root / "images", id_)
        if image is None:
            raise DatasetError(
                file,
                found=f"case {id_!r} without an image",
                allowed=f"a file or DICOM folder {root / 'images' / id_}[{'|'.join(READABLE)}]",
                fix="Add the image, or take the case out of the field 'cases'.",
            )
        cases.append(Case(id_, image, _find(root / "labels", id_)))
    _check_unique(file, "cases", cases)
    return cases


def _nnunet_cases(root: Path, file: Path, fields: Mapping[str, Any]) -> list[Case]:
    cases = []
    listed = fields.get("training")
    if listed is None:
        for image in _volumes(root / "imagesTr"):
            id_, channel = _case_id(image)[:-5], _case_id(image)[-5:]
            allowed = "CASE_0000 with a single channel"
            found = f"the file name {image.name}"
            _require(channel == "_0000" and id_, image, found=found, allowed=allowed)
            cases.append(Case(id_, image, _find(root / "labelsTr", id_)))
    else:
        allowed = 'a list of {"image": ..., "label": ...}, existing files'
        _require_field(isinstance(listed, list), file, "training", listed, allowed)
        for entry in listed:
            usable = isinstance(entry, dict) and isinstance(entry.get("image"), str)
            _require_field(usable, file, "training", entry, allowed)
            image = root / entry["image"]
            label = root / entry["label"] if entry.get("label") else None
            exist = image.exists() and (label is None or label.exists())
            _require_field(exist, file, "training", entry, allowed)
            cases.append(Case(_case_id(image).removesuffix("_0000"), image, label))
    _check_unique(file, "training", cases)
    expected = fields.get("numTraining", len(cases))
    found = f"numTraining = {expected} and {len(cases)} images in imagesTr"
    _require(expected == len(cases), file, found=found, allowed="as many images as it says")
    return cases


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


def _find(folder: Path, id_: str) -> Path | None:
    """The volume of a case; None where there is none.

    Raises:
        DatasetError: Several files, or a name that leads out of the folder.
    """
    plain = not re.search(r"[/\\]|^\.\.?$", id_)
    _require(plain, folder, found=f"case name {id_!r}", allowed="a plain file name")
    paths = [folder / f"{id_}{suffix}" for suffix in READABLE]
    found = [path for path in paths if path.is_file()]
    found += [folder / id_] if (folder / id_).is_dir() else []
    several = f"several files of case {id_!r} ({', '.join(path.name for path in found)})"
    _require(len(found) <= 1, folder, found=several, allowed="one file per case")
    return found[0] if found else None
