# SPDX-License-Identifier: Apache-2.0
"""The fuzz campaign (scripts/fuzz_formats.py), a hundred cases of each format."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.fuzz import FORMATS, campaign
from support.fuzz.dying import die_and_hang
from support.fuzz.judge import Reading, Unreadable, compare, judge
from support.fuzz.mutate import Case

from fastproto.data import Volume
from fastproto.errors import ResourceError

CASES = 100


def test_refused_or_equal():
    results = campaign.run([(name, index) for name in FORMATS for index in range(CASES)], seed=0)
    failures = [
        f"scripts/fuzz_formats.py --formats {name} --only {failure['index']}: {failure}"
        for name, result in results.items()
        for failure in result.failures
    ]
    assert not failures, "\n".join(failures)
    for name, result in results.items():
        assert result.counts["equal"] > CASES / 5, name  # not everything refused
        assert result.counts["refused"] > CASES / 5, name


def test_a_case_is_the_same_every_time():
    for name in FORMATS:
        assert campaign.make(name, 3, 7) == campaign.make(name, 3, 7)
        assert campaign.make(name, 3, 7) != campaign.make(name, 4, 7)


class TestTheHarness:
    """It finds what it is there for."""

    GOOD = Reading(np.arange(60, dtype=np.int16).reshape(3, 4, 5), np.diag([-1.0, -1.0, 1.0, 1.0]))

    def volume(self) -> Volume:
        return Volume(self.GOOD.array.transpose(2, 1, 0).copy())

    def test_equal(self):
        assert compare(self.volume(), self.GOOD) is None

    def test_one_wrong_voxel(self):
        volume = self.volume()
        volume.array[1, 2, 1] += 1
        assert compare(volume, self.GOOD)[0] == "other values"

    def test_another_size(self):
        assert compare(Volume(self.volume().array[:-1]), self.GOOD)[0] == "other size"

    @pytest.mark.parametrize(
        "wrong",
        [
            {"origin": (0, 0, 0.5)},
            {"spacing": (1, 1, 1.1)},
            {"direction": (0, 1, 0, 1, 0, 0, 0, 0, 1)},
        ],
    )
    def test_another_place(self, wrong: dict):
        assert compare(replace(self.volume(), **wrong), self.GOOD)[0] == "other place"

    def fake(self, ours, **reading) -> str:
        theirs = replace(self.GOOD, **reading)
        format_ = FORMATS["nii"]._replace(read=lambda _: theirs, ours=ours)
        return judge(Case({}, "", ["x"]), format_, Path())[0]

    def test_a_foreign_exception(self):
        def read(path):
            raise KeyError(path)

        assert self.fake(read) == "foreign exception"

    def test_a_size_that_memory_does_not_hold(self):
        def read(path):
            raise ResourceError(path, found="too little memory", allowed="less")

        assert self.fake(read) == "refused"

    def test_an_assumption_without_a_warning(self):
        assert self.fake(lambda _: self.volume()) == "equal"
        assert self.fake(lambda _: self.volume(), assumed=["x"]) == "no warning"

    def test_read_where_the_other_refuses(self):
        def refuse(path):
            raise Unreadable("x")

        format_ = FORMATS["nii"]._replace(read=refuse, ours=lambda _: self.volume())
        verdict = judge(Case({}, "", ["x"]), format_, Path())
        assert verdict.kind == "read what the other refuses"


def test_a_process_that_dies_or_hangs_is_a_finding(monkeypatch: pytest.MonkeyPatch):
    """The cases after it are judged in a new process."""
    monkeypatch.setattr(campaign, "_work", die_and_hang)
    monkeypatch.setattr(campaign, "HANG_SECONDS", 0.5)
    result = campaign.run([("nii", index) for index in range(6)], seed=0)["nii"]
    assert result.counts == {"equal": 4, "crash": 1, "hang": 1}
    kinds = [(failure["index"], failure["kind"]) for failure in result.failures]
    assert kinds == [(2, "crash"), (4, "hang")]
