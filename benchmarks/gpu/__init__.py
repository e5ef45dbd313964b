# SPDX-License-Identifier: Apache-2.0
"""The GPU suite, a program: ``python benchmarks/run_gpu.py``. Nothing here is a pytest file."""

from __future__ import annotations
