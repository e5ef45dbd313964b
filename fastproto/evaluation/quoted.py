# SPDX-License-Identifier: Apache-2.0
"""Published results on CHAOS T2-SPIR, quoted to stand beside measured ones.

Mean Dice over liver, both kidneys and spleen by EP1, as others tell it. The papers differ in the
annotated scan, in which slices setting 2 drops and in the checkpoint chosen, so their numbers are
hardly comparable even with each other. All start from ImageNet or COCO weights, train for 30 000
steps or more and use all 20 patients.
"""

from __future__ import annotations

_PONET = "PONet's table (Neurocomputing 2025) as transcribed in a survey"
_CRAPNET = "CRAPNet's table (WACV 2023) as transcribed by others"

# Method, setting 1, setting 2, source.
_ROWS: tuple[tuple[str, float, float, str], ...] = (
    ("SSL-PANet", 0.632, 0.549, _CRAPNET),
    ("SSL-ALPNet", 0.788, 0.730, _PONET),
    ("ADNet++", 0.810, 0.737, _PONET),
    ("Q-Net", 0.810, 0.686, _PONET),
    ("CAT-Net", 0.752, 0.752, _PONET),
    ("RPT", 0.824, 0.795, _PONET),
    ("PONet", 0.860, 0.811, _PONET),
)


def quoted(dataset: str) -> list[dict[str, str | float]]:
    """Published results on a data set of this name; none but for CHAOS."""
    if "chaos" not in dataset.casefold():
        return []
    names = ("method", "setting_1", "setting_2", "source")
    return [dict(zip(names, row, strict=True)) for row in _ROWS]
