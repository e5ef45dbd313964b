# SPDX-License-Identifier: Apache-2.0
"""What is taken where nobody says otherwise: each number once, everything else refers to it."""

from __future__ import annotations

from typing import Literal

TEMPERATURE = 0.05
"""t of the aggregation's softmax, no unit."""
EPS = 1e-6
"""Smallest norm of a centred feature or prototype."""
MASK_THRESHOLD = 0.5
"""tau: the share of a bottleneck cell that a class must exceed to give a prototype."""
ENCODER = "resnet34"
OUTPUT_STRIDE = 16
"""Pixels of a cell at the bottleneck, along each side."""
IGNORE = -100
"""Label of a pixel that counts nowhere: no loss, no prototype, no score."""
PLANE: Literal["axial", "coronal", "sagittal"] = "axial"
"""Slicing plane."""
POOR_DICE = 0.5
"""Expected Dice below which an organ was not learned."""
