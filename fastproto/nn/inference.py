# SPDX-License-Identifier: Apache-2.0
"""A network that only segments: normalisation folded away, and on a GPU one launch a batch."""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from fastproto.errors import warn
from fastproto.nn.decoder import UNetDecoder
from fastproto.nn.prototypes import Prototypes
from fastproto.nn.winograd import keep_filters
from fastproto.op import backends

if TYPE_CHECKING:
    from fastproto.nn.base import FewShotModel

    Model = TypeVar("Model", bound=FewShotModel)

_GRAPHS = 8  # shapes whose graphs are kept
_ROWS = 256  # prototypes are padded to multiples of it, so that few shapes occur
_WARM_UP = 3


def inference_dtype(device: torch.device) -> torch.dtype:
    """Bfloat16 where matrix units compute in it, float32 elsewhere."""
    # Without AMX a CPU's float32 convolutions are as fast, see nn/winograd.py.
    return torch.bfloat16 if computes_bfloat16(device, ("amx_bf16",)) else torch.float32


def computes_bfloat16(
    device: torch.device, features: Sequence[str] = ("avx512_bf16", "amx_bf16")
) -> bool:
    """Whether the hardware computes in bfloat16; a CPU with any of ``features``.

    Another CPU would convert back and forth and be slower than in float32.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(feature, False) for feature in features)


def folded(model: Model, dtype: torch.dtype) -> Model:
    """A copy in evaluation mode whose normalisations are part of the layers before them."""
    model = copy.deepcopy(model).eval().requires_grad_(False)
    if next(model.encoder.parameters()).dtype != torch.float64:
        model = model.float()  # folding rounds; once is enough
    _fold_convolutions(model.encoder)
    for module in model.modules():
        if isinstance(module, UNetDecoder):
            _fold_decoder(module)
    model = model.to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    keep_filters(model)
    return model


def _fold_convolutions(module: nn.Module) -> None:
    """``bn1`` into the ``conv1`` just before, and that of a sequence into the convolution before.

    Any other ``nn.BatchNorm2d`` stays: that it normalises what the layer before gives is not said.
    """
    before, convolution = "", None
    for name, child in [*module.named_children()]:
        _fold_convolutions(child)
        follows = isinstance(module, nn.Sequential) or name == before.replace("conv", "bn")
        if isinstance(child, nn.BatchNorm2d) and convolution is not None and follows:
            setattr(module, before, fuse_conv_bn_eval(convolution, child))
            setattr(module, name, nn.Identity().eval())
        before, convolution = name, child if isinstance(child, nn.Conv2d) else None


def _fold_decoder(decoder: UNetDecoder) -> None:
    """The normalisation of ``up`` into what makes it.

    Those of the skips stay: the encoder goes on with what they see.
    """
    for block, *makers in (
        (decoder.up1, decoder.lift_feat, decoder.lift_proto),
        (decoder.up2, decoder.lift2),
        (decoder.up3, decoder.lift3),
        (decoder.up4, decoder.up3.conv_up, decoder.up3.conv_skip),
    ):
        norm = block.norm_up
        scale = norm.weight / (norm.get_buffer("running_var") + norm.eps).sqrt()
        for maker in makers:
            outputs = 1 if isinstance(maker, nn.ConvTranspose2d) else 0
            shape = [-1 if axis == outputs else 1 for axis in range(4)]
            maker.get_parameter("weight").mul_(scale.view(shape))
        bias = makers[0].get_parameter("bias")
        bias.copy_((bias - norm.get_buffer("running_mean")) * scale + norm.bias)
        block.register_module("norm_up", nn.Identity().eval())


class Graphs:
    """CUDA graphs of ``segment``, one for each shape: captured when it comes a second time.

    A shape that cannot be captured stays as it is, which is said once.
    """

    def __init__(self) -> None:
        self._captured: OrderedDict[tuple[object, ...], _Graph | None] = OrderedDict()
        self._eager: set[tuple[object, ...]] = set()
        self._lock = threading.Lock()  # what a graph reads and writes is there once

    def __reduce__(self) -> tuple[type[Graphs], tuple[()]]:
        return Graphs, ()  # copied or pickled: another network's weights lie elsewhere

    def segment(self, model: FewShotModel, images: Tensor, prototypes: Prototypes) -> Tensor | None:
        """Logits as ``model.decode`` gives them, in memory of their own; None without a graph."""
        rows = -(-len(prototypes.protos) // _ROWS) * _ROWS
        stream = torch.cuda.current_stream(images.device)
        key = (
            *(images.shape, prototypes.offsets.shape, prototypes.num_classes, rows),
            *(stream.cuda_stream, model.backend, model.temperature),
        )
        if key in self._eager:
            return None
        on_device = torch.cuda.device(images.device)
        # The buffers must serve inside and outside of inference mode.
        with self._lock, torch.inference_mode(False), torch.no_grad(), on_device:
            if key not in self._captured:
                self._captured[key] = None
                if len(self._captured) > _GRAPHS:
                    self._captured.popitem(last=False)
                return None
            self._captured.move_to_end(key)
            graph = self._captured[key]
            if graph is None:
                try:
                    graph = self._captured[key] = _Graph(model, images, prototypes, rows)
                except RuntimeError as error:
                    torch.cuda.set_stream(stream)  # capturing may have failed to give it back
                    self._eager.add(key)
                    warn("no CUDA graph, so slower", error)
                    return None
            return graph.replay(images, prototypes)


def can_replay(model: FewShotModel, images: Tensor, prototypes: Prototypes) -> bool:
    """Whether a graph would do what ``model.segment`` does with these arguments."""
    weight = next(model.encoder.parameters())
    return (
        images.is_cuda
        and images.device == weight.device == prototypes.protos.device
        and images.dtype == weight.dtype == prototypes.protos.dtype
        and images.ndim == 5
        and images.numel() > 0
        and prototypes.episodes == images.shape[0]
        and prototypes.dim == model.encoder.channels[-1]
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cuda")
        and not torch.compiler.is_compiling()
        and not torch.cuda.is_current_stream_capturing()
        # It asks the device for the offsets.
        and backends.choose(images.device, model.backend, images.dtype) != "reference"
    )


class _Graph:
    """One captured pass through the network, and the buffers it reads and writes."""

    def __init__(self, model: FewShotModel, images: Tensor, prototypes: Prototypes, rows: int):
        self._images = images.clone()
        protos = prototypes.protos.new_zeros(rows, prototypes.dim)
        self._prototypes = Prototypes(protos, prototypes.offsets.clone(), prototypes.num_classes)

        def run() -> Tensor:
            return model.decode(model.encode(self._images), self._prototypes)

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):  # what libraries do at a first call cannot be captured
                run()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # Other threads may go on using the device.
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            self._logits = run()

    def replay(self, images: Tensor, prototypes: Prototypes) -> Tensor:
        count = len(prototypes.protos)
        self._images.copy_(images)
        self._prototypes.protos[:count].copy_(prototypes.protos)
        self._prototypes.protos[count:].zero_()
        self._prototypes.offsets.copy_(prototypes.offsets)
        self._graph.replay()
        return self._logits.clone()
