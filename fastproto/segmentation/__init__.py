# SPDX-License-Identifier: Apache-2.0
"""From one annotated scan to segmented scans: tasks, whole volumes, overlay pictures."""

from __future__ import annotations

from fastproto.segmentation.learn import register
from fastproto.segmentation.overlay import draw_overlay, write_overlay
from fastproto.segmentation.predict import Segmentation, segment_volume
from fastproto.segmentation.task import Organ, Task, load_model

__all__ = [
    "Organ",
    "Segmentation",
    "Task",
    "draw_overlay",
    "load_model",
    "register",
    "segment_volume",
    "write_overlay",
]
