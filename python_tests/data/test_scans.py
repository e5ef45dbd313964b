# SPDX-License-Identifier: Apache-2.0
"""Which scans a folder holds, and what their results are called."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastproto.data.scans import find_scans, plan_outputs, stem
from fastproto.errors import ArgumentError, VolumeError


def test_find_scans(tmp_path):
    for name in ("b.nii.gz", "a.NRRD", "c.mha", ".hidden.nii", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    for name, content in {"series/slice1": bytes(128) + b"DICM", "other/report": b"%PDF"}.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(content)
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
