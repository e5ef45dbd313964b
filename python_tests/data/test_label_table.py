# SPDX-License-Identifier: Apache-2.0
"""Names of label values: regions, what is ignored, and where a label map's names are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastproto.data import open_dataset
from fastproto.data.dataset import labels_of
from fastproto.data.label_table import LabelTable
from fastproto.errors import DatasetError, FastprotoWarning, LabelError, VolumeError

from .test_dataset import NNUNET, changed, make


@pytest.fixture
def nnunet(tmp_path: Path) -> Path:
    return make(tmp_path / "set", {**NNUNET, "numTraining": 1}, "imagesTr/a_0000.nii.gz")


class TestLabels:
    def test_a_name_of_the_background_is_no_organ(self, nnunet: Path):
        with pytest.warns(FastprotoWarning, match="value 0 is background.*: liver is no organ"):
            dataset = open_dataset(changed(nnunet, labels={"liver": 0, "spleen": 1}))
        assert dataset.labels == {1: "spleen"}

    def test_numbers_and_nesting_beyond_reason(self, nnunet: Path):
        with pytest.raises(DatasetError, match="whole number from 0 to 65535"):
            open_dataset(changed(nnunet, labels={"liver": "1" * 5000}))
        (nnunet / "dataset.json").write_text("[" * 100_000)
        with pytest.raises(DatasetError, match="no readable JSON"):
            open_dataset(nnunet)

    @pytest.mark.parametrize(("labels", "names"), [
        ({"background": 0, "both": [1, 2], "organ": 1, "other": 2, "third": 3},
         {1: "organ", 2: "other", 3: "third"}),
        ({"background": 0, "whole": [1, 2, 3], "core": [2, 3], "active": [3]},
         {1: "label 1", 2: "label 2", 3: "active"}),
        ({"background": [0], "whole": [0, "1", 2], "1": "core"}, {1: "core", 2: "label 2"}),
    ])  # fmt: skip
    def test_regions_are_read_as_their_parts(self, nnunet: Path, labels: dict, names: dict):
        with pytest.warns(FastprotoWarning, match="dataset.json: labels: regions") as caught:
            dataset = open_dataset(changed(nnunet, labels=labels))
        assert dataset.labels == names
        assert dataset.ignore is None
        (warning,) = caught
        for value, name in names.items():
            assert f"{value} {name}" in str(warning.message)

    def test_regions_of_one_value_are_labels(self, nnunet: Path, recwarn):
        assert open_dataset(changed(nnunet, labels={"a": [1], "b": [2]})).labels == {1: "a", 2: "b"}
        assert not recwarn

    @pytest.mark.parametrize("labels", [
        {"background": 0, "organ": 1, "other": 2, "ignore": 3},
        {"0": "background", "1": "organ", "2": "other", "3": "Ignore"},
        {"background": 0, "ignore": 3, "organ": 1, "other": [2], "all": [1, 2, 3]},
    ])  # fmt: skip
    @pytest.mark.filterwarnings("ignore::fastproto.errors.FastprotoWarning")
    def test_what_is_ignored_is_no_label(self, nnunet: Path, labels: dict):
        dataset = open_dataset(changed(nnunet, labels=labels))
        assert (dataset.labels, dataset.ignore) == ({1: "organ", 2: "other"}, 3)
        assert dataset.values == {1: "organ", 2: "other", 3: "ignore"}
        for label in ("ignore", 3):
            with pytest.raises(LabelError, match="allowed: 1 organ, 2 other"):
                dataset.label_ids([label])

    def test_names_are_found_in_any_case(self, nnunet: Path):
        labels = {"Liver": 1, "liver": 2, "Left Kidney": 6, "1": 7}
        dataset = open_dataset(changed(nnunet, labels=labels))
        assert dataset.label_ids(["left kidney", "Liver", "liver", "1", 7, "6"]) == [
            6,
            1,
            2,
            1,
            7,
            6,
        ]
        with pytest.raises(LabelError, match="no label 'LIVER'"):  # which of the two?
            dataset.label_ids(["LIVER"])


class TestLabelsOfALabelMap:
    """The table that belongs to a label map, wherever the data set keeps it."""

    @pytest.mark.parametrize("folder", ["", "labels", "labelsTr", "labelsTs"])
    def test_beside_it_or_its_folder(self, tmp_path: Path, folder: str, monkeypatch):
        label = tmp_path / "set" / folder / "case.nii.gz"
        label.parent.mkdir(parents=True)
        assert labels_of(label) is None
        table = tmp_path / "set" / "dataset.json"
        table.write_text('{"labels": {"background": 0, "liver": 1, "ignore": 2}}')
        assert labels_of(label) == LabelTable({1: "liver"}, 2)
        monkeypatch.chdir(label.parent)
        assert labels_of(Path("case.nii.gz")) == LabelTable({1: "liver"}, 2)
        table.write_text('{"modality": "CT"}')  # it may name none
        assert labels_of(label) is None
        table.write_text('{"labels": {"ignore": 2}}')
        assert labels_of(label) == LabelTable({}, 2)
        table.write_text("{")
        with pytest.raises(DatasetError, match=r"dataset\.json"):
            labels_of(label)

    @pytest.mark.parametrize("fields", [
        {"training": [{"image": "./a.nii.gz", "label": ".\\masks\\a.nii.gz"}]},
        {"dataset": {"a": {"images": ["a.nii.gz"], "label": "masks/a.nii.gz"}}},
    ])  # fmt: skip
    def test_in_a_folder_that_is_listed(self, tmp_path: Path, fields: dict):
        table = tmp_path / "dataset.json"
        for name in ("a", "b"):
            label = tmp_path / "masks" / f"{name}.nii.gz"
            table.write_text(json.dumps({"labels": {"1": "liver"}, **fields}))
            assert labels_of(label) == (LabelTable({1: "liver"}) if name == "a" else None)
        table.write_text("of another program")
        assert labels_of(label) is None
        label.parent.mkdir()
        label.symlink_to("/proc/self/mem")  # whose beginning nobody can read
        with pytest.raises(VolumeError, match=r"b\.nii\.gz: found that .* cannot be read \(Input"):
            labels_of(label)
        table.unlink()
        label.unlink()
        table.symlink_to("/proc/self/mem")
        with pytest.raises(DatasetError, match=r"dataset\.json: found that it cannot be read"):
            labels_of(label)
