# SPDX-License-Identifier: Apache-2.0
"""Measuring segmentations: label maps against the truth, and methods by the field's protocols.

Names are imported on first use, so that reading the metrics' titles costs no ``import numpy``.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "METRICS": "metrics",
    "Report": "report",
    "evaluate_case": "measure",
    "evaluate_folder": "measure",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
