# SPDX-License-Identifier: Apache-2.0
"""Published results on CHAOS T2-SPIR, quoted to stand beside measured ones.

Mean Dice over liver, both kidneys and spleen, EP1 unless it says EP2. They are hardly comparable
with each other: papers differ in the annotated scan, in which slices setting 2 drops and in the
checkpoint chosen. All start from ImageNet or COCO weights, train for 30 000 steps or more and use
all 20 patients.
"""

from __future__ import annotations

_PONET = "PONet's table (Neurocomputing 2025) as transcribed in a survey"
_CRAPNET = "CRAPNet's table (WACV 2023) as transcribed in its repository's notes"
_ADNET = "ADNet (Medical Image Analysis 2022)"

# Method, setting 1, setting 2, source.
_ROWS: tuple[tuple[str, float | None, float | None, str], ...] = (
    ("SSL-PANet", 0.632, 0.549, _CRAPNET),
    ("SSL-ALPNet", 0.788, 0.730, _PONET),
    ("ADNet++", 0.810, 0.737, _PONET),
    ("Q-Net", 0.810, 0.686, _PONET),
    ("CAT-Net", 0.752, 0.752, _PONET),
    ("RPT", 0.824, 0.795, _PONET),
    ("PONet", 0.860, 0.811, _PONET),
    ("SSL-ALPNet, EP2", 0.52, None, _ADNET),
    ("ADNet, EP2", 0.72, None, _ADNET),
)


def quoted(dataset: str) -> list[dict[str, str | float | None]]:
    """Published results on a data set of this name; none but for CHAOS."""
    if "chaos" not in dataset.casefold():
        return []
    names = ("method", "setting_1", "setting_2", "source")
    return [dict(zip(names, row, strict=True)) for row in _ROWS]
