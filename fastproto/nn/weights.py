# SPDX-License-Identifier: Apache-2.0
"""Reading and writing weights: safetensors with a JSON header, and torchvision's ImageNet files.

Nothing is ever unpickled. The one format that contains a pickle, torchvision's ``.pth``, is read by
PyTorch's restricted reader, which knows tensors and refuses everything else.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fastproto._files import atomic_write, cache_folder
from fastproto.errors import ArgumentError, CheckpointError
from fastproto.nn.encoders import ENCODERS, Encoder

IMAGENET_URL = "https://download.pytorch.org/models/"
_HEADER = "fastproto"
_DOWNLOAD_TIMEOUT = 30.0  # seconds without an answer
_BLOCK = 2**20


def load_encoder_weights(encoder: Encoder, weights: str | os.PathLike[str] | None) -> None:
    """Fill an encoder in place.

    Args:
        encoder: The encoder; its ``name`` chooses the ImageNet file.
        weights: None leaves the encoder as it is; ``"imagenet"`` downloads torchvision's file once
            into the cache folder (``FASTPROTO_CACHE``, or ``~/.cache/fastproto``) and checks its
            checksum; a path reads ``.safetensors`` or ``.pth`` with torchvision's keys, with or
            without the classifier ``fc``.

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
    fix = "The file belongs to another architecture; use the one that it was written for."
    missing = [
        key for key in expected if key not in state and not key.endswith("num_batches_tracked")
    ]
    unknown = [key for key in state if key not in expected]
    if missing or unknown:
        parts = [
            f"{len(keys)} {word} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
            for word, keys in (("missing", missing), ("unknown", unknown))
            if keys
        ]
        found = f"a state dict with {' and '.join(parts)} keys"
        raise CheckpointError(
            path, found=found, allowed=f"the keys of {_describe(module)}", fix=fix
        )
    for key, value in state.items():
        wanted = expected[key]
        if value.shape != wanted.shape or value.is_floating_point() != wanted.is_floating_point():
            raise CheckpointError(
                path,
                found=f"{key} of shape {list(value.shape)}, {value.dtype}",
                allowed=f"{list(wanted.shape)}, {wanted.dtype}, as in {_describe(module)}",
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
        raise ArgumentError(
            "extra", found=f"a value that JSON cannot hold ({error})", allowed="JSON values"
        ) from error
    with atomic_write(path) as temporary:
        try:
            save_file(tensors, temporary, metadata={_HEADER: text})
        except SafetensorError as error:
            # safetensors wraps the disk's errors in its own type, which atomic_write cannot know.
            raise OSError(str(error)) from error


def read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`write_safetensors` wrote.

    Returns:
        The tensors, on the CPU, and the header.

    Raises:
        CheckpointError: No such file, not safetensors, not written by fastproto, or damaged.
    """
    tensors, metadata = _read_plain_safetensors(Path(path))
    header = _parse_header(metadata.get(_HEADER, ""))
    if header is None:
        raise CheckpointError(
            path,
            found="a safetensors file without fastproto's header",
            allowed="a file that fastproto wrote",
        )
    if header.pop("checksum", None) != checksum(tensors):
        raise CheckpointError(
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


def _describe(module: nn.Module) -> str:
    name = getattr(module, "name", None)
    return f"{type(module).__name__}({name})" if name else type(module).__name__


def _parse_header(text: str) -> dict[str, Any] | None:
    try:
        header = json.loads(text)
    except ValueError:
        return None
    return header if isinstance(header, dict) else None


def _read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` or ``.pth`` file."""
    if path.suffix == ".safetensors":
        return _read_plain_safetensors(path)[0]
    if path.suffix not in (".pth", ".pt"):
        raise CheckpointError(
            path, found=f"the suffix {path.suffix!r}", allowed=".safetensors, .pth or .pt"
        )
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
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise CheckpointError(
            path, found="something else than a state dict", allowed="a dict of names to tensors"
        )
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
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no such file"
        raise CheckpointError(path, found=found, allowed="an existing weights file")


def _imagenet_file(name: str) -> Path:
    """The cached ImageNet file of an encoder, downloaded where it is not there yet, and checked."""
    filename = ENCODERS[name].imagenet
    if filename is None:
        able = (each for each, entry in ENCODERS.items() if entry.imagenet is not None)
        raise ArgumentError(
            "weights",
            found=f"'imagenet' for {name}",
            allowed=f"a file, or one of {', '.join(able)}",
        )
    path = cache_folder() / filename
    if path.exists():
        _check_imagenet(path, path)
        return path
    with atomic_write(path) as temporary:
        with open(temporary, "wb") as out:
            for block in _download(IMAGENET_URL + filename, path):
                out.write(block)
        _check_imagenet(temporary, path)
    return path


def _check_imagenet(file: Path, path: Path) -> None:
    """Compare the SHA-256 of ``file``, to be known as ``path``, with the digits in its name."""
    expected = path.stem.rpartition("-")[2]
    digest = hashlib.sha256()
    _require_file(file)
    with open(file, "rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    if not digest.hexdigest().startswith(expected):
        raise CheckpointError(
            path,
            found=f"contents with SHA-256 {digest.hexdigest()[:8]}...",
            allowed=f"{expected}..., as in its name",
            fix=f"Delete it and download {IMAGENET_URL}{path.name} again.",
        )


def _download(url: str, path: Path) -> Iterator[bytes]:
    """The contents of ``url``; ``path`` is where a person without network may put the file."""
    try:
        with urllib.request.urlopen(url, timeout=_DOWNLOAD_TIMEOUT) as response:
            while block := response.read(_BLOCK):
                yield block
    except (OSError, http.client.HTTPException) as error:
        raise CheckpointError(
            "imagenet",
            found=f"that {url} cannot be downloaded ({error})",
            allowed="a reachable network, or the file in the cache",
            fix=f"Download {url} on another machine and put it at {path}; "
            "FASTPROTO_CACHE names another cache folder.",
        ) from error
