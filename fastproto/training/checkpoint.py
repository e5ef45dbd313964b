# SPDX-License-Identifier: Apache-2.0
"""The state of a run in one file: weights, Adam's moments, step and random state.

One safetensors file with JSON in its header, replaced in one step: whenever the process dies, the
file on disk is a whole checkpoint, the last or the one before. Nothing is ever unpickled.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastproto.errors import CheckpointError, require
from fastproto.nn.weights import load_state as load_weights
from fastproto.nn.weights import read_safetensors, write_safetensors

_KIND = "training state"


def save_state(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    metadata: dict[str, Any],
) -> None:
    """Write the state of a run; an existing file survives any failure.

    Args:
        path: File to write.
        model: Its parameters and buffers are saved under ``model.``.
        optimizer: Its tensors are saved under ``optimizer.<parameter of model>.``.
        metadata: JSON-able: the step, the configuration, ...

    Raises:
        OutputError: The file cannot be written.
    """
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{key}"] = value
    tensors["rng.cpu"] = torch.get_rng_state()
    if torch.cuda.is_initialized():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    write_safetensors(path, tensors, {"kind": _KIND, "metadata": metadata})


def load_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What ``save_state`` was given as ``metadata``.

    Raises:
        CheckpointError: The file is missing, damaged or no training state.
    """
    return _read(path)[0]


def load_state(
    path: str | os.PathLike[str], model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Put a saved state into ``model``, ``optimizer`` and torch's random generators.

    Returns:
        The metadata.

    Raises:
        CheckpointError: The file is missing, damaged, no training state or of another model.
    """
    metadata, tensors = _read(path)
    load_weights(model, _below("model.", tensors), path)
    for name, parameter in model.named_parameters():
        if moments := _below(f"optimizer.{name}.", tensors):
            # Laid out in memory like the parameter: the fused optimiser walks both side by side.
            optimizer.state[parameter] = {
                key: torch.empty_like(parameter).copy_(value)
                if value.shape == parameter.shape
                else value.to(parameter.device)
                for key, value in moments.items()
            }
    torch.set_rng_state(tensors["rng.cpu"])
    if "rng.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng.cuda"])
    return metadata


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensors, header = read_safetensors(Path(path))
    require(
        header.get("kind") == _KIND,
        path,
        found=f"a file of kind {header.get('kind')!r}",
        allowed=f"a {_KIND}",
        fix="Give the folder of a training run, with its state.safetensors.",
        error=CheckpointError,
    )
    return header["metadata"], tensors
