# SPDX-License-Identifier: Apache-2.0
"""One HTML file to look at: a training's curves, the results in many scans, scores by organ.

``pictures.py`` makes slices small, ``results.py``, ``scores.py`` and ``training.py`` collect what
is shown, ``plots.py`` draws, and ``page/`` is the page: template, style and script.
"""

from __future__ import annotations

from fastproto import _lazy

_HOMES = {
    "Results": "results",
    "read_results": "folder",
    "read_scores": "scores",
    "scores_contents": "scores",
    "training_contents": "training",
    "write_page": "page",
}

__all__ = list(_HOMES)

__getattr__ = _lazy.attributes(__name__, _HOMES)
