# SPDX-License-Identifier: Apache-2.0
"""The table of organs: codes as pydicom has them, names as people write them, colours."""

from __future__ import annotations

import re

import pytest
from pydicom.sr.codedict import codes

from fastproto.data import anatomy
from fastproto.data.anatomy import COLOURS, organ, organ_colours


def test_every_code_is_in_pydicoms_dictionary_with_its_meaning():
    known: dict[str, set[str]] = {}
    for keyword in codes.SCT.dir():
        code = getattr(codes.SCT, keyword)
        known.setdefault(code.value, set()).update((_letters(keyword), _letters(code.meaning)))
    rows = anatomy._rows().values()
    used = {row.code for row in rows} | set(anatomy._SIDES.values()) | {anatomy._TISSUE}
    assert len(used) > 120
    for code in used | {anatomy._ABNORMAL}:
        meanings = known[code.value]
        assert any(_letters(code.meaning) in meaning for meaning in meanings), code
    # DICOM called it an anatomical structure before; 3D Slicer still does.
    assert _letters(codes.SCT.BodyStructure.meaning).startswith("bodystructure")
    assert codes.SCT.BodyStructure.value == anatomy._ANATOMY.value


def _letters(text: str) -> str:
    return re.sub("[^a-z]", "", text.lower())


def test_each_structure_has_one_row():
    rows = [line for line in anatomy._TABLE.strip().splitlines() if line[0] != "#"]
    assert len({line.split()[0] for line in rows}) == len(rows)
    names = [
        " ".join(anatomy._words(name))
        for line in rows
        for name in line.split(None, 3)[3].split("; ")
    ]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    "name",
    ["left kidney", "Left Kidney", "kidney_left", "Kidney_L", "KidneyL", "lkidney", "L-kidney"],
)
def test_a_left_organ(name: str):
    found = organ(name)
    assert found.type == ("64033007", "Kidney")
    assert found.side == ("7771000", "Left")
    assert found.category.value == "123037004"


def test_left_and_right_differ_in_side_and_colour():
    left, right = organ("kidney_left"), organ("rkidney")
    assert left.type == right.type
    assert right.side == ("24028007", "Right")
    base = organ("kidney").colour
    assert sum(left.colour) > sum(base) + 100 > sum(right.colour) + 150  # also in a picture


@pytest.mark.parametrize(
    ("name", "meaning", "side"),
    [
        ("Lungs", "Lung", None),
        ("OpticNrv_L", "Optic nerve", "Left"),
        ("Glnd_Submand_R", "Submandibular gland", "Right"),
        ("vertebrae_L1", "Vertebra", None),
        ("rib_left_5", "Rib", "Left"),
        ("Brainstem", "Brain stem", None),
        ("left ventricle", "Left ventricle", None),
        ("heart_atrium_right", "Right atrium", None),
        ("left lateral ventricle", "Lateral ventricle", "Left"),
        ("spleen 2", "Spleen", None),
        ("liver", "Liver", None),
        ("lens", "Lens", None),
        ("Liver tumour", "Neoplasm", None),
        ("kidney_cyst_left", "Cyst", None),
    ],
)
def test_names(name: str, meaning: str, side: str | None):
    found = organ(name)
    assert found.type.meaning == meaning
    assert (found.side and found.side.meaning) == side


@pytest.mark.parametrize(
    "name", ["", "left", "left liver", "rliver", "prostate/uterus", "organ 3", "PTV"]
)
def test_what_the_table_does_not_know_has_no_code_of_its_own(name: str):
    found = organ(name)
    assert found.type == found.category == ("85756007", "Tissue")
    assert found.side is None
    assert found.colour is None


def test_a_tumour_is_no_anatomical_structure():
    assert organ("tumor").category == ("49755003", "Morphologically Abnormal Structure")


def test_colours_are_fixed_and_each_occurs_once():
    liver, spleen = organ("liver").colour, organ("spleen").colour
    assert liver == COLOURS[0]
    assert organ_colours({9: "thing", 2: "Liver", 5: "other"}) == {
        9: COLOURS[1], 2: liver, 5: COLOURS[2],
    }  # fmt: skip
    assert organ_colours({1: "spleen"}) == {1: spleen}
    assert list(organ_colours({1: "a", 2: "b"}).values()) == [*COLOURS[:2]]
    # Two of one name, and organs that share a colour of the table.
    names = {1: "liver", 2: "liver 2", 3: "brain stem"}
    assert len(set(organ_colours(names).values())) == 3
    # The green of both kidneys is free, and yet too near to them.
    names = {value: f"thing {value}" for value in range(9)}
    names |= {1: "left kidney", 2: "right kidney"}
    assert organ("kidney").colour not in organ_colours(names).values()


def test_more_organs_than_colours():
    colours = organ_colours({value: f"thing {value}" for value in range(1, 30)})
    assert [*colours] == [*range(1, 30)]
    assert set(colours.values()) == set(COLOURS)
