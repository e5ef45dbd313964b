# SPDX-License-Identifier: Apache-2.0
"""Dataset folders of both layouts, and everything that can be wrong with them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastproto.data import Volume, open_dataset, read_volume, write_volume
from fastproto.data.dataset import open_datasets
from fastproto.errors import ArgumentError, DatasetError, FastprotoWarning, LabelError

PLAIN = {
    "name": "abdomen",
    "modality": "CT",
    "labels": {"0": "background", "1": "liver", "6": "left kidney"},
    "cases": ["b", "a.1"],
}
NNUNET = {
    "channel_names": {"0": "CT"},
    "labels": {"background": 0, "liver": 1, "left kidney": 6},
    "numTraining": 2,
    "file_ending": ".nii.gz",
}
DECATHLON = {
    "name": "Hippocampus",
    "modality": {"0": "MRI"},
    "labels": {"0": "background", "1": "anterior"},
    "numTraining": 1,
    "training": [{"image": "./imagesTr/h_001.nii.gz", "label": "./labelsTr/h_001.nii.gz"}],
}


def make(root: Path, fields: Any, *files: str) -> Path:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(b"")
    root.mkdir(exist_ok=True)
    (root / "dataset.json").write_text(json.dumps(fields))
    return root


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return make(tmp_path / "set", PLAIN, "images/a.1.nii.gz", "images/b.nrrd", "labels/a.1.nii.gz")


@pytest.fixture
def nnunet(tmp_path: Path) -> Path:
    files = ("imagesTr/y_0000.nii.gz", "imagesTr/x_1_0000.nii.gz", "labelsTr/x_1.nii.gz")
    return make(tmp_path / "Dataset001_Abdomen", NNUNET, *files, "imagesTr/.hidden.nii.gz")


def refused(root: Path, *words: str) -> None:
    with pytest.raises(DatasetError) as caught:
        open_dataset(root)
    for word in words:
        assert word in str(caught.value)


def changed(root: Path, **fields: Any) -> Path:
    file = root / "dataset.json"
    content = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    return root


class TestPlainLayout:
    def test_fields_and_files(self, plain: Path):
        dataset = open_dataset(plain)
        assert (dataset.name, dataset.modality, dataset.root) == ("abdomen", "ct", plain)
        assert dataset.labels == {1: "liver", 6: "left kidney"}
        assert [case.id for case in dataset.cases] == ["b", "a.1"]
        assert dataset.cases[0].image == plain / "images" / "b.nrrd"
        assert dataset.cases[0].label is None
        assert dataset.cases[1].label == plain / "labels" / "a.1.nii.gz"

    def test_without_name_and_cases(self, plain: Path):
        dataset = open_dataset(str(changed(plain, name=None, cases=None)))
        assert dataset.name == "set"
        assert [case.id for case in dataset.cases] == ["a.1", "b"]

    def test_dicom_folder_as_a_case(self, plain: Path):
        (plain / "images" / "c").mkdir()
        dataset = open_dataset(changed(plain, cases=None))
        assert [case.image.name for case in dataset.cases] == ["a.1.nii.gz", "b.nrrd", "c"]

    @pytest.mark.parametrize(("written", "read"), [("ct", "ct"), ("MR", "mr"), ("mri", "mr")])
    def test_modalities(self, plain: Path, written: str, read: str):
        assert open_dataset(changed(plain, modality=written)).modality == read

    @pytest.mark.parametrize("text", ["{", "", "\xff", "[1, 2]", '"x"'])
    def test_invalid_json(self, plain: Path, text: str):
        (plain / "dataset.json").write_bytes(text.encode("latin-1"))
        refused(plain, "dataset.json", "JSON")

    @pytest.mark.parametrize(("field", "value", "words"), [
        *(("modality", modality, "CT") for modality in [None, "PET", 3, ["CT"]]),
        *(("labels", labels, "labels") for labels in [
            ["liver"], {"1": ""}, {"1": None}, {"one": "liver"}, {"-1": "liver"}, {"1.5": "liver"},
            {"70000": "liver"}, {"1": "liver", "2": "liver"}, {"liver": True},
            {"liver": 1, "spleen": 1}, {"liver": []}, {"liver": [1, 2.5]}, {"liver": [[1]]},
            {"ignore": 0}, {"liver": 1, "ignore": [2]}, {"liver": 1, "ignore": 1},
            {"ignore": 2, "Ignore": 3},
        ]),
        *(("cases", cases, "cases") for cases in ["a.1", [1], [""], {"a": 1}]),
        ("cases", ["a.1", "b", "zz"], "'zz'"), ("cases", ["b", "a.1", "b"], "'b' twice"),
    ])  # fmt: skip
    def test_unusable_fields(self, plain: Path, field: str, value: Any, words: str):
        refused(changed(plain, **{field: value}), "dataset.json", field, words)

    @pytest.mark.parametrize("labels", [None, {}, {"0": "background"}])
    def test_labels_may_be_left_out(self, plain: Path, labels: Any):
        dataset = open_dataset(changed(plain, labels=labels))
        assert dataset.labels == {}
        assert len(dataset.cases) == 2

    @pytest.mark.parametrize("name", ["../secret", "x/y", ".."])
    def test_case_outside_the_folder(self, plain: Path, name: str):
        refused(changed(plain, cases=[name]), "plain file name")

    @pytest.mark.parametrize(("file", "words"), [
        ("images/b.mha", ("several files", "b.mha", "b.nrrd")),
        ("labels/B.nii.gz", ("B.nii.gz", "without a case")),
    ])  # fmt: skip
    def test_a_file_too_many(self, plain: Path, file: str, words: tuple):
        (plain / file).write_bytes(b"")
        refused(plain, *words)

    def test_no_images(self, plain: Path):
        refused(changed(plain, cases=[]), "no case")
        refused(make(plain.parent / "other", {**PLAIN, "cases": None}), "images")
        refused(plain.parent / "none", "no such folder")


class TestNnunetLayout:
    def test_fields_and_files(self, nnunet: Path):
        dataset = open_dataset(nnunet)
        assert (dataset.name, dataset.modality) == ("Dataset001_Abdomen", "ct")
        assert dataset.labels == {1: "liver", 6: "left kidney"}
        assert [case.id for case in dataset.cases] == ["x_1", "y"]
        assert dataset.cases[0].image == nnunet / "imagesTr" / "x_1_0000.nii.gz"
        assert dataset.cases[0].label == nnunet / "labelsTr" / "x_1.nii.gz"
        assert dataset.cases[1].label is None

    def test_older_layout_with_a_list(self, tmp_path: Path):
        files = ("imagesTr/h_001.nii.gz", "labelsTr/h_001.nii.gz", "imagesTr/._h_001.nii.gz")
        dataset = open_dataset(make(tmp_path / "Task04", DECATHLON, *files))
        assert (dataset.name, dataset.modality) == ("Hippocampus", "mr")
        (case,) = dataset.cases
        assert case.id == "h_001"
        assert case.image.samefile(tmp_path / "Task04" / "imagesTr" / "h_001.nii.gz")
        assert case.label is not None

    @pytest.mark.parametrize("name", ["MRI", "T1w", "T2", "FLAIR", "mr", "ADC"])
    def test_mr_sequences(self, nnunet: Path, name: str):
        assert open_dataset(changed(nnunet, channel_names={"0": name})).modality == "mr"

    @pytest.mark.parametrize(("field", "value", "words"), [
        *(("channel_names", channels, "dataset.json") for channels in [
            None, "CT", {}, {"0": "T1", "1": "T2"}, {"0": "noNorm"}, {"0": "PET"},
        ]),
        *(("training", training, "dataset.json") for training in [
            "all", [1], [{"label": "x"}], [{"image": "imagesTr/none.nii.gz"}],
            [{"image": "imagesTr/y.nii.gz", "label": 1}],
            [{"image": "imagesTr/y.nii.gz", "label": "labelsTr/y.nii.gz"}],
        ]),
        *(("dataset", listed, "dataset.json") for listed in [
            ["y"], {"y": {}}, {"y": {"images": ["imagesTr/y_0000.nii.gz", "imagesTr/x.nii.gz"]}},
            {"y": {"images": ["imagesTr/none.nii.gz"]}}, {"y": {"images": "imagesTr/y_0000.nii"}},
        ]),
    ])  # fmt: skip
    def test_unusable_fields(self, nnunet: Path, field: str, value: Any, words: str):
        refused(changed(nnunet, **{field: value}), "dataset.json", field, words)

    @pytest.mark.parametrize("name", ["z.nii.gz", "y_0001.nii.gz"])
    def test_image_of_another_name_or_channel(self, nnunet: Path, name: str):
        (nnunet / "imagesTr" / name).write_bytes(b"")
        refused(nnunet, name, "_0000")

    @pytest.mark.parametrize("name", ["zscore", "noNorm", "Axial T2", "PET", 3])
    def test_channels_that_say_no_modality(self, nnunet: Path, name: Any):
        root = changed(nnunet, channel_names={"0": name})
        refused(root, "channel_names", json.dumps(name), "--modality ct", "--modality mr")
        for modality in ("ct", "mr"):
            assert open_dataset(root, modality=modality).modality == modality
            assert open_datasets([root, root], modality)[1].modality == modality
        several = changed(nnunet, channel_names={"0": "zscore", "1": "zscore"})
        refused(several, "one channel")
        with pytest.raises(DatasetError, match="one channel"):
            open_dataset(several, modality="mr")


class TestWhatIsClear:
    """Slightly wrong descriptions with one meaning are read, and said to be mended."""

    @pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
    def test_encodings(self, nnunet: Path, encoding: str):
        file = nnunet / "dataset.json"
        file.write_bytes(json.dumps({**NNUNET, "labels": {"Leber (größte)": 1}},
                                    ensure_ascii=False).encode(encoding))  # fmt: skip
        assert open_dataset(nnunet).labels == {1: "Leber (größte)"}

    def test_number_of_cases(self, nnunet: Path):
        for number in (1, 3, "2"):
            with pytest.warns(FastprotoWarning, match=f"numTraining = {number}, .* 2 images"):
                dataset = open_dataset(changed(nnunet, numTraining=number))
            assert [case.id for case in dataset.cases] == ["x_1", "y"]

    def test_suffixes_in_capitals(self, tmp_path: Path):
        """They name the same case, and are read."""
        array = np.arange(512, dtype=np.int16).reshape(8, 8, 8)
        files = ("imagesTr/a_0000.NII.GZ", "labelsTr/a.Nii.gz")
        root = make(tmp_path / "set", {**NNUNET, "numTraining": 1}, *files)
        for file in files:
            write_volume(tmp_path / "volume.nii.gz", array, like=Volume(array))
            (tmp_path / "volume.nii.gz").rename(root / file)
        (case,) = open_dataset(root).cases
        assert (case.id, case.label) == ("a", root / files[1])
        assert np.array_equal(read_volume(case.image).array, array)
        plain = make(tmp_path / "plain", {**PLAIN, "cases": ["b"]}, "images/b.NRRD", "labels/b.MHA")
        (case,) = open_dataset(plain).cases
        assert (case.image.name, case.label.name) == ("b.NRRD", "b.MHA")
        (plain / "images" / "b.nrrd").write_bytes(b"")
        refused(plain, "several files", "b.NRRD", "b.nrrd")

    @pytest.mark.parametrize(("image", "label", "silent"), [
        ("./imagesTr/a.nii.gz", "./labelsTr/a.nii.gz", True),  # nnU-Net's older documentation
        ("imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz", True),
        (".\\imagesTr\\a_0000.nii.gz", ".\\labelsTr\\a.nii.gz", False),
        ("imagesTr\\a.nii.gz", None, False),
        ("./imagesTr/a.nrrd", "./labelsTr/a.nii", False),
    ])  # fmt: skip
    def test_paths_of_a_list(self, tmp_path: Path, image: str, label: str | None, silent: bool):
        files = ("imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz")
        entry = {"image": image, "label": label}
        fields = {**DECATHLON, "training": [entry]}
        root = make(tmp_path / "set", fields, *(files if label else files[:1]))
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            (case,) = open_dataset(root).cases
        assert case.id == "a"
        assert case.image.samefile(root / files[0])
        assert case.label is None if label is None else case.label.samefile(root / files[1])
        assert len(seen) == (0 if silent else 1)
        if seen:
            assert seen[0].category is FastprotoWarning
            paths = 1 if label is None else 2
            assert f"dataset.json: paths that lead to no file as written ({paths})" in str(
                seen[0].message
            )
            assert repr(image) in str(seen[0].message)

    def test_cases_by_name(self, tmp_path: Path):
        """nnU-Net's field for files that lie anywhere; those that it leaves out are left out."""
        files = ("there/one.nii.gz", "there/two.nii.gz", "there/mask.nii.gz", "labelsTr/c.nii.gz")
        fields = {
            "channel_names": {"0": "CT"},
            "labels": {"liver": 1},
            "dataset": {
                "b": {"images": ["there/one.nii.gz"], "label": "there\\mask.nii.gz"},
                "a": {"images": [str(tmp_path / "set" / "there" / "two.nii.gz")]},
            },
        }
        with pytest.warns(FastprotoWarning, match=r"no file as written \(1\)"):
            dataset = open_dataset(make(tmp_path / "set", fields, *files))
        assert [case.id for case in dataset.cases] == ["b", "a"]
        images = [case.image.name for case in dataset.cases]
        assert images == ["one.nii.gz", "two.nii.gz"]
        assert dataset.cases[0].label.samefile(tmp_path / "set" / "there" / "mask.nii.gz")
        assert dataset.cases[1].label is None

    def test_what_is_right_is_read_without_a_word(self, plain: Path, nnunet: Path):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for root in (plain, nnunet):
                open_dataset(root)


class TestPlainFolder:
    """Scans and nothing else."""

    @staticmethod
    def write(folder: Path, name: str, least: float) -> None:
        array = np.zeros((8, 8, 8), np.float32)
        array[0] = least
        write_volume(folder / f"{name}.nii.gz", array, like=Volume(array))

    @pytest.mark.parametrize(("least", "modality"), [(-1000.0, "ct"), (0.0, "mr")])
    def test_every_volume_is_a_case(self, tmp_path: Path, least: float, modality: str):
        folder = tmp_path / "scans"
        for name in ("b", "a.1"):
            self.write(folder, name, least)
        (folder / "notes.txt").write_text("not a scan")
        (folder / ".hidden.nii.gz").write_bytes(b"")
        dataset = open_dataset(folder)
        assert (dataset.name, dataset.modality, dataset.labels) == ("scans", modality, {})
        assert [case.id for case in dataset.cases] == ["a.1", "b"]
        assert all(case.label is None for case in dataset.cases)
        other = "mr" if modality == "ct" else "ct"
        assert open_dataset(folder, modality=other).modality == other

    def test_scans_of_one_name(self, tmp_path: Path):
        self.write(tmp_path, "a", 0.0)
        (tmp_path / "a.mha").write_bytes(b"")
        refused(tmp_path, "'a' twice")

    def test_without_scans_or_with_a_lost_description(self, tmp_path: Path, plain: Path):
        (tmp_path / "empty").mkdir()
        (tmp_path / "empty" / "notes.txt").write_text("not a scan")
        (plain / "dataset.json").unlink()
        for folder in (tmp_path / "empty", plain):
            refused(folder, "dataset.json", "no such file")


def test_a_modality_is_for_data_sets_that_do_not_say(plain: Path, nnunet: Path):
    bare = changed(nnunet, channel_names={"0": "zscore"})
    assert [set_.modality for set_ in open_datasets([plain, bare], "mr")] == ["ct", "mr"]
    assert [set_.modality for set_ in open_datasets([plain], "ct")] == ["ct"]
    with pytest.raises(ArgumentError, match="modality: found mr; allowed: ct, as the data says"):
        open_datasets([plain], "mr")
    with pytest.raises(ArgumentError, match="modality: found 'pet'"):
        open_datasets([plain], "pet")
    assert open_dataset(changed(plain, modality=None), modality="mr").modality == "mr"
    refused(plain, "no field 'modality'", "--modality")


def test_cases_and_labels_are_selected_in_the_given_order(plain: Path):
    dataset = open_dataset(plain)
    assert [case.id for case in dataset.select(["a.1", "b"])] == ["a.1", "b"]
    with pytest.raises(DatasetError, match=r"no case zz; allowed: b, a\.1"):
        dataset.select(["a.1", "zz"])
    with pytest.raises(DatasetError, match="no case ''; allowed"):
        dataset.select([""])
    assert dataset.label_ids(["left kidney", 1, "6"]) == [6, 1, 6]
    for label in ("spleen", 0, 2, "0"):
        with pytest.raises(LabelError, match="1 liver, 6 left kidney"):
            dataset.label_ids([label])


@pytest.mark.data
@pytest.mark.parametrize(("folder", "modality", "cases", "labels"), [
    ("ixi_brain_mr", "mr", 7, 12),
    ("openkbp_hn_ct", "ct", 20, 7),
    ("msd_hippocampus_mr", "mr", 60, 2),
])  # fmt: skip
def test_real_datasets(test_data: Path, folder: str, modality: str, cases: int, labels: int):
    dataset = open_dataset(test_data / folder)
    assert dataset.modality == modality
    assert len(dataset.cases) == cases
    assert len(dataset.labels) == labels
    assert all(case.label is not None for case in dataset.cases)
