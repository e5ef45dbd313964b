# SPDX-License-Identifier: Apache-2.0
"""A folder of label maps, with the scans that they are of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fastproto._memory import enough_memory
from fastproto.data.dataset import labels_of
from fastproto.data.formats.reading import reading
from fastproto.data.scans import find_scans, scan_names
from fastproto.data.volume import READABLE, check_labels, read_label, read_volume
from fastproto.errors import DatasetError, FastprotoError, require, warn
from fastproto.evaluation.measure import find_label_maps
from fastproto.report.results import Results


def read_results(
    path: Path,
    scans: Path | None = None,
    *,
    names: Mapping[int, str] | None = None,
    dice: Mapping[int, float | None] | None = None,
    series: str | None = None,
) -> Results:
    """Take up the label maps that ``path`` stands for.

    Args:
        path: A label map, or a folder of them, as `segment` writes them.
        scans: What they are of, found by name: what was given to `segment`. None shows no scan.
        names: Label value -> name; None takes those of a ``dataset.json``, or else ``label 3``.
        dice: Label value -> predicted Dice.
        series: SeriesInstanceUID, where a DICOM folder holds several series.

    Raises:
        DatasetError: There is no label map.
        FastprotoError: No label map can be read. One of several is named in the results.
    """
    with reading(path):
        maps, table = find_label_maps(path)
    maps = {
        name: file for name, file in maps.items() if name.removesuffix("-uncertainty") not in maps
        or not name.endswith("-uncertainty")
    }  # fmt: skip
    found, allowed = "no label map", f"files ending in {', '.join(READABLE)}, a run, or a JSON"
    require(maps, path, found=found, allowed=allowed, error=DatasetError)
    files = _scans_of(path, maps, scans, series)
    if names is None:
        table = table or labels_of(next(iter(maps.values())))
        if table is None:
            warn(path, "organs are shown by their numbers: --labels or --task names them.")
        names = table.names if table else _values_in(maps)
    results = Results(names, len(maps), dice)
    first: FastprotoError | None = None
    for name, file in maps.items():
        try:
            with enough_memory(file):
                scan = read_volume(files[name], series=series) if name in files else None
                results.add(name, read_label(file, like=scan), scan)
        except FastprotoError as error:
            first = first or error
            results.fail(name, str(error))
    if first and not results.findings:
        raise first
    return results


def _scans_of(
    path: Path, maps: Mapping[str, Path], scans: Path | None, series: str | None
) -> dict[str, Path]:
    """The scan of each label map, by its name."""
    if scans is None:
        warn(path, "without --scans the report shows the organs alone.")
        return {}
    found = find_scans(scans, series=series, output=path)
    if len(found) == len(maps) == 1:  # whatever they are called
        return dict(zip(maps, found, strict=True))
    files = dict(zip(scan_names(scans, found), found, strict=True))
    missing = [name for name in maps if name not in files]
    require(
        len(missing) < len(maps),
        scans,
        found=lambda: f"no scan called as a label map in {path} ({missing[0]})",
        allowed="the scans that were segmented",
        error=DatasetError,
    )
    if missing:
        warn(scans, f"no scan for {', '.join(missing)}: the report shows the organs alone.")
    return files


def _values_in(maps: Mapping[str, Path]) -> dict[int, str]:
    """A name for every label value that occurs in what can be read."""
    values: set[int] = set()
    for file in maps.values():
        try:
            values.update(check_labels(read_label(file), needed=False))
        except FastprotoError:
            continue  # it is named where its contents are taken up
    return {value: f"label {value}" for value in sorted(values)}
