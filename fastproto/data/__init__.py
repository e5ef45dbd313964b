# SPDX-License-Identifier: Apache-2.0
"""Volumes, datasets and the way from a volume to the network's slices and back."""

from __future__ import annotations

from fastproto.data.dataset import Case, Dataset, open_dataset
from fastproto.data.preprocessing import PreparedVolume, Preprocessing
from fastproto.data.volume import (
    Volume,
    check_labels,
    check_same_grid,
    read_label,
    read_volume,
    write_label,
    write_volume,
)

__all__ = [
    "Case",
    "Dataset",
    "PreparedVolume",
    "Preprocessing",
    "Volume",
    "check_labels",
    "check_same_grid",
    "open_dataset",
    "read_label",
    "read_volume",
    "write_label",
    "write_volume",
]
