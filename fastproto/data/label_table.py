# SPDX-License-Identifier: Apache-2.0
"""What the values of a label map are called: tables of ``dataset.json`` and of the command line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastproto.errors import FastprotoError, LabelError, require, warn

MAX_LABEL = 2**16 - 1  # as in `read_label`
_IGNORE = "ignore"  # nnU-Net's name of it
_BACKGROUND = ("background", "bg", "clear", "unlabelled", "unlabeled", "none", "void", "outside")


@dataclass(frozen=True)
class LabelTable:
    """Names of label values.

    Attributes:
        names: Value -> name of every organ; values are above 0.
        ignore: The value of what is named "ignore": neither organ nor background, its voxels count
            nowhere. None where there is none.
    """

    names: dict[int, str]
    ignore: int | None = None


def read_json(file: Path, allowed: str, error: type[FastprotoError]) -> dict[str, Any]:
    """A JSON object in UTF-8, UTF-16 or UTF-32, with a byte-order mark or without."""
    require(file.is_file(), file, found="no such file", allowed=allowed, error=error)
    try:
        fields = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as problem:
        raise error(file, found=f"no readable JSON ({problem})", allowed=allowed) from problem
    found = f"JSON, but a {type(fields).__name__}"
    require(isinstance(fields, dict), file, found=found, allowed=allowed, error=error)
    return fields


def label_table(
    entries: Iterable[tuple[str, object]], subject: object, error: type[FastprotoError] = LabelError
) -> LabelTable:
    """The table that pairs make: a name and its value, or the value and its name.

    nnU-Net's regions, names of several values, are read as their parts: a value without a name of
    its own takes that of the region of this value alone, else it is ``label 3``. A warning says so.
    Background is left out.

    Raises:
        error: About ``subject``: a value or a name that occurs twice or cannot be used.
    """
    plain: dict[int, str] = {}
    regions: dict[str, list[int]] = {}
    ignore = None
    for key, entry in entries:
        name, value = (entry, key) if isinstance(entry, str) and key.isdecimal() else (key, entry)
        several, values, ignored = isinstance(value, list), _values(value), _is_ignore(name)
        usable = values and name.strip() and name not in {*plain.values(), *regions}
        usable = usable and (several or values[0] not in {*plain, ignore})
        if ignored:
            usable = usable and not several and values[0] > 0 and ignore is None
        require(
            usable,
            subject,
            found=f"value {value!r} for {name!r}",
            allowed=f"a name and another whole number from 0 to {MAX_LABEL} for every label",
            fix='Write {"0": "background", "1": "liver"}, {"background": 0, "liver": 1} or, as '
            "options, liver=1.",
            error=error,
        )
        if ignored:
            ignore = values[0]
        elif several:
            regions[name] = values
        else:
            plain[values[0]] = name
    names = _with_parts(plain, regions, ignore, subject)
    background = names.pop(0, "background")
    if background.strip().casefold() not in _BACKGROUND:
        text = f"value 0 is background, whatever it is called: {background} is no organ."
        warn(subject, text)
    return LabelTable(names, ignore)


def find_label(wanted: str | int, labels: Mapping[int, str]) -> int | None:
    """The value of a label given by value ("6" is one) or by name, in any case; None without."""
    text = str(wanted)
    exact = {name: value for value, name in labels.items()}
    exact |= {str(value): value for value in labels}
    alike = [value for value, name in labels.items() if name.casefold() == text.casefold()]
    return exact.get(text, alike[0] if len(alike) == 1 else None)


def find_labels(
    wanted: Iterable[str | int], labels: Mapping[int, str], subject: object
) -> list[int]:
    """The values of labels as `find_label` finds them, in their order.

    Raises:
        LabelError: About ``subject``: a label that is not there.
    """
    wanted = list(wanted)
    values = [find_label(label, labels) for label in wanted]
    unknown = [repr(label) for label, value in zip(wanted, values, strict=True) if value is None]
    require(
        not unknown,
        subject,
        found=f"no label {', '.join(unknown)}",
        allowed=", ".join(f"{value} {name}" for value, name in sorted(labels.items())),
        fix="What is called ignore is no organ." if "'ignore'" in unknown else None,
        error=LabelError,
    )
    return [value for value in values if value is not None]


def _values(value: object) -> list[int]:
    """Of a label or a region; none where one of them cannot be used."""
    values = []
    for each in value if isinstance(value, list) else [value]:
        number = each
        if isinstance(each, str) and each.isdecimal() and len(each) < 10:
            number = int(each)
        if type(number) is not int or not 0 <= number <= MAX_LABEL:
            return []
        values.append(number)
    return values


def _is_ignore(name: str) -> bool:
    return name.strip().casefold() == _IGNORE


def _with_parts(
    plain: dict[int, str], regions: dict[str, list[int]], ignore: int | None, subject: object
) -> dict[int, str]:
    """The names of single values and of those that only regions have."""
    names = dict(plain)
    alone = {values[0]: name for name, values in regions.items() if len(values) == 1}
    covered = {value for values in regions.values() for value in values}
    for value in sorted(covered - {*plain, 0, ignore}):
        names[value] = alone.get(value, f"label {value}")
    dropped = [name for name in regions if name not in names.values()]
    if dropped:
        parts = ", ".join(f"{value} {name}" for value, name in sorted(names.items()) if value)
        found = f"regions of several values ({', '.join(dropped)})"
        warn(subject, f"{found} are read as their parts: {parts}.")
    return names
