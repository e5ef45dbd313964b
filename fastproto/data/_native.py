# SPDX-License-Identifier: Apache-2.0
"""Calling SimpleITK, whose native libraries print to stderr and put addresses into messages."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence file descriptor 2 while native code runs.

    ITK, MetaIO, GDCM and niftilib each write diagnostics there that no SimpleITK switch turns off.
    What they complain about is checked and reported by the caller, with the file's name.
    """
    try:
        saved = os.dup(2)
    except OSError:  # the process has no stderr
        yield
        return
    try:
        with open(os.devnull, "wb") as sink:
            os.dup2(sink.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def reason(error: RuntimeError) -> str:
    """The sentence of a SimpleITK error that says what was wrong, on one line."""
    text = re.split(r"ERROR: ", str(error))[-1]
    text = re.sub(r"^\w+\(0x[0-9a-f]+\): ", "", text)
    return " ".join(text.split())
