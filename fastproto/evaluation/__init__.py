# SPDX-License-Identifier: Apache-2.0
"""Measuring segmentations: label maps against the truth, and methods by the field's protocols."""

from __future__ import annotations

from fastproto.evaluation.measure import METRICS, Report, evaluate_case, evaluate_folder

__all__ = ["METRICS", "Report", "evaluate_case", "evaluate_folder"]
