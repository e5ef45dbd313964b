# SPDX-License-Identifier: Apache-2.0
"""Which scans a folder holds, and what their results are called."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from support.dicom import (
    COLOUR,
    SEGMENTATION,
    STRUCTURES,
    enhanced,
    new,
    pixels,
    refuse,
    save,
    write_slices,
)

from fastproto.data.scans import find_scans, plan_outputs, stem
from fastproto.errors import ArgumentError, FastprotoWarning, VolumeError


@pytest.mark.parametrize("name", ["r.img", "r.DCM", "r.nii.bz2", "organs.task"])
def test_a_name_of_a_file_makes_no_folder(tmp_path, name):
    with pytest.raises(ArgumentError, match="a folder, or a file ending in"):
        plan_outputs(tmp_path, [tmp_path / "a.nii"], tmp_path / name)


def test_find_scans(tmp_path):
    for name in ("b.nii.gz", "a.NRRD", "c.mha", ".hidden.nii", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    for name, content in {"series/slice1": bytes(128) + b"DICM", "other/report": b"%PDF"}.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(content)
    with pytest.warns(FastprotoWarning, match=r"begin with a dot \(1: \.hidden\.nii\)"):
        names = [path.name for path in find_scans(tmp_path)]
    assert names == ["a.NRRD", "b.nii.gz", "c.mha", "series"]
    for alone in (tmp_path / "series", tmp_path / "b.nii.gz"):
        assert find_scans(alone) == [alone]
    (tmp_path / "empty").mkdir()
    with pytest.raises(VolumeError, match="no image file and no DICOM series"):
        find_scans(tmp_path / "empty")


def test_plan_outputs(tmp_path):
    scan, series = tmp_path / "scan.nii.gz", tmp_path / "series.1"
    file, folder = tmp_path / "out.nrrd", tmp_path / "out"
    assert plan_outputs(scan, [scan], file) == [(scan, file)]
    assert plan_outputs(scan, [scan], folder) == [(scan, folder / "scan.nii.gz")]
    assert plan_outputs(tmp_path, [scan, series], folder) == [
        (scan, folder / "scan.nii.gz"),
        (series, folder / "series.1.nii.gz"),
    ]
    for source, scans, output, message in (
        (tmp_path, [scan, series], file, "scans of a folder"),
        (scan, [scan], tmp_path / "out.mhd", r"out\.mhd"),
        (scan, [scan], tmp_path / "OUT.NII.GZ", r"OUT\.NII\.GZ"),
        (scan, [scan], scan, "overwrite"),
        (tmp_path, [scan], tmp_path, "overwrite"),
        (tmp_path, [scan, tmp_path / "scan.mha"], folder, "overwrite"),
    ):
        with pytest.raises(ArgumentError, match=message):
            plan_outputs(source, scans, output)


def test_plan_outputs_of_other_formats(tmp_path, monkeypatch):
    pytest.importorskip("highdicom")
    scan, series = tmp_path / "scan.nii.gz", tmp_path / "series.1"
    folder = tmp_path / "out"
    both = [scan, series]
    assert [file.name for _, file in plan_outputs(tmp_path, both, folder, "seg.nrrd")] == [
        "scan.seg.nrrd", "series.1.seg.nrrd",
    ]  # fmt: skip
    for name in ("a.seg.nrrd", "a.dcm"):
        assert plan_outputs(series, [series], tmp_path / name) == [(series, tmp_path / name)]
        assert stem(tmp_path / name) == "a"
    scan.touch()
    with pytest.raises(ArgumentError, match=r"scan\.nii\.gz: found a scan that is no DICOM"):
        plan_outputs(scan, [scan], tmp_path / "a.dcm")
    assert len(plan_outputs(tmp_path, both, folder, "dcm")) == 2  # `segment` names the first
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(ArgumentError, match=r"pip install 'fastproto\[dicom-seg\]'"):
        plan_outputs(series, [series], tmp_path / "a.dcm")
    with pytest.raises(ArgumentError, match="nrrd for the file"):
        plan_outputs(series, [series], tmp_path / "a.nii.gz", "seg.nrrd")
    (tmp_path / "folder.dcm").mkdir()
    jobs = plan_outputs(series, [series], tmp_path / "folder.dcm")
    assert jobs == [(series, tmp_path / "folder.dcm" / "series.1.nii.gz")]


def test_results_are_named_as_scans_not_as_what_they_link_to(tmp_path):
    assert stem(Path("a/b.v2.nii.gz")) == "b.v2"
    assert stem(Path("a/B.MHA")) == "B"
    assert stem(Path("a/1.2.840")) == "1.2.840"
    blob = tmp_path / "blob_of_a_long_key.nii.gz"
    blob.touch()
    links = [tmp_path / f"case{n}_0000.nii.gz" for n in (1, 2)]
    for link in links:
        link.symlink_to(blob)
    jobs = plan_outputs(tmp_path, links, tmp_path / "results")
    assert [target.name for _, target in jobs] == ["case1.nii.gz", "case2.nii.gz"]


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def series(folder: Path, uid: str = "1.2.3") -> Path:
    return write_slices(folder, np.zeros((2, 4, 5), "u2"), range(2), SeriesInstanceUID=uid)


def multi_frame(path: Path, uid: str) -> Path:
    stack, positions = np.zeros((2, 4, 5), "u2"), [(0, 0, 0), (0, 0, 1)]
    return save(enhanced(stack, positions, SeriesInstanceUID=uid), path)


def planned(root: Path, **options) -> dict[str, str]:
    """Scan -> result, both relative to their folders."""
    scans = find_scans(root, **options)
    jobs = plan_outputs(root, scans, root.parent / "results")
    return {str(scan.relative_to(root)): target.name for scan, target in jobs}


class TestFolders:
    @pytest.fixture(autouse=True)
    def _errors(self, recwarn: pytest.WarningsRecorder):
        self.warned = recwarn

    def texts(self) -> str:
        return " ".join(str(warning.message) for warning in self.warned)

    def test_patients_one_level_down(self, tmp_path: Path):
        root = tmp_path / "scans"
        touch(root, "p1/scan.nii.gz", "p2/scan.nii.gz", "p3/ct.nii.gz", "p3/mr.nrrd", "top.mha")
        series(root / "p4" / "study" / "series")
        assert planned(root) == {
            "p1/scan.nii.gz": "p1.nii.gz",
            "p2/scan.nii.gz": "p2.nii.gz",
            "p3/ct.nii.gz": "p3-ct.nii.gz",
            "p3/mr.nrrd": "p3-mr.nii.gz",
            "p4/study/series": "p4.nii.gz",
            "top.mha": "top.nii.gz",
        }
        assert self.texts() == ""

    def test_names_stay_apart(self, tmp_path: Path):
        root = tmp_path / "scans"
        touch(root, "a/scan.nii.gz", "a.nii.gz", "b/x.nii", "b_0000.nii.gz")
        assert sorted(planned(root).values()) == [
            "a-scan.nii.gz", "a.nii.gz", "b.nii.gz", "b_0000.nii.gz"
        ]  # fmt: skip

    def test_image_files_beside_slices(self, tmp_path: Path):
        root = series(tmp_path / "ct")
        touch(root, "mask.nii.gz", "localizer/notes.txt")
        assert planned(root) == {".": "ct.nii.gz"}
        beside = "image files beside the slices of a DICOM series (1: mask.nii.gz)"
        assert self.texts() == f"{root}: left out {beside}."

    def test_a_folder_of_slices_below_slices_is_a_scan_too(self, tmp_path: Path):
        root = series(tmp_path / "ct")
        series(root / "localizer", "9.9")
        assert planned(root) == {".": "ct.nii.gz", "localizer": "localizer.nii.gz"}
        with pytest.raises(ArgumentError, match=r"the 2 scans of a folder \(ct, localizer\)"):
            plan_outputs(root, find_scans(root), tmp_path / "out.nii.gz")
        assert planned(root, series="1.2.3") == {".": "ct.nii.gz"}
        assert planned(root, series="9.9") == {"localizer": "localizer.nii.gz"}

    def test_multi_frame_files(self, tmp_path: Path):
        root = tmp_path / "scans"
        root.mkdir()
        multi_frame(root / "a.dcm", "1.1")
        assert planned(root) == {".": "scans.nii.gz"}
        multi_frame(root / "b", "2.2")
        screenshot = pixels(np.zeros((4, 15), "u1"), SamplesPerPixel=3, Columns=5)
        save(new(COLOUR, **screenshot, PlanarConfiguration=0), root / "c")
        assert planned(root) == {"a.dcm": "a.nii.gz", "b": "b.nii.gz"}
        assert "left out colour images (1: c)" in self.texts()
        assert planned(root, series="2.2") == {".": "scans.nii.gz"}
        multi_frame(root / "half", "2.2")  # of a series in two files
        assert planned(root) == {".": "scans.nii.gz"}

    def test_the_layout_of_a_disc(self, tmp_path: Path):
        """With an index, structures and a segmentation, which are no scans."""
        root = tmp_path / "disc"
        series(root / "DICOM" / "PA0" / "ST0" / "SE0")
        save(new(STRUCTURES), root / "DICOM" / "PA0" / "ST0" / "structures")
        save(new(SEGMENTATION), (root / "DICOM" / "SE1").with_suffix(".dcm"))
        (root / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
        assert planned(root) == {"DICOM/PA0/ST0/SE0": "DICOM.nii.gz"}
        assert self.texts() == ""

    def test_what_is_left_out_is_named(self, tmp_path: Path):
        root = tmp_path / "scans"
        touch(root, "a.nii.gz", ".b.nii.gz", "._a.nii.gz", ".partial-1.nii.gz", "c.mgz",
              "p/masks/liver.nii.gz", ".git/d.nii.gz", "notes.txt")  # fmt: skip
        (root / "e.nii.gz").symlink_to(root / "nowhere.nii.gz")
        (root / "p7").symlink_to(tmp_path / "unmounted")
        (root / "again").symlink_to(root)
        assert planned(root) == {"a.nii.gz": "a.nii.gz"}
        assert self.texts() == (
            f"{root}: left out files whose names begin with a dot (1: .b.nii.gz); "
            "files of a format that is not read (1: c.mgz); broken links (2: e.nii.gz, p7); "
            "folders that were searched under another name (1: again); "
            "image files more than one folder down (1: p/masks/liver.nii.gz)."
        )

    def test_links_that_lead_to_themselves(self, tmp_path: Path):
        touch(tmp_path, "a.nii.gz")
        for name in ("b.nii.gz", "p1"):
            (tmp_path / name).symlink_to(tmp_path / name)
        assert [path.name for path in find_scans(tmp_path)] == ["a.nii.gz"]
        assert "broken links (2: b.nii.gz, p1)" in self.texts()
        plan_outputs(tmp_path, [tmp_path / "a.nii.gz"], tmp_path / "b.nii.gz")

    def test_label_maps_beside_scans(self, tmp_path: Path):
        """By the last word of their names, files and folders."""
        root = tmp_path / "scans"
        touch(root, "p1/scan.nii.gz", "p1/mask.nii.gz", "p2/ct.nrrd", "p2/ct-Seg.nrrd",
              "p2/organs.seg.nrrd", "p3/unmask.nii.gz", "p3/label_of_mr.nii.gz",
              "p4/a_label.nii.gz", "p4/b_label.nii.gz")  # fmt: skip
        series(root / "p5")
        touch(root, "p5/segmentation.mha")
        assert planned(root) == {
            "p1/scan.nii.gz": "p1.nii.gz",
            "p2/ct.nrrd": "p2.nii.gz",
            "p3/label_of_mr.nii.gz": "p3-label_of_mr.nii.gz",
            "p3/unmask.nii.gz": "p3-unmask.nii.gz",
            "p4/a_label.nii.gz": "p4-a_label.nii.gz",
            "p4/b_label.nii.gz": "p4-b_label.nii.gz",
            "p5": "p5.nii.gz",
        }
        maps = "p1/mask.nii.gz, p2/ct-Seg.nrrd, p2/organs.seg.nrrd"
        assert f"label maps, by their names (3: {maps})" in self.texts()
        patient = tmp_path / "patient"
        touch(
            patient, "ct.nii.gz", "segmentations/liver.nii.gz", "imagesTs/a.nii", "labelsTs/a.nii"
        )
        assert [*planned(patient)] == ["ct.nii.gz", "imagesTs/a.nii"]
        maps = "label maps, by their names (2: labelsTs/a.nii, segmentations/liver.nii.gz)"
        assert maps in self.texts()

    def test_image_files_have_no_series(self, tmp_path: Path):
        root = tmp_path / "scans"
        touch(root, "a.nii.gz", "p1/b.nii.gz")
        series(root / "p2")
        assert planned(root, series="1.2.3") == {"p2": "p2.nii.gz"}
        assert "image files, which have no series (2: a.nii.gz, p1/b.nii.gz)" in self.texts()

    def test_files_that_cannot_be_opened(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        root = tmp_path / "scans"
        touch(root, "a.nii.gz", "p1/notes", "p1/b.nii.gz")
        refuse(monkeypatch, "notes")
        assert [*planned(root)] == ["a.nii.gz", "p1/b.nii.gz"]
        assert "left out no access (Permission denied) (1: p1/notes)" in self.texts()

    def test_results_are_no_scans(self, tmp_path: Path):
        touch(tmp_path, "a.nii.gz", "results/a.nii.gz", "old.nii.gz")
        for output, expected in (("results", 2), ("old.nii.gz", 2), ("other", 3)):
            assert len(find_scans(tmp_path, output=tmp_path / output)) == expected

    def test_what_is_written_beside_a_result_is_no_scan(self, tmp_path: Path):
        touch(tmp_path, "a.nii.gz", "r-uncertainty.nii.gz", "r-probabilities/1-liver.nii.gz",
              "r.png", "r-2.nii.gz")  # fmt: skip
        found = find_scans(tmp_path, output=tmp_path / "r.nrrd")
        assert [path.name for path in found] == ["a.nii.gz", "r-2.nii.gz"]
        assert self.texts() == ""

    def test_nothing_that_is_read(self, tmp_path: Path):
        touch(tmp_path, ".a.nii.gz", "b.hdr", "b.img")
        with pytest.raises(VolumeError, match=r"begin with a dot \(1: \.a.*\(2: b\.hdr, b\.img\)"):
            find_scans(tmp_path)
        assert find_scans(tmp_path, needed=False) == []

    @pytest.mark.parametrize("parts", [("images", "labels"), ("imagesTr", "labelsTr")])
    def test_a_data_set_has_label_maps(self, tmp_path: Path, parts: tuple[str, str]):
        touch(tmp_path, *(f"{part}/a.nii.gz" for part in parts))
        with pytest.raises(VolumeError, match=rf"a data set.*Name .*{parts[0]}"):
            find_scans(tmp_path)
        assert len(find_scans(tmp_path / parts[0])) == 1

    def test_a_damaged_slice_is_a_series_that_fails(self, tmp_path: Path):
        root = tmp_path / "scans"
        touch(root, "a.nii.gz")
        (series(root / "b") / "IM00").write_bytes(bytes(128) + b"DICM" + bytes(50))
        assert planned(root) == {"a.nii.gz": "a.nii.gz", "b": "b.nii.gz"}
