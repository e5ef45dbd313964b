# SPDX-License-Identifier: Apache-2.0
"""Common organs: the colour and the SNOMED CT code that their results have in other programs.

The codes are those of DICOM's context groups (PS3.16), as pydicom lists them; a test compares. What
the table does not know has no code of its own: a wrong one would be worse.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import NamedTuple, TypeAlias

Colour: TypeAlias = "tuple[int, ...]"  # red, green and blue, 0 to 255

# Okabe and Ito's colours, which colour-blind readers can tell apart, with a violet for their dark
# blue, which on bone looks as the light one does elsewhere; then lighter and darker ones.
_HEX = "E69F00 56B4E9 009E73 F0E442 D55E00 CC79A7 7828C8 B2DF8A FB9A99 CAB2D6 A65628 8DD3C7"
COLOURS: tuple[Colour, ...] = tuple(tuple(bytes.fromhex(digits)) for digits in _HEX.split())
_SHADE, _TINT = 0.6, 0.5  # what is left of an organ's colour, of a pair: darker right, lighter left


class Code(NamedTuple):
    """A coded entry of SNOMED CT, as DICOM and 3D Slicer write it."""

    value: str
    meaning: str


class Organ(NamedTuple):
    """What other programs are told of an organ.

    Attributes:
        category: What kind of thing it is.
        type: The organ itself.
        side: Left or right, of a pair; else None.
        colour: None where the table does not know it.
        shared: That colour before a side made it lighter or darker.
    """

    category: Code
    type: Code
    side: Code | None
    colour: Colour | None
    shared: Colour | None


_ANATOMY = Code("123037004", "Anatomical Structure")
_ABNORMAL = Code("49755003", "Morphologically Abnormal Structure")
_TISSUE = Code("85756007", "Tissue")
_SIDES = {"left": Code("7771000", "Left"), "right": Code("24028007", "Right")}
_SIDE_WORDS = {"left": "left", "l": "left", "lt": "left", "right": "right", "r": "right",
               "rt": "right"}  # fmt: skip
_NUMBER = re.compile(r"[ctls]?\d{1,2}")  # of a vertebra or a rib, or of the second of two cysts

# Code, colour, how many there are (1, or 2 for one on each side), names: the meaning first.
_TABLE = """
# Abdomen and pelvis
10200004  E69F00 1 Liver
78961009  56B4E9 1 Spleen
64033007  009E73 2 Kidney
28231008  F0E442 1 Gallbladder; gall bladder
15776009  D55E00 1 Pancreas
69695003  CC79A7 1 Stomach
15825003  7828C8 1 Aorta; a aorta
64131007  B2DF8A 1 Inferior vena cava; ivc; postcava; v venacava i
32849002  FB9A99 1 Esophagus; oesophagus
23451007  CAB2D6 2 Adrenal gland; adrenal; suprarenal gland; glnd adrenal
38848004  A65628 1 Duodenum
89837001  8DD3C7 1 Bladder; urinary bladder
71854001  FF4F4F 1 Colon
30315005  3C8CFF 1 Small intestine; small bowel; bowel small
14742008  46DC5A 1 Large intestine; large bowel; bowel large
21306003  FFD28C 1 Jejunum
34516001  B4783C 1 Ileum
60184004  FF6EFF 1 Sigmoid colon; sigmoid
34402009  00C8C8 1 Rectum
53505006  C8C800 1 Anus
41216001  B4325A 1 Prostate; prostate gland
64739004  F5C8E6 2 Seminal vesicle; seminal ves
40689003  6478B4 2 Testis; testicle
18911002  A0FFB4 1 Penis
35039007  E69F00 1 Uterus
15497006  56B4E9 2 Ovary
76784001  009E73 1 Vagina
87953007  F0E442 2 Ureter
13648007  D55E00 1 Urethra
32764006  CC79A7 1 Portal vein
8993003   7828C8 1 Hepatic vein
35819009  B2DF8A 1 Splenic vein
22083002  FB9A99 1 Splenic artery
57850000  CAB2D6 1 Celiac axis; celiac trunk; celiac artery; coeliac trunk
42258001  A65628 1 Superior mesenteric artery; sma
10293006  8DD3C7 2 Iliac artery
244411005 FF4F4F 2 Iliac vein; iliac vena
73634005  3C8CFF 2 Common iliac artery
46027005  46DC5A 2 Common iliac vein
# Head and neck
119238007 E69F00 1 Brain stem; brainstem
2748008   56B4E9 1 Spinal cord; cord; medulla spinalis
91609006  7828C8 1 Mandible; mandibula; lower jaw; bone mandible
45289007  F0E442 2 Parotid gland; parotid
54019009  D55E00 2 Submandibular gland; submandibular; submand; glnd submand
18234004  CC79A7 2 Optic nerve; opticnrv; optic nrv
244453006 009E73 1 Optic chiasm; chiasm; opticchiasm; chiasma
81745001  B2DF8A 2 Eye; eyeball; globe
78076003  FB9A99 2 Lens; eye lens
13561001  CAB2D6 2 Lacrimal gland; lacrimal; glnd lacrimal
22945000  A65628 2 Inner ear
4596009   8DD3C7 1 Larynx
54066008  FF4F4F 1 Pharynx
74262004  3C8CFF 1 Oral cavity; cavity oral
21974007  46DC5A 1 Tongue
69748006  FFD28C 1 Thyroid; thyroid gland; glnd thyroid
1307006   B4783C 1 Glottis; glottic larynx
119255006 FF6EFF 1 Supraglottis; supraglottic larynx
56329008  00C8C8 1 Pituitary; pituitary gland; hypophysis
61853006  C8C800 1 Spinal canal
49460000  B4325A 1 Soft palate
48477009  F5C8E6 1 Lip
70925003  6478B4 2 Maxilla
53620006  A0FFB4 2 Temporomandibular joint; tmj
69105007  E69F00 2 Carotid artery; carotid
32062004  56B4E9 2 Common carotid artery
12123001  009E73 2 Internal jugular vein
36582005  F0E442 2 Brachial plexus
# Brain
12738006  FF4F4F 1 Brain
113305005 3C8CFF 1 Cerebellum
5366008   46DC5A 2 Hippocampus
42695009  FFD28C 2 Thalamus
4958002   B4783C 2 Amygdala
11000004  FF6EFF 2 Caudate nucleus; caudate
89278009  00C8C8 2 Putamen
14738005  C8C800 2 Globus pallidus; pallidum
427667007 B4325A 2 Nucleus accumbens; accumbens
66720007  F5C8E6 2 Lateral ventricle
49841001  6478B4 1 Third ventricle; 3rd ventricle
35918002  A0FFB4 1 Fourth ventricle; 4th ventricle
88442005  E69F00 1 Corpus callosum
36169008  56B4E9 2 Insula
70007007  009E73 2 Substantia nigra
78277001  F0E442 2 Temporal lobe
83251001  D55E00 2 Frontal lobe
16630005  CC79A7 2 Parietal lobe
31065004  7828C8 2 Occipital lobe
372073000 B2DF8A 2 Cerebral hemisphere
68523003  FB9A99 2 Cerebral white matter
389081007 CAB2D6 1 Gray matter; grey matter
389080008 A65628 1 White matter
65216001  8DD3C7 1 Cerebrospinal fluid; csf
# Thorax
39607008  46DC5A 2 Lung
80891009  FFD28C 1 Heart
44567001  B4783C 1 Trachea
955009    FF6EFF 2 Bronchus
9875009   00C8C8 1 Thymus
76752008  C8C800 2 Breast
48345005  B4325A 1 Superior vena cava; svc
81040000  F5C8E6 2 Pulmonary artery
122972007 6478B4 1 Pulmonary vein
45341000  A0FFB4 1 Pulmonary trunk
36765005  E69F00 2 Subclavian artery
12691009  56B4E9 1 Innominate artery; brachiocephalic trunk
8887007   009E73 2 Innominate vein; brachiocephalic vein
45653009  F0E442 2 Upper lobe of lung; lung upper lobe
90572001  D55E00 2 Lower lobe of lung; lung lower lobe
72481006  CC79A7 1 Middle lobe of right lung; lung middle lobe right; right lung middle lobe
54247002  7828C8 1 Ascending aorta
28700002  B2DF8A 1 Carina
# Heart
87878005  00C8C8 1 Left ventricle; lv; heart ventricle left
53085002  C8C800 1 Right ventricle; rv; heart ventricle right
49848007  B4325A 1 Left ventricle myocardium; lv myocardium
82471001  F5C8E6 1 Left atrium; la; heart atrium left
73829009  6478B4 1 Right atrium; ra; heart atrium right
76848001  A0FFB4 1 Pericardium
# Bones
71341001  B4783C 2 Femur
2812003   FF6EFF 2 Femoral head; femur head; head of femur
54735007  00C8C8 1 Sacrum
51282000  C8C800 1 Vertebra; vertebrae
421060004 B4325A 1 Vertebral column; spine; spinal column
118645006 F5C8E6 1 Bone structure of pelvis; pelvic bone; bony pelvis; bone pelvis
29836001  6478B4 2 Hip
22356005  A0FFB4 2 Ilium
113197003 E69F00 2 Rib
50016007  56B4E9 1 Costal cartilage
56873002  009E73 1 Sternum
51299004  F0E442 2 Clavicle; clavicula
79601000  D55E00 2 Scapula
85050009  CC79A7 2 Humerus
62413002  7828C8 2 Radius
23416004  B2DF8A 2 Ulna
12611008  FB9A99 2 Tibia
87342007  CAB2D6 2 Fibula
64234005  A65628 2 Patella
89546000  8DD3C7 1 Skull
3138006   FF4F4F 1 Bone
# Tissues
91727004  FB9A99 1 Muscle
55603005  CAB2D6 1 Fat; adipose tissue
39937001  A65628 1 Skin
59441001  8DD3C7 1 Lymph node
# Abnormal
108369006 FF4F4F 1 Neoplasm; tumor; tumour
52988006  3C8CFF 1 Lesion
27925004  46DC5A 1 Nodule
367643001 FFD28C 1 Cyst
79654002  B4783C 1 Edema; oedema
6574001   FF6EFF 1 Necrosis
"""


def organ(name: str) -> Organ:
    """What the table knows of an organ, by its name as people write it.

    Case, underscores and the place of "left" or "l" do not matter: "Left kidney", "kidney_left" and
    "lkidney" are one. A tumour, lesion or cyst of something is known by its last word. All else is
    tissue without a colour.
    """
    words = _words(name)
    found, side = _find(words), None
    if found is None:
        sides = {_SIDE_WORDS[word] for word in words if word in _SIDE_WORDS}
        rest = [word for word in words if word not in _SIDE_WORDS]
        if not sides and rest and rest[0][0] in "lr" and _find(rest) is None:  # "lkidney"
            sides, rest = {_SIDE_WORDS[rest[0][0]]}, [rest[0][1:], *rest[1:]]
        found = _find(rest)
        side = sides.pop() if len(sides) == 1 else None
        if found and not found.pair:
            # The left of a liver is a part of it that the table does not have.
            found, side = (found if found.category is _ABNORMAL else None), None
    if found is None:
        return Organ(_TISSUE, _TISSUE, None, None, None)
    colour = found.colour
    if side == "right":
        colour = tuple(int(level * _SHADE) for level in colour)
    elif side == "left":
        colour = tuple(int(255 - (255 - level) * _TINT) for level in colour)
    code = _SIDES[side] if side else None
    return Organ(found.category, found.code, code, colour, found.colour)


def organ_colours(names: Mapping[int, str]) -> dict[int, Colour]:
    """A colour for every label value, each once while there are enough.

    Organs of the table have their own, unless another of these has it already; all others get
    the next free one of ``COLOURS``, which is none that a left and a right organ share.
    """
    colours: dict[int, Colour] = {}
    taken: set[Colour | None] = set()
    for value, name in names.items():
        found = organ(name)
        if found.colour is not None and found.colour not in colours.values():
            colours[value] = found.colour
            taken |= {found.colour, found.shared}
    free = [colour for colour in COLOURS if colour not in taken] or [*COLOURS]
    others = [value for value in names if value not in colours]
    for index, value in enumerate(others):
        colours[value] = free[index % len(free)]
    return {value: colours[value] for value in names}


class _Row(NamedTuple):
    code: Code
    colour: Colour
    pair: bool
    category: Code


@cache
def _rows() -> dict[str, _Row]:
    """The table by name."""
    rows: dict[str, _Row] = {}
    category = _ANATOMY
    for line in _TABLE.strip().splitlines():
        if line.startswith("#"):
            category = _ABNORMAL if line == "# Abnormal" else _ANATOMY
            continue
        code, digits, count, rest = line.split(None, 3)
        meaning, *others = rest.split("; ")
        row = _Row(Code(code, meaning), tuple(bytes.fromhex(digits)), count == "2", category)
        for name in (meaning, *others):
            rows[" ".join(_words(name))] = row
    return rows


def _words(name: str) -> list[str]:
    """The words of a name in lower case; a capital within one begins the next."""
    return re.findall(r"[^\W_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower())


def _find(words: list[str]) -> _Row | None:
    """What these words name: all of them, or in the plural, without a number, or a tumour."""
    rows = _rows()
    for kept in (words, [word for word in words if not _NUMBER.fullmatch(word)]):
        text = " ".join(kept)
        if row := rows.get(text) or rows.get(text.removesuffix("s")):
            return row
    last = rows.get(words[-1].removesuffix("s")) if words else None
    return last if last and last.category is _ABNORMAL else None
