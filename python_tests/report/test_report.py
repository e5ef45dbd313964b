# SPDX-License-Identifier: Apache-2.0
"""The page without a browser: what it holds, what it escapes, how large it is."""

from __future__ import annotations

import base64
import io
import json
import re
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from fastproto.cli import main
from fastproto.cli.report import what_tasks_say
from fastproto.data import Volume
from fastproto.data.phantom import make_patient
from fastproto.data.volume import write_volume
from fastproto.errors import CheckpointError, InputError
from fastproto.report import Results, read_results, read_scores, training_contents, write_page
from fastproto.report.pictures import MOST_BYTES, PAGE_BYTES, encode
from fastproto.report.results import FEWEST

from .conftest import NASTY, ORGANS, parts, write_case, write_run, write_scores

VOID = {"meta", "link", "input", "br", "hr", "img"}


class Strict(HTMLParser):
    """Every element is closed where it was opened; ids, texts and script data are kept."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.texts: list[str] = []
        self.data: list[dict] = []
        self.tags: list[str] = []
        self.labels: set[str] = set()
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        assert len(given) == len(attributes)
        self.tags.append(tag)
        self.ids += [given["id"]] if "id" in given else []
        self.links += [given["href"]] if "href" in given else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name == "href"]
        self.ids += [value for name, value in attributes if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["script"] and data.startswith("{"):
            self.data.append(json.loads(data))
        elif data.strip() and self.open[-1:] != ["script"]:
            self.texts.append(data.strip())


@pytest.fixture(scope="module")
def page(report) -> Strict:
    return Strict(report.read_text("utf-8"))


def test_the_page_is_whole_and_needs_no_network(report, page):
    text = report.read_text("utf-8")
    assert not re.search(r"https?:|//\w+\.\w", re.sub(r'"[A-Za-z0-9+/=]{99,}"', "", text))
    assert "default-src 'none'" in text
    assert len(set(page.ids)) == len(page.ids)
    known = {f"#scan-{number}" for number in range(len(page.data))}
    assert {link for link in page.links if link.startswith("#scan")} == known
    assert page.links.count("#scan-1") >= 4  # table, histograms, box plots, their table


def test_names_are_text_wherever_they_stand(page):
    """No element comes of a name, and each is seen as it is written."""
    assert page.tags.count("script") == 1 + len(page.data)
    assert "b" not in page.tags
    assert NASTY in {scan["name"] for scan in page.data}
    for name in (NASTY, ORGANS[2], "/data/<scans>"):
        assert name in page.texts


def test_what_a_reader_looks_for_is_there(page):
    text = " ".join(page.texts)
    assert "liver: 10.1 ml is unusual (median 3.8 ml)" in text
    assert "60 steps" not in text
    assert "30 steps in 1.0 minutes" in text
    assert "0.800 at the end" in text  # validation Dice
    assert "missed" in text
    assert "damaged" in text
    for title in ("Dice", "HD95 [mm]", "NSD @ 2 mm"):
        assert title in page.texts


def test_pictures_are_those_of_the_scan(page, cases):
    """Axial slices from the feet on, the organ in the place that it has in the label map."""
    scan = page.data[0]
    axial, coronal, sagittal = scan["planes"]
    assert [plane["plane"] for plane in scan["planes"]] == ["axial", "coronal", "sagittal"]
    assert axial["numbers"] == list(range(1, 11))
    assert (axial["total"], axial["mm"]) == (10, [32.0, 40.0])
    assert coronal["mm"] == [50.0, 40.0]
    assert sagittal["mm"] == [50.0, 32.0]
    labels = np.frombuffer(zlib.decompress(base64.b64decode(axial["labels"])), np.uint8)
    labels = labels.reshape(10, axial["rows"], axial["cols"])
    assert (labels[1:4, 2:9, 3:12] == 1).all()
    assert (labels == 1).sum() == 3 * 7 * 9
    picture = Image.open(io.BytesIO(base64.b64decode(axial["image"])))
    grey = np.asarray(picture).reshape(10, axial["pitch"], axial["cols"])[:, : axial["rows"]]
    assert grey[labels == 2].mean() > grey[labels == 1].mean() > grey[labels == 0].mean() + 40


def test_coronal_pictures_have_the_head_on_top():
    label = np.zeros((10, 4, 6), np.uint8)
    label[9] = 1  # the highest slice, in LPS
    coronal = encode(None, Volume(label, (1.0, 1.0, 2.0)), [1])[1]
    labels = np.frombuffer(zlib.decompress(base64.b64decode(coronal["labels"])), np.uint8)
    assert labels.reshape(4, 10, 6)[:, 0].all()
    assert labels.sum() == 4 * 6
    assert coronal["image"] == ""


def test_a_report_begins_where_most_organs_are_and_counts_as_the_scan_does():
    """The body fills rows 30 to 50 of 60; what lies around it is not shown."""
    scan = np.full((10, 60, 40), -1000, np.float32)
    scan[:, 30:50, 5:35] = 40
    label = np.zeros(scan.shape, np.uint8)
    label[3:7, 32:48, 8:20] = 1
    label[6, 46, 30] = 2
    axial, coronal, sagittal = encode(Volume(scan), Volume(label), [1, 2])
    assert [plane["total"] for plane in (axial, coronal, sagittal)] == [10, 60, 40]
    assert coronal["numbers"][0] > 20
    assert coronal["numbers"][coronal["first"]] == 47
    assert axial["numbers"][axial["first"]] == 7


@pytest.mark.parametrize(("scans", "room"), [(1, MOST_BYTES), (200, PAGE_BYTES / 200)])
def test_pictures_fit_into_the_room_of_a_scan(scans, room):
    image, label = make_patient(0, modality="ct")
    planes = encode(image, label, range(1, 11), scans)
    size = sum(len(plane["image"]) + len(plane["labels"]) for plane in planes)
    assert room / 10 < size <= room
    assert min(len(plane["numbers"]) for plane in planes) >= (12 if scans > 1 else 40)


def test_200_scans_stay_below_30_mb(tmp_path):
    """Of small scans the best pictures; how large those of large ones get is tested above."""
    label = np.zeros((8, 24, 24), np.uint8)
    label[2:5, 4:12, 5:15] = 1
    rng = np.random.default_rng(0)
    results = Results({1: "liver"}, 200)
    for number in range(200):
        scan = Volume(rng.normal(0, 100, label.shape).astype(np.float32))
        results.add(f"case {number}", Volume(label), scan)
    write_page(tmp_path / "report.html", "200", **parts(results))
    assert (tmp_path / "report.html").stat().st_size < 30e6
    page = Strict((tmp_path / "report.html").read_text("utf-8"))
    assert len(page.data) == 200
    assert len(page.data[0]["planes"][0]["numbers"]) == 8


def test_the_dice_that_tasks_predict_stands_with_the_organ(tmp_path):
    def task(*dice: float | None) -> SimpleNamespace:
        organs = [SimpleNamespace(value=v, name=ORGANS[v], expected_dice=d) for v, d in
                  enumerate(dice, 1)]  # fmt: skip
        return SimpleNamespace(organs=organs, labels=ORGANS)

    names, dice = what_tasks_say([task(0.3, None), task(0.5, None)])
    assert names == ORGANS
    assert dice == {1: pytest.approx(0.4), 2: None}
    results = Results(names, 1, dice)
    results.add("scan", Volume(np.ones((4, 8, 8), np.uint8)), None)
    liver, kidney = results.contents()["organ_table"].rows
    assert [cell.text for cell in liver[2:4]] == ["0.40", "1 of 1"]
    assert liver[-1].warning
    assert "poor results" in liver[-1].text
    assert [cell.text for cell in kidney[2:4]] == ["-", "0 of 1"]
    assert liver[-2].text == "-"  # outliers, of one scan
    assert not kidney[-1].text


def test_outliers_are_far_from_the_others_and_from_the_median():
    def found(*sizes: int) -> set[int]:
        results = Results({1: "liver"}, len(sizes))
        for size in sizes:
            label = np.zeros((4, 8, 8), np.uint8)
            label.flat[:size] = 1
            results.add("scan", Volume(label), None)
        return results._outliers(1)

    assert found(100, 101, 102, 99, 100, 250) == {5}
    assert found(100, 101, 102, 99, 100, 20) == {5}
    assert found(100, 100, 100, 100, 100, 110) == set()  # a tenth is no matter
    assert found(100, 101, 102, 99, 100, 0) == set()  # missing, which is said in other words
    assert found(*[100] * (FEWEST - 2), 250) == set()  # too few to tell


def test_an_organ_in_more_pieces_than_in_most_scans_is_told():
    def told(*pieces: int, crumb: int = 0) -> list[list[str]]:
        results = Results({1: "kidneys"}, len(pieces))
        for count in pieces:
            label = np.zeros((4, 12, 12), np.uint8)
            label[1:3, 1 : 4 * count : 4, 2:9] = 1
            label[0, 0, :crumb] = 1
            results.add("scan", Volume(label), None, [])
        found = results._scattered(1)
        return [[found[i]] if i in found else [] for i in range(len(pieces))]

    assert told(1, 1, 2, 1, 1)[1:4] == [[], ["kidneys: in 2 pieces (most scans: 1)"], []]
    assert told(2, 2, 2, 3, 2)[2:4] == [[], ["kidneys: in 3 pieces (most scans: 2)"]]
    assert told(1, 2, 1) == [[]] * 3  # too few to tell
    assert told(0, 0, 1, 1, 1, 1, 1) == [[]] * 7
    assert told(1, 1, 1, 1, 1, crumb=1) == [[]] * 5


def test_a_scan_without_its_organ_and_one_of_another_grid_are_named(cases, tmp_path):
    shape = (10, 16, 20)
    for name in ("empty", "shifted"):
        origin = (0.0, 0.0, 9.0 * (name == "shifted"))
        label = np.zeros(shape, np.uint8)
        label[0, 0, 0] = 3 * (name == "empty")
        write_volume(tmp_path / f"{name}.nii.gz", label, Volume(label, (2.0, 2.0, 5.0), origin))
        scan = tmp_path / "scans" / f"{name}.nii.gz"
        scan.parent.mkdir(exist_ok=True)
        scan.write_bytes((cases / "scans" / "case_0.nii.gz").read_bytes())
    results = read_results(tmp_path, tmp_path / "scans", names=ORGANS)
    assert "liver was not found" in results.findings[0].doubts
    assert "label 3 has no name and is not shown" in results.findings[0].doubts
    assert [*results.failed] == ["shifted"]
    assert "lie up to 9 mm away" in results.failed["shifted"]
    output = tmp_path / "report.html"
    arguments = [tmp_path, "--scans", tmp_path / "scans", "--labels", "liver=1", "-o", output]
    assert main(["report", *map(str, arguments)]) == 2
    assert "lie up to 9 mm away" in " ".join(Strict(output.read_text("utf-8")).texts)


def test_what_stays_without_a_name_or_a_picture_is_told(cases, tmp_path, capsys):
    scores = write_scores(tmp_path / "scores.json", ["case_1", "stranger"])
    arguments = [cases / "results", scores, "-o", tmp_path / "report.html"]
    assert main(["report", *map(str, arguments)]) == 0
    said = capsys.readouterr().err
    assert "organs are shown by their numbers: --labels or --task names them" in said
    assert f"{scores}: cases that {cases / 'results'} does not hold: stranger." in said


def test_wrong_inputs_are_told(cases, tmp_path, capsys):
    output = str(tmp_path / "report.html")

    def error(*words: object) -> str:
        assert main(["report", *map(str, words)]) == 2
        return capsys.readouterr().err

    assert "ending in .html" in error(cases / "results", "-o", tmp_path / "report.pdf")
    assert "two of a kind" in error(cases / "results", cases / "scans", "-o", output)
    run = write_run(tmp_path / "run")
    assert "--scans" in error(run, "--scans", cases / "scans", "-o", output)
    assert "no label map" in error(run.parent / "run" / "..", "-o", output)
    other = tmp_path / "other"
    write_case(other, "unlike", 3)
    write_case(other, "another", 3)
    text = error(cases / "results", "--scans", other / "scans", "-o", output)
    assert "no scan called as a label map" in text
    assert not Path(output).exists()
    wrong = tmp_path / "wrong.json"
    wrong.write_text('{"rows": []}')
    with pytest.raises(InputError, match="JSON of something else"):
        read_scores(wrong)
    (run / "log.jsonl").write_text("")
    with pytest.raises(CheckpointError, match="without any step"):
        training_contents(run)


def test_without_the_extra_one_sentence_says_what_to_install(cases, tmp_path, capsys):
    with mock.patch.dict(sys.modules, {"matplotlib": None}):
        arguments = [cases / "results", "-o", tmp_path / "report.html"]
        assert main(["report", *map(str, arguments)]) == 2
    assert "pip install 'fastproto[report]'" in capsys.readouterr().err
