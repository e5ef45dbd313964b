# SPDX-License-Identifier: Apache-2.0
"""Datasets on disk: ``images/ labels/ dataset.json``, and nnU-Net's ``imagesTr/labelsTr``."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastproto.data.preprocessing import guess_modality
from fastproto.data.volume import READABLE, read_volume, volume_suffix, without_suffix
from fastproto.errors import DatasetError, LabelError, require

_MR_CHANNELS = ("mr", "t1", "t2", "flair", "pd", "dwi", "adc", "swi")


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
        require(
            not unknown,
            self.root,
            error=DatasetError,
            found=f"no case {', '.join(unknown)}",
            allowed=", ".join(known),
        )
        return [known[id_] for id_ in ids]

    def label_ids(self, labels: Iterable[str | int]) -> list[int]:
        """The numbers of labels given by name or number ("6" is one), in their order.

        Raises:
            LabelError: A label that the dataset does not have.
        """
        by_name = {name: number for number, name in self.labels.items()}
        by_name |= {str(number): number for number in self.labels}
        allowed = ", ".join(f"{number} {name}" for number, name in sorted(self.labels.items()))
        numbers = []
        for label in labels:
            require(
                str(label) in by_name,
                self.root,
                error=LabelError,
                found=f"no label {label!r}",
                allowed=allowed,
            )
            numbers.append(by_name[str(label)])
        return numbers


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
    if not root.is_dir():
        raise DatasetError(root, found="no such folder", allowed="a dataset folder")
    if not file.exists() and (volumes := _volumes(root)) and not _is_layout(root):
        cases = [Case(_case_id(path), path, None) for path in volumes]
        _check_unique(root, "the folder", cases)
        modality = guess_modality(read_volume(cases[0].image))
        return Dataset(root.resolve().name, modality, {}, cases, root)
    fields = _read_json(file)
    if (root / "imagesTr").is_dir():
        channels = fields.get("channel_names", fields.get("modality"))
        modality = _modality_of_channels(file, channels)
        cases = _nnunet_cases(root, file, fields)
        label_folder = root / "labelsTr"
    else:
        modality = _modality(file, fields.get("modality"))
        cases = _plain_cases(root, file, fields)
        label_folder = root / "labels"
    if not cases:
        raise DatasetError(root, found="no case", allowed="at least one image")
    _check_stray_labels(label_folder, cases)
    name = fields.get("name", root.resolve().name)
    return Dataset(str(name), modality, _labels(file, fields.get("labels")), cases, root)


def _is_layout(root: Path) -> bool:
    """Whether a folder is a data set, only without its ``dataset.json``."""
    return (root / "images").is_dir() or (root / "imagesTr").is_dir()


def _read_json(file: Path) -> dict[str, Any]:
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DatasetError(
            file, found="no such file", allowed="a dataset.json with modality, labels and cases"
        ) from error
    except (OSError, ValueError) as error:
        raise DatasetError(file, found=f"invalid JSON ({error})", allowed="valid JSON") from error
    if not isinstance(fields, dict):
        raise DatasetError(file, found=f"a {type(fields).__name__}", allowed="a JSON object")
    return fields


def _field_error(file: Path, field: str, value: object, allowed: str) -> DatasetError:
    found = f"no field {field!r}" if value is None else f"{field} = {json.dumps(value)}"
    return DatasetError(file, found=found, allowed=allowed)


def _modality(file: Path, value: object) -> Literal["ct", "mr"]:
    name = value.lower() if isinstance(value, str) else ""
    if name == "ct":
        return "ct"
    if name in ("mr", "mri"):
        return "mr"
    raise _field_error(file, "modality", value, '"CT" or "MR"')


def _modality_of_channels(file: Path, channels: object) -> Literal["ct", "mr"]:
    if not isinstance(channels, Mapping) or len(channels) != 1:
        raise _field_error(file, "channel_names", channels, 'one channel, e.g. {"0": "CT"}')
    name = str(next(iter(channels.values()))).lower()
    if name == "ct":
        return "ct"
    if name.startswith(_MR_CHANNELS):
        return "mr"
    raise _field_error(file, "channel_names", channels, '"CT", or an MR sequence such as "T1"')


def _labels(file: Path, value: object) -> dict[int, str]:
    """``{"1": "liver"}`` or nnU-Net's ``{"liver": 1}``; background is left out."""
    allowed = 'names and numbers, e.g. {"0": "background", "1": "liver"}'
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise _field_error(file, "labels", value, allowed)
    labels: dict[int, str] = {}
    for key, entry in value.items():
        number, name = (key, entry) if isinstance(entry, str) else (entry, key)
        if isinstance(number, str) and number.isdecimal():
            number = int(number)
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number <= 65535:
            raise _field_error(file, "labels", {key: entry}, allowed)
        if not name.strip():
            raise _field_error(file, "labels", {key: entry}, "a name for every label")
        if number in labels or name in labels.values():
            raise _field_error(file, "labels", {key: entry}, "every name and number once")
        labels[number] = name
    labels.pop(0, None)
    return labels


def _plain_cases(root: Path, file: Path, fields: Mapping[str, Any]) -> list[Case]:
    ids = fields.get("cases")
    if ids is None:
        ids = [_case_id(path) for path in _volumes(root / "images")]
    if not isinstance(ids, list) or not all(isinstance(id_, str) and id_ for id_ in ids):
        raise _field_error(file, "cases", ids, "a list of case names")
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
    listed = fields.get("training")
    if listed is None:
        cases = []
        for image in _volumes(root / "imagesTr"):
            id_, channel = _case_id(image)[:-5], _case_id(image)[-5:]
            require(
                channel == "_0000" and id_,
                image,
                error=DatasetError,
                found=f"the file name {image.name}",
                allowed="CASE_0000 with a single channel",
            )
            cases.append(Case(id_, image, _find(root / "labelsTr", id_)))
    else:
        cases = [_listed_case(root, file, entry) for entry in _entries(file, listed)]
    _check_unique(file, "training", cases)
    expected = fields.get("numTraining", len(cases))
    require(
        expected == len(cases),
        file,
        error=DatasetError,
        found=f"numTraining = {expected} and {len(cases)} images in imagesTr",
        allowed="as many images as numTraining says",
    )
    return cases


def _entries(file: Path, listed: object) -> list[Mapping[str, Any]]:
    if isinstance(listed, list) and all(
        isinstance(entry, Mapping) and isinstance(entry.get("image"), str) for entry in listed
    ):
        return listed
    raise _field_error(file, "training", listed, 'a list of {"image": ..., "label": ...}')


def _listed_case(root: Path, file: Path, entry: Mapping[str, Any]) -> Case:
    image = root / entry["image"]
    label = root / entry["label"] if entry.get("label") else None
    for path in (image, label):
        require(
            path is None or path.exists(),
            file,
            error=DatasetError,
            found=lambda: f"training entry {json.dumps(dict(entry))}",
            allowed="existing files",
        )
    return Case(_case_id(image).removesuffix("_0000"), image, label)


def _check_unique(file: Path, field: str, cases: list[Case]) -> None:
    ids = [case.id for case in cases]
    for id_ in ids:
        if ids.count(id_) > 1:
            raise DatasetError(file, found=f"{field} with {id_!r} twice", allowed="each case once")


def _check_stray_labels(folder: Path, cases: list[Case]) -> None:
    """A misspelt file name would silently make a case unlabelled."""
    used = {case.label.resolve() for case in cases if case.label is not None}
    known = {case.id for case in cases}
    for path in _volumes(folder) if folder.is_dir() else []:
        require(
            path.resolve() in used or _case_id(path) in known,
            path,
            error=DatasetError,
            found="a label map without a case",
            allowed="labels named like their case",
            fix="Rename it, or add the case to dataset.json.",
        )


def _volumes(folder: Path) -> list[Path]:
    """Volume files and DICOM folders in a folder, by name."""
    if not folder.is_dir():
        raise DatasetError(folder, found="no such folder", allowed="a folder with volumes")
    return sorted(
        path
        for path in folder.iterdir()
        if not path.name.startswith(".") and (path.is_dir() or volume_suffix(path))
    )


def _case_id(path: Path) -> str:
    return path.name if path.is_dir() else without_suffix(path.name)


def _find(folder: Path, id_: str) -> Path | None:
    """The volume of a case; None where there is none.

    Raises:
        DatasetError: Several files, or a name that leads out of the folder.
    """
    if "/" in id_ or "\\" in id_ or id_ in (".", ".."):
        raise DatasetError(folder, found=f"case name {id_!r}", allowed="a plain file name")
    paths = [folder / f"{id_}{suffix}" for suffix in READABLE]
    found = [path for path in paths if path.is_file()]
    if (folder / id_).is_dir():
        found.append(folder / id_)
    require(
        len(found) <= 1,
        folder,
        error=DatasetError,
        found=f"several files of case {id_!r} ({', '.join(path.name for path in found)})",
        allowed="one file per case",
    )
    return found[0] if found else None
