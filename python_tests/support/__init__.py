# SPDX-License-Identifier: Apache-2.0
"""What tests, benchmarks and sceptical users share: the list of problems and how to compare."""

from __future__ import annotations
