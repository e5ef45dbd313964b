# SPDX-License-Identifier: Apache-2.0
"""The network as a file that runs without this package: ONNX, or a program of AOTInductor.

Either takes slices and prototypes and gives probabilities, for any number and size of them, see
:class:`ExportedUNet`. Before a file replaces another its answers are compared with the network's.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from fastproto import defaults
from fastproto._files import atomic_write
from fastproto._version import __version__
from fastproto.errors import ArgumentError, OutputError, import_extra, require
from fastproto.nn.few_shot_unet import FewShotUNet
from fastproto.nn.prototypes import Prototypes
from fastproto.nn.weights import HEADER
from fastproto.op.reference import normalize

INPUTS = ("images", "prototypes", "lengths")
OUTPUT = "probabilities"
TOLERANCE = 1e-4
"""By how much a probability may differ from the network's, see `check`."""


class ExportedUNet(nn.Module):
    """A network that segments, of operators that every runtime knows.

    Args:
        model: The network; it is copied, as by `FewShotModel.for_inference`.
    """

    def __init__(self, model: FewShotUNet):
        super().__init__()
        self.model = model.for_inference(torch.float32).eval()
        self.model.decoder.merge_head()

    def forward(self, images: Tensor, prototypes: Tensor, lengths: Tensor) -> Tensor:
        """Probability of every class at every pixel.

        Args:
            images: ``[B, 1, H, W]`` float32, slices as `Preprocessing` makes them.
            prototypes: ``[B, K, N, D]`` float32: for each slice those of each class, the background
                being class 0. Of N, which is 1 or more, only the first ``lengths`` count.
            lengths: ``[B, K]`` int64, 0 to N.

        Returns:
            ``[B, K, H, W]`` float32, the softmax of what `FewShotModel.segment` gives.
        """
        features = self.model.encode(images.expand(-1, 3, -1, -1).unsqueeze(1))
        *skips, feat = (level.squeeze(1) for level in features.maps)
        height, width = features.size
        enhanced = enhance(feat, prototypes, lengths, self.model.temperature)
        logits: Tensor = self.model.decoder(feat, enhanced, skips)
        return logits[..., :height, :width].softmax(dim=1)


def enhance(feat: Tensor, prototypes: Tensor, lengths: Tensor, temperature: float) -> Tensor:
    """G*F of docs/math.md with padded bags: ``[B, D, h, w]`` -> ``[B, K, D, h, w]``.

    A prototype past the length has weight 0 exactly, whatever it holds; an empty bag gives 0.
    """
    row = torch.arange(prototypes.shape[2], device=prototypes.device)
    counts = row < lengths.unsqueeze(2)  # [B, K, N]
    protos = torch.where(counts.unsqueeze(3), prototypes, 0.0)
    query = feat.flatten(2).transpose(1, 2).unsqueeze(1)  # [B, 1, hw, D]
    cos = normalize(query, defaults.EPS) @ normalize(protos, defaults.EPS).transpose(2, 3)
    # A finite stand-in for -inf, which an empty bag's softmax would turn into NaN.
    scores = torch.where(counts.unsqueeze(2), cos / temperature, torch.finfo(cos.dtype).min)
    agg = scores.softmax(dim=3) @ protos  # [B, K, hw, D]
    return (agg * query).transpose(2, 3).unflatten(3, feat.shape[2:])


def packed(prototypes: Tensor, lengths: Tensor) -> Prototypes:
    """The bags of ``[B, K, N, D]`` prototypes, with ``[B, K]`` lengths."""
    bags = [
        bag[:length]
        for bag, length in zip(prototypes.flatten(0, 1), lengths.flatten(), strict=True)
    ]
    ends = nn.functional.pad(lengths.flatten().cumsum(0), (1, 0))
    return Prototypes(torch.cat(bags), ends.int(), prototypes.shape[1])


def export_onnx(
    model: FewShotUNet, path: str | os.PathLike[str], about: Mapping[str, Any] | None = None
) -> float:
    """Write the network as ONNX, atomically; the network is on the CPU.

    Args:
        model: The network.
        path: File to write.
        about: JSON values; with the version and the network's configuration they become the text
            ``fastproto`` in the file's metadata.

    Returns:
        The largest difference between a probability by onnxruntime and the network's.

    Raises:
        ArgumentError: A package of the extra ``export`` is missing.
        OutputError: The file cannot be written, or gives other probabilities than the network.
    """
    check_onnx()
    import onnx_ir
    import onnxruntime

    with _quiet():
        file = torch.onnx.export(
            _trace(ExportedUNet(model)),
            input_names=INPUTS,
            output_names=[OUTPUT],
            dynamo=True,
            verbose=False,
        )
    assert file is not None
    graph = file.model.graph
    shapes: list[list[str | int]] = [
        ["batch", 1, "height", "width"],
        ["batch", "classes", "prototypes", model.encoder.channels[-1]],
        ["batch", "classes"],
        ["batch", "classes", "height", "width"],
    ]
    for value, shape in zip([*graph.inputs, *graph.outputs], shapes, strict=True):
        value.shape = onnx_ir.Shape(shape)  # instead of names that the exporter made
    file.model.metadata_props[HEADER] = _header(model, about)
    with atomic_write(path) as temporary:
        file.save(temporary, external_data=False)
        session = onnxruntime.InferenceSession(temporary, providers=["CPUExecutionProvider"])

        def run(*inputs: Tensor) -> Tensor:
            arrays = (each.numpy() for each in inputs)
            return torch.from_numpy(session.run(None, dict(zip(INPUTS, arrays, strict=True)))[0])

        return check(model, run, path)


def export_aoti(
    model: FewShotUNet,
    path: str | os.PathLike[str],
    image_size: int,
    about: Mapping[str, Any] | None = None,
) -> float:
    """As `export_onnx`, for AOTInductor: machine code for the device that the network is on.

    C++ and Python run it with torch alone. It takes square images of ``image_size`` only; its path
    ends with ``.pt2``.

    Raises:
        ArgumentError: Another suffix, or no C++ compiler.
        OutputError: The file cannot be written, or gives other probabilities than the network.
    """
    from torch._inductor import aoti_compile_and_package, aoti_load_package

    check_aoti(path)
    about_it = {HEADER: _header(model, about)}
    with _quiet(), atomic_write(path) as temporary:
        aoti_compile_and_package(
            _trace(ExportedUNet(model), image_size),
            package_path=str(temporary),
            inductor_configs={"aot_inductor.metadata": about_it},
        )
        return check(model, aoti_load_package(str(temporary)), path, image_size)


def check_onnx() -> None:
    """Raise ArgumentError unless what writes and runs ONNX can be imported."""
    import_extra("export", "onnx", "onnxscript", "onnxruntime")


def check_aoti(path: str | os.PathLike[str]) -> None:
    """Raise ArgumentError unless AOTInductor can write to such a path here."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    suffix = os.path.splitext(path)[1]
    require(suffix == ".pt2", path, found=f"the suffix {suffix!r}", allowed=".pt2")
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        found, fix = "no C++ compiler", "Install g++ or clang, or name one in CXX."
        raise ArgumentError("aoti", found=found, allowed="one that runs", fix=fix) from error


def check(
    model: FewShotUNet,
    run: Callable[..., Tensor],
    path: str | os.PathLike[str],
    image_size: int | None = None,
) -> float:
    """The largest difference between probabilities by `FewShotModel.segment` and by ``run``.

    Three problems of other numbers, and unless there is an ``image_size`` of other sizes, than it
    was traced with, empty bags among them.

    Raises:
        OutputError: It is above ``TOLERANCE``, or not a number.
    """
    worst, model = 0.0, copy.deepcopy(model).eval()  # as what was exported
    for seed, (*numbers, height, width) in enumerate(
        ((1, 2, 1, 32, 32), (3, 2, 7, 64, 48), (2, 4, 3, 33, 70))
    ):
        sides = image_size or height, image_size or width
        images, prototypes, lengths = inputs = problem(model, *numbers, *sides, seed=seed)
        with torch.inference_mode():
            logits = model.segment(
                images.unsqueeze(1).expand(-1, -1, 3, -1, -1), packed(prototypes, lengths)
            )
            difference = (run(*inputs) - logits[:, 0].softmax(dim=1)).abs()
        worst = max(worst, float(difference.nan_to_num(float("inf")).max()))
    require(
        worst <= TOLERANCE,
        path,
        found=f"that the file's probabilities differ from the network's by {worst:.2g}",
        allowed=f"{TOLERANCE:g} at most",
        fix="Nothing was written. Other versions of torch, onnxscript or onnxruntime may do.",
        error=OutputError,
    )
    return worst


def _header(model: FewShotUNet, about: Mapping[str, Any] | None) -> str:
    return json.dumps({"version": __version__, **model.config, **(about or {})})


def _trace(network: ExportedUNet, image_size: int | None = None) -> ExportedProgram:
    """The network's operators, for any numbers and, unless it is given, any size of images."""
    sides = () if image_size else (2, 3)
    dynamic = ((0, *sides), (0, 1, 2), (0, 1))  # axes of the inputs
    shapes: Any = tuple(dict.fromkeys(axes, Dim.DYNAMIC) for axes in dynamic)
    inputs = problem(network.model, 2, 3, 4, image_size or 64, image_size or 80)
    with torch.no_grad():
        return torch.export.export(
            network,
            inputs,
            dynamic_shapes=shapes,
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )


def problem(
    model: FewShotUNet, batch: int, classes: int, most: int, *sides: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of such sizes, on the network's device; the first bag is empty, the last is full."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, 1, *sides, generator=generator)
    dim = model.encoder.channels[-1]
    prototypes = torch.randn(batch, classes, most, dim, generator=generator)
    lengths = torch.randint(0, most + 1, (batch, classes), generator=generator)
    lengths[0, 0], lengths[-1, -1] = 0, most
    device = next(model.parameters()).device
    return images.to(device), prototypes.to(device), lengths.to(device)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporters say of themselves and of packages that are not needed."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.filterwarnings("ignore", module=r"torch\.onnx\.")
            yield
    finally:
        logger.setLevel(level)
