# SPDX-License-Identifier: Apache-2.0
"""What fastproto raises of its own: input it cannot use, output it cannot write, failed trainings.

Every message names the file or argument, what was found, what is allowed and what to do about it.
The command line prints the message without a traceback and exits with status 2.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice
from typing import Any


class FastprotoError(Exception):
    """Anything below.

    Args:
        subject: The file or argument at fault, e.g. ``"scan.nii.gz"`` or ``"temperature"``.
        found: What was found, e.g. ``"-0.1"`` or ``"a NaN voxel at (3, 4, 5)"``.
        allowed: What is allowed, e.g. ``"a number above 0"``.
        fix: What to do about it, a full sentence; None where ``allowed`` says it all.
    """

    def __init__(self, subject: object, *, found: str, allowed: str, fix: str | None = None):
        self.subject = str(subject)
        self.found = found
        self.allowed = allowed
        self.fix = fix
        super().__init__(
            f"{subject}: found {found}; allowed: {allowed}." + (f" {fix}" if fix else "")
        )

    def __reduce__(self) -> tuple[object, tuple[()]]:
        """For pickle: an error may come from another process."""
        again = partial(
            type(self), self.subject, found=self.found, allowed=self.allowed, fix=self.fix
        )
        return again, ()


class FastprotoWarning(UserWarning):
    """Something read, mended or left out that the user should know; the result can be used."""


def warn(subject: object, text: object) -> None:
    """Tell the user what was found in a file or argument and what was done about it."""
    warnings.warn(f"{subject}: {text}", FastprotoWarning, stacklevel=3)


class InputError(FastprotoError, ValueError):
    """Something the caller handed in cannot be used."""


class ArgumentError(InputError):
    """An argument of a function, an option of the command line or an environment variable."""


class VolumeError(InputError):
    """An image file or DICOM series that is damaged or not a 3-D scalar volume."""


class GeometryError(InputError):
    """Spacing, direction or origin that cannot be used, or two grids that should be one."""


class LabelError(InputError):
    """A label map with unusable values: empty, fractional, negative or unknown labels."""


class DatasetError(InputError):
    """A dataset folder whose layout or ``dataset.json`` cannot be used."""


class CheckpointError(InputError):
    """A weights, task or training-state file that is damaged, unsafe or of another model."""


class OutputError(FastprotoError):
    """A result that cannot be written: no permission, no space, or a folder in the way."""


class ResourceError(FastprotoError):
    """Something that takes more memory than the machine, or its GPU, has."""


class TrainingError(FastprotoError):
    """A training run that cannot go on, e.g. because the loss is no longer finite."""


def require(
    condition: object,
    subject: object,
    *,
    found: str | Callable[[], str],
    allowed: str,
    fix: str | None = None,
    error: type[FastprotoError] = ArgumentError,
) -> None:
    """Raise ``error`` unless ``condition`` is true; the other arguments are those of the error.

    ``found`` may be a function, where the text costs something or exists only after a failure.
    """
    if not condition:
        raise error(subject, found=found() if callable(found) else found, allowed=allowed, fix=fix)


def first_of(names: Iterable[object], most: int = 3) -> str:
    """A message's list of names, of which it spells out so many."""
    shown = list(map(str, islice(names, most + 1)))
    return ", ".join(shown[:most]) + ", ..." * (len(shown) > most)


def import_extra(extra: str, *names: str, otherwise: str = "") -> Any:
    """The first of the modules that an extra brings, all of which are imported.

    Args:
        extra: As pip has it.
        names: Of the modules.
        otherwise: What else can be done where one is missing, a full sentence.

    Raises:
        ArgumentError: One cannot be imported; it says what to install.
    """
    try:
        first, *_ = map(importlib.import_module, names)
    except ImportError as error:
        raise ArgumentError(
            extra,
            found=f"that a package is missing ({error})",
            allowed=", ".join(names),
            fix=f"Run: pip install 'fastproto[{extra}]'. {otherwise}".rstrip(),
        ) from error
    return first
