# SPDX-License-Identifier: Apache-2.0
"""Whether a run goes on, from what, and whether all that take part are of one mind."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastproto.errors import ArgumentError, CheckpointError, OutputError, require, warn
from fastproto.training.checkpoint import load_metadata
from fastproto.training.config import TrainConfig
from fastproto.training.ranks import Ranks


def saved_run(config: TrainConfig, folder: Path, resume: bool, ranks: int) -> dict[str, Any] | None:
    """The metadata of the checkpoint to carry on from; None to begin at step 0.

    Raises:
        OutputError: The folder holds a run and ``resume`` is off.
        CheckpointError: Nothing to resume, a damaged state, or one of another configuration.
    """
    state, written = folder / "state.safetensors", folder / "config.json"
    require(
        resume or not state.exists(),
        folder,
        found="a training run",
        allowed="a new or empty folder",
        fix="Resume it, or choose another output folder.",
        error=OutputError,
    )
    require(
        not resume or state.exists() or written.exists(),
        folder,
        found="no training run",
        allowed="the output folder of an earlier run",
        fix="Check the path, or start without resuming.",
        error=CheckpointError,
    )
    if not state.exists():
        return None
    saved = load_metadata(state)
    before = dict(saved["config"])
    former, episodes = saved.get("ranks", 1), ranks * config.batch
    if former != ranks:
        if former * before["batch"] == episodes:
            before["batch"] = config.batch
            change = f"a step still has {episodes} episodes, and rounds differently"
        else:
            change = f"a step has {episodes} episodes, where it had {former * before['batch']}"
        warn(state, f"this run was trained in {former} processes and goes on in {ranks}: {change}.")
    differences = config.differences(before)
    require(
        not differences,
        state,
        found=f"a run with another configuration ({'; '.join(differences)})",
        allowed="the configuration that the run began with",
        fix=f"Take it from {written}, or start a new run in another folder.",
        error=CheckpointError,
    )
    return saved


def require_same_slices(
    config: TrainConfig,
    folder: Path,
    slices: Mapping[str, Sequence[int]],
    saved: Mapping[str, Any] | None,
    ranks: Ranks,
) -> None:
    """Refuse a run on other slices than it began with, or than rank 0 has, or with other options.

    Raises:
        CheckpointError: The data set has changed since.
        ArgumentError: This rank was given something else than rank 0.
    """
    require(
        saved is None or saved["slices"] == slices,
        folder / "state.safetensors",
        found="a run on other cases or slices",
        allowed="the data set that the run began with",
        fix=f"Restore the data set in {config.data}, or start a new run in another folder.",
        error=CheckpointError,
    )
    if ranks.count == 1:
        return
    digest = hashlib.sha256(json.dumps(slices, sort_keys=True).encode()).hexdigest()
    if ranks.first:
        ranks.tell("run", json.dumps([config.to_dict(), digest]))
        return
    options, expected = json.loads(ranks.hear("run"))
    other = TrainConfig.from_dict(options)
    differences = config.differences(options) or other.differences(config.to_dict())
    if digest != expected:
        differences.append("other scans in " + ", ".join(config.data))
    require(
        not differences,
        f"process {ranks.number} of {ranks.count}",
        found=f"another run than that of process 0 ({'; '.join(differences)})",
        allowed="the same options, data and disk on every machine",
        error=ArgumentError,
    )
