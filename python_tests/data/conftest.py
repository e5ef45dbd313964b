# SPDX-License-Identifier: Apache-2.0
"""What all tests of files share."""

from __future__ import annotations

import locale
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _kept_locale() -> Iterator[None]:
    """Writing DICOM through ITK leaves the locale "C" behind: open() would then read ASCII."""
    before = locale.setlocale(locale.LC_ALL)
    yield
    locale.setlocale(locale.LC_ALL, before)
