# SPDX-License-Identifier: Apache-2.0
"""Measuring segmentations: label maps against the truth, and methods by the field's protocols.

Names are imported on first use, so that reading the metrics' titles costs no ``import numpy``.
"""

from __future__ import annotations

from fastproto import _lazy

_HOMES = {
    "METRICS": "metrics",
    "Report": "report",
    "evaluate_case": "measure",
    "evaluate_folder": "measure",
}

__all__ = list(_HOMES)

__getattr__ = _lazy.attributes(__name__, _HOMES)
