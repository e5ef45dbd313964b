# SPDX-License-Identifier: Apache-2.0
"""Reading and writing weights: safetensors with a JSON header, and torchvision's ImageNet files.

Nothing is ever unpickled. The one format that contains a pickle, torchvision's ``.pth``, is read by
PyTorch's restricted reader, which knows tensors and refuses everything else.
"""

from __future__ import annotations

import functools
import hashlib
import http.client
import json
import os
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fastproto._files import atomic_write, cache_folder
from fastproto.errors import ArgumentError, CheckpointError, first_of, require
from fastproto.nn.encoders import ENCODERS, Encoder

IMAGENET_URL = "https://download.pytorch.org/models/"
HEADER = "fastproto"  # key of the JSON in a safetensors file of ours
_DOWNLOAD_TIMEOUT = 30.0  # seconds without an answer
_require = functools.partial(require, error=CheckpointError)


def load_encoder_weights(encoder: Encoder, weights: str | os.PathLike[str] | None) -> None:
    """Fill an encoder in place.

    None leaves it as it is; ``"imagenet"`` downloads torchvision's file for the encoder's ``name``
    once into the cache folder (``FASTPROTO_CACHE``, or ``~/.cache/fastproto``) and checks its
    checksum; a path reads ``.safetensors`` or ``.pth`` with torchvision's keys, with or without the
    classifier ``fc``.

    Raises:
        CheckpointError: The file is missing, damaged, unsafe, of another architecture or, for
            ``"imagenet"``, cannot be downloaded.
    """
    if weights is None:
        return
    path = _imagenet_file(encoder.name) if weights == "imagenet" else Path(weights)
    state = {key: value for key, value in _read_weights(path).items() if not key.startswith("fc.")}
    load_state(encoder, state, path)


def load_state(
    module: nn.Module, state: Mapping[str, Tensor], path: str | os.PathLike[str]
) -> None:
    """``load_state_dict``, saying which file is at fault and how.

    Floating tensors take the module's own floating type: a file may hold weights in half precision.
    Batch counters (``num_batches_tracked``) may be missing, as in old torchvision files.

    Raises:
        CheckpointError: Keys are missing or unknown, a shape differs, or numbers are not floating
            where the module's are.
    """
    expected = module.state_dict()
    label = getattr(module, "name", None)
    name = type(module).__name__ + (f"({label})" if label else "")
    fix = "The file belongs to another architecture; use the one that it was written for."
    missing = [key for key in expected if key not in state and "num_batches_tracked" not in key]
    unknown = [key for key in state if key not in expected]
    parts = [
        f"{len(keys)} {word} ({first_of(keys)})"
        for word, keys in (("missing", missing), ("unknown", unknown))
        if keys
    ]
    found = f"a state dict with {' and '.join(parts)} keys"
    _require(not parts, path, found=found, allowed=f"the keys of {name}", fix=fix)
    for key, value in state.items():
        wanted = expected[key]
        _require(
            (value.shape, value.is_floating_point()) == (wanted.shape, wanted.is_floating_point()),
            path,
            found=f"{key} of shape {list(value.shape)}, {value.dtype}",
            allowed=f"{list(wanted.shape)}, {wanted.dtype}, as in {name}",
            fix=fix,
        )
    module.load_state_dict(state, strict=False)


def write_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], header: Mapping[str, Any]
) -> None:
    """Write tensors and a JSON header to ``path``, atomically.

    The checksum of the tensors goes into the header, so that damage is noticed on reading.

    Raises:
        ArgumentError: The header is not JSON.
        OutputError: The file cannot be written.
    """
    tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    try:
        text = json.dumps({**header, "checksum": checksum(tensors)}, allow_nan=False)
    except (TypeError, ValueError) as error:
        found = f"a value that JSON cannot hold ({error})"
        raise ArgumentError("extra", found=found, allowed="JSON values") from error
    with atomic_write(path) as temporary:
        try:
            save_file(tensors, temporary, metadata={HEADER: text})
        except SafetensorError as error:
            # safetensors wraps the disk's errors in its own type, which atomic_write cannot know.
            raise OSError(str(error)) from error


def read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, on the CPU, and the header that :func:`write_safetensors` wrote.

    Raises:
        CheckpointError: No such file, not safetensors, not written by fastproto, or damaged.
    """
    tensors, metadata = _read_plain_safetensors(Path(path))
    try:
        header = json.loads(metadata.get(HEADER, ""))
    except ValueError:
        header = None
    found, allowed = "a safetensors file without fastproto's header", "a file that fastproto wrote"
    _require(isinstance(header, dict), path, found=found, allowed=allowed)
    _require(
        header.pop("checksum", None) == checksum(tensors),
        path,
        found="contents that do not match their checksum",
        allowed="an undamaged file",
        fix="Copy or write the file again.",
    )
    return tensors, header


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) over names, types, shapes and bytes of the tensors, whatever their order."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        value = tensors[key].detach().cpu().contiguous()
        digest.update(f"{key} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` or ``.pth`` file."""
    if path.suffix == ".safetensors":
        return _read_plain_safetensors(path)[0]
    suffix = f"the suffix {path.suffix!r}"
    allowed = ".safetensors, .pth or .pt"
    _require(path.suffix in (".pth", ".pt"), path, found=suffix, allowed=allowed)
    _require_file(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged or hostile zip or pickle raises has no common type
        raise CheckpointError(
            path,
            found=f"a file that PyTorch's restricted reader refuses ({type(error).__name__})",
            allowed="an undamaged file that holds tensors and nothing else",
            fix="Do not load it any other way: a pickle can run code. Use a safetensors file.",
        ) from error
    is_state = isinstance(state, dict) and all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    )
    found, allowed = "something else than a state dict", "a dict of names to tensors"
    _require(is_state, path, found=found, allowed=allowed)
    return dict(state)


def _read_plain_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    _require_file(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            # Copies: the file may be replaced or truncated while the tensors live.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            path,
            found=f"a file that is not safetensors, or damaged ({error})",
            allowed="an undamaged safetensors file",
            fix="Copy or write the file again; pickled checkpoints are never loaded.",
        ) from error


def _require_file(path: Path) -> None:
    found = "a folder" if path.is_dir() else "no such file"
    _require(path.is_file(), path, found=found, allowed="an existing weights file")


def _imagenet_file(name: str) -> Path:
    """The cached ImageNet file of an encoder, downloaded where it is not there yet, and checked."""
    filename = ENCODERS[name].imagenet
    if filename is None:
        able = ", ".join(each for each, entry in ENCODERS.items() if entry.imagenet is not None)
        found, allowed = f"'imagenet' for {name}", f"a file, or one of {able}"
        raise ArgumentError("weights", found=found, allowed=allowed)
    path = cache_folder() / filename
    if not path.exists():
        with atomic_write(path) as temporary:
            temporary.write_bytes(_checked(_download(IMAGENET_URL + filename, path), path))
    elif path.is_file():
        _checked(path.read_bytes(), path)
    return path


def _checked(content: bytes, path: Path) -> bytes:
    """``content``, whose SHA-256 must begin with the digits in the name of ``path``."""
    expected, digest = path.stem.rpartition("-")[2], hashlib.sha256(content).hexdigest()
    _require(
        digest.startswith(expected),
        path,
        found=f"contents with SHA-256 {digest[:8]}...",
        allowed=f"{expected}..., as in its name",
        fix=f"Delete it and download {IMAGENET_URL}{path.name} again.",
    )
    return content


def _download(url: str, path: Path) -> bytes:
    """The contents of ``url``; ``path`` is where a person without network may put the file."""
    try:
        with urllib.request.urlopen(url, timeout=_DOWNLOAD_TIMEOUT) as response:
            return response.read()
    except (OSError, http.client.HTTPException) as error:
        raise CheckpointError(
            "imagenet",
            found=f"that {url} cannot be downloaded ({error})",
            allowed="a reachable network, or the file in the cache",
            fix=f"Download {url} on another machine and put it at {path}; "
            "FASTPROTO_CACHE names another cache folder.",
        ) from error
