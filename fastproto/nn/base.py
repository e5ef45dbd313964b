# SPDX-License-Identifier: Apache-2.0
"""What every few-shot network here shares: encoding, prototypes, checks, saving and loading."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastproto import defaults
from fastproto.errors import ArgumentError, CheckpointError, require
from fastproto.nn.encoders import make_encoder
from fastproto.nn.inference import Graphs, can_replay, folded, inference_dtype
from fastproto.nn.prototypes import (
    Prototypes,
    check_num_classes,
    check_temperature,
    check_tensor,
    check_threshold,
    class_masks,
    extract_prototypes,
)
from fastproto.nn.weights import (
    checksum,
    load_encoder_weights,
    load_state,
    read_safetensors,
    write_safetensors,
)
from fastproto.nn.winograd import keep_filters

_KIND = "model"
_Model = TypeVar("_Model", bound="FewShotModel")


@dataclasses.dataclass(frozen=True)
class Features:
    """Encoder features of images that were padded to a multiple of the output stride."""

    maps: tuple[Tensor, ...]  # F1..F5, each [E, B, C, h, w]
    size: tuple[int, int]  # height and width of the images before padding

    @property
    def bottleneck(self) -> Tensor:
        """F5, ``[E, B, D, h, w]``."""
        return self.maps[-1]

    def split(self, sizes: tuple[int, int]) -> tuple[Features, Features]:
        """The first and the last images of every episode, e.g. support and query."""
        first, last = zip(*(level.split(sizes, dim=1) for level in self.maps), strict=True)
        return Features(first, self.size), Features(last, self.size)


class FewShotModel(nn.Module):
    """Encoder and prototypes; a subclass says in :meth:`decode` how they become logits.

    Shapes: E episodes, S support images (shots) and Q query images each, K classes with the
    background as class 0. Images are ``[E, S or Q, 3, H, W]`` of any H and W.
    """

    # Arguments of the constructor that a saved model is built from again.
    config_keys: ClassVar[tuple[str, ...]] = (
        "encoder",
        "output_stride",
        "temperature",
        "mask_threshold",
        "append_global",
    )
    graphs: Graphs | None = None  # of `segment` on a GPU, see `for_inference`
    is_folded: bool = False  # whether `for_inference` made it
    backend: str | None = None  # of `proto_attention`; None for the best one that can run

    def __init__(
        self,
        encoder: str,
        output_stride: int,
        weights: str | os.PathLike[str] | None = None,
        temperature: float = defaults.TEMPERATURE,
        mask_threshold: float = defaults.MASK_THRESHOLD,
        append_global: bool = False,
    ):
        super().__init__()
        check_temperature(temperature)
        check_threshold(mask_threshold)
        self.encoder = make_encoder(encoder, output_stride)
        load_encoder_weights(self.encoder, weights)
        self.temperature = temperature
        self.mask_threshold = mask_threshold
        self.append_global = append_global
        self.extra: dict[str, Any] = {}

    @property
    def config(self) -> dict[str, Any]:
        """What the constructor needs to build this network again, without its weights."""
        own = {"encoder": self.encoder.name, "output_stride": self.encoder.output_stride}
        return {key: own[key] if key in own else getattr(self, key) for key in self.config_keys}

    def decode(self, features: Features, prototypes: Prototypes) -> Tensor:
        """Logits ``[E, Q, K, H, W]`` of already encoded images."""
        raise NotImplementedError

    def forward(
        self,
        support_images: Tensor,
        support_masks: Tensor,
        query_images: Tensor,
        num_classes: int = 2,
    ) -> Tensor:
        """Segment the query as the support shows.

        Logits ``[E, Q, K, H, W]`` from images ``[E, S or Q, 3, H, W]`` and ``[E, S, H, W]`` integer
        labels 0..K-1, or ``fastproto.defaults.IGNORE`` for pixels of no class. Support and query
        pass the encoder as one batch, which batch normalisation profits from in training; in
        evaluation the result is that of :meth:`encode_support` and :meth:`segment`.

        Raises:
            ArgumentError: Arguments that do not fit each other or the network.
        """
        support, query = self.encode_episode(support_images, query_images)
        return self.decode(query, self.extract(support, support_masks, num_classes))

    def encode_support(self, images: Tensor, masks: Tensor, num_classes: int = 2) -> Prototypes:
        """Prototypes of ``images`` ``[E, S, 3, H, W]`` with ``masks`` ``[E, S, H, W]``."""
        return self.extract(self.encode(images, name="support_images"), masks, num_classes)

    def segment(self, query_images: Tensor, prototypes: Prototypes) -> Tensor:
        """Logits ``[E, Q, K, H, W]`` of ``query_images`` ``[E, Q, 3, H, W]``."""
        if self.graphs is not None and can_replay(self, query_images, prototypes):
            logits = self.graphs.segment(self, query_images, prototypes)
            if logits is not None:
                return logits
        return self.decode(self.encode(query_images, name="query_images"), prototypes)

    @torch.no_grad()
    def for_inference(self: _Model, dtype: torch.dtype | None = None) -> _Model:
        """A copy that only segments, and faster; later changes of the weights do not reach it.

        Batch normalisation is folded into the layers before it, the memory format is channels_last,
        and on a GPU :meth:`segment` replays a CUDA graph for every shape that comes again. Weights,
        images and prototypes are of ``dtype``; None takes bfloat16 where matrix units compute in it
        (GPUs from capability 8.0, CPUs with AMX), float32 elsewhere.

        Raises:
            ArgumentError: It is such a copy itself.

        Example:
            >>> model = FewShotUNet("resnet18").eval()
            >>> images, masks = torch.randn(1, 2, 3, 64, 64), torch.ones(1, 2, 64, 64, dtype=int)
            >>> prototypes = model.encode_support(images, masks)
            >>> fast = model.for_inference(torch.bfloat16)
            >>> fast.segment(images.bfloat16(), prototypes.to(dtype=torch.bfloat16)).shape
            torch.Size([1, 2, 2, 64, 64])
        """
        self._refuse_if_folded("for_inference")
        device = next(self.encoder.parameters()).device
        with torch.inference_mode(False):
            model = folded(self, dtype or inference_dtype(device))
        model.is_folded = True
        model.graphs = Graphs() if device.type == "cuda" else None
        return model

    def _refuse_if_folded(self, what: str) -> None:
        found, allowed = "a copy that for_inference made", "the network that it was made from"
        require(not self.is_folded, what, found=found, allowed=allowed)

    def train(self: _Model, mode: bool = True) -> _Model:
        """As of every module; a copy for inference cannot be trained."""
        if mode:
            self._refuse_if_folded("train")
        return super().train(mode)

    def _apply(self: _Model, *args: Any, **kwargs: Any) -> _Model:
        if self.graphs is not None:
            self.graphs = Graphs()  # the weights move away from what was captured
        super()._apply(*args, **kwargs)
        if self.is_folded:
            keep_filters(self)  # of the new weights
        return self

    def _padding(self, height: int, width: int) -> tuple[int, int, int, int]:
        stride = self.encoder.output_stride
        return 0, -width % stride, 0, -height % stride

    def encode(self, images: Tensor, *, name: str = "images") -> Features:
        """Encoder features of ``images`` ``[E, B, 3, H, W]``, padded to the output stride."""
        self._check_images(images, name)
        size = images.shape[-2], images.shape[-1]
        batch = F.pad(images.flatten(0, 1), self._padding(*size), mode="replicate")
        maps = tuple(level.unflatten(0, images.shape[:2]) for level in self.encoder(batch))
        return Features(maps, size)

    def encode_episode(
        self, support_images: Tensor, query_images: Tensor
    ) -> tuple[Features, Features]:
        """Features of support and query, encoded as one batch."""
        self._check_images(support_images, "support_images")
        self._check_images(query_images, "query_images")
        episodes, shots, *rest = support_images.shape
        if [query_images.shape[0], *query_images.shape[2:]] != [episodes, *rest]:
            raise ArgumentError(
                "query_images",
                found=f"shape {list(query_images.shape)}",
                allowed=f"[{episodes}, Q, {', '.join(map(str, rest))}], to fit the support",
                fix="For images of different sizes use encode_support and segment.",
            )
        images = torch.cat([support_images, query_images], dim=1)
        return self.encode(images).split((shots, query_images.shape[1]))

    def extract(self, support: Features, masks: Tensor, num_classes: int = 2) -> Prototypes:
        """Prototypes of encoded images with integer ``masks`` ``[E, S, H, W]``, on their device."""
        check_num_classes(num_classes)
        check_labels(masks, (*support.bottleneck.shape[:2], *support.size), num_classes)
        # Padding belongs to no class.
        one_hot = F.pad(class_masks(masks, num_classes), self._padding(*support.size))
        return extract_prototypes(
            support.bottleneck,
            one_hot,
            threshold=self.mask_threshold,
            append_global=self.append_global,
        )

    def save(self, path: str | os.PathLike[str], extra: Mapping[str, Any] | None = None) -> None:
        """Write configuration, weights and a JSON-able ``extra`` as safetensors, atomically.

        Raises:
            ArgumentError: ``extra`` cannot be written as JSON.
            OutputError: The file cannot be written.
        """
        self._refuse_if_folded("save")
        header = {
            "kind": _KIND,
            "architecture": type(self).__name__,
            "config": self.config,
            "extra": dict(extra or {}),
        }
        write_safetensors(path, self.state_dict(), header)

    @classmethod
    def load(cls: type[_Model], path: str | os.PathLike[str]) -> _Model:
        """Read what :meth:`save` wrote: the model, on the CPU in evaluation mode, with ``.extra``.

        Raises:
            CheckpointError: The file is missing, damaged or of another architecture.
        """
        tensors, header = read_safetensors(path)
        found = header.get("architecture") if header.get("kind") == _KIND else header.get("kind")
        require(
            found == cls.__name__,
            path,
            found=f"a file of {found}",
            allowed=f"a file of {cls.__name__}",
            fix="Load it with the class that saved it.",
            error=CheckpointError,
        )
        config: Any = header.get("config")
        try:
            if not set(config) <= set(cls.config_keys):
                raise TypeError(f"its keys are {sorted(config)}")
            # No random number for initial weights, and no time: `to_empty` would import torch's
            # compiler, in three seconds, as would `normal_` in encoder and decoder.
            with torch.device("meta"):
                model = cls(**config)
            model._apply(lambda each: torch.empty(each.shape, dtype=each.dtype))
        except (ArgumentError, TypeError) as error:
            raise CheckpointError(
                path,
                found=f"an unusable configuration ({error})",
                allowed=f"the configuration of a {cls.__name__}",
            ) from error
        load_state(model, tensors, path)
        model.extra = header.get("extra", {})
        return model.eval()

    def fingerprint(self) -> str:
        """SHA-256 (hex) of architecture, configuration and weights."""
        text = json.dumps([type(self).__name__, self.config, checksum(self.state_dict())])
        return hashlib.sha256(text.encode()).hexdigest()

    def _check_images(self, images: Tensor, name: str) -> None:
        require(
            images.ndim == 5 and images.shape[2] == 3 and 0 not in images.shape,
            name,
            found=lambda: f"shape {list(images.shape)}",
            allowed="[E, B, 3, H, W], none of them 0",
            fix="Repeat a single channel three times: images.expand(-1, -1, 3, -1, -1).",
        )
        weight = next(self.encoder.parameters())
        found, allowed = f"device {images.device}", f"{weight.device}, as the network"
        require(images.device == weight.device, name, found=found, allowed=allowed)
        mixed = torch.is_autocast_enabled(images.device.type) and images.is_floating_point()
        allowed = f"{weight.dtype}, as the network's weights"
        fits = mixed or images.dtype == weight.dtype
        require(fits, name, found=f"{images.dtype}", allowed=allowed)


def check_labels(
    labels: Tensor, shape: tuple[int, ...], num_classes: int, *, name: str = "support_masks"
) -> None:
    """Raise ArgumentError unless ``labels`` are integers 0..K-1, or ``IGNORE``, of ``shape``.

    The range is looked at on the CPU only, where that needs no wait for a device; elsewhere a pixel
    outside it belongs to no class.
    """
    fits = labels.shape == shape and not (labels.is_floating_point() or labels.is_complex())
    check_tensor(fits, name, labels, lambda: f"integers of shape {list(shape)}")
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = int(labels.min()), int(labels.max())
        if low == defaults.IGNORE:
            low = int(labels.masked_fill(labels == defaults.IGNORE, 0).min())
        require(
            low >= 0 and high < num_classes,
            name,
            found=f"labels {low}..{high}",
            allowed=f"0..{num_classes - 1}",
            fix="Renumber the labels, or pass the right num_classes.",
        )
