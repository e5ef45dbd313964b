# SPDX-License-Identifier: Apache-2.0
"""One optimiser step; on a GPU a CUDA graph, so that the device does not wait for the host."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from fastproto.losses import EpisodeLoss
from fastproto.nn.base import FewShotModel
from fastproto.training.episodes import Episode

_WARM_UP = 3  # what libraries do in their first calls cannot be captured


@dataclass(eq=False)
class Step:
    """Forward, losses, backward, clipping and AdamW, unless a number is not finite.

    After the first steps the whole of it is captured as one graph, which later steps replay with
    their own episode and rate. An episode of other shapes runs without it.

    Args:
        model: In training mode when called.
        optimizer: A fused AdamW over its parameters.
        loss: Its class weights are a tensor on the model's device.
        clip_norm: Largest 2-norm of all gradients together.
        autocast: Makes the context of the forward pass.
        capture: Whether to capture; for a model on a GPU.
        average: Puts the mean over all processes that train together into tensors.
    """

    model: FewShotModel
    optimizer: torch.optim.Optimizer
    loss: EpisodeLoss
    clip_norm: float
    autocast: Callable[[], contextlib.AbstractContextManager[Any]]
    _: KW_ONLY
    capture: bool
    average: Callable[[Sequence[Tensor]], None] = lambda tensors: None

    def __post_init__(self) -> None:
        self._parameters = [p for p in self.model.parameters() if p.requires_grad]
        self._device = self._parameters[0].device
        self._names: list[str] = []
        self._eager_steps = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._episode: Episode | None = None  # what the graph reads
        # Not the default stream, on which nothing can be captured: gradients stay on theirs.
        self._stream = torch.cuda.Stream(self._device) if self.capture else None
        if self.capture:
            for group in self.optimizer.param_groups:
                group["lr"] = torch.tensor(0.0, dtype=torch.float32, device=self._device)

    def __call__(self, episode: Episode, rate: float) -> dict[str, float]:
        """Take the step.

        Args:
            episode: On any device.
            rate: Learning rate.

        Returns:
            The loss, the norm of the gradients and the single losses. If the first or the second is
            not finite, the weights are what they were.
        """
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:  # the same bits as from a tensor
                group["lr"] = torch.tensor(rate, dtype=torch.float32).item()
        with self._on_stream():
            values = self._replay(episode) if self.capture else None
            if values is None:
                values = self._work(episode.to(self._device))
                self._eager_steps += 1
            # The one synchronisation of a step.
            return dict(zip(self._names, values.tolist(), strict=True))

    def _work(self, episode: Episode) -> Tensor:
        with self.autocast():
            total, parts, _ = self.loss(self.model, episode)
        total.backward()
        total = total.detach()
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        self.average([*gradients, total, *parts.values()])
        norm = clip_grad_norm_(self._parameters, self.clip_norm)
        self._names = ["loss", "grad_norm", *parts]
        numbers = [total, norm, *parts.values()]
        values = torch.stack(
            [torch.as_tensor(n, device=self._device).detach().float() for n in numbers]
        )
        # The fused AdamW leaves weights, moments and step counts alone where this is 1.
        stop = values[:2].isfinite().all().logical_not().float()
        self.optimizer.found_inf = stop  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad()  # here, so that gradients do not live beside the activations
        return values

    def _replay(self, episode: Episode) -> Tensor | None:
        """The step by the graph; None where there is none for this episode."""
        if self._graph is None and self._eager_steps >= _WARM_UP:
            self._record(episode)
        if self._graph is None or self._episode is None:
            return None
        if _shapes(episode) != _shapes(self._episode):
            return None
        for name, buffer in self._episode.tensors().items():
            buffer.copy_(getattr(episode, name), non_blocking=True)
        self._graph.replay()
        return self._values

    def _record(self, episode: Episode) -> None:
        self._episode = episode.to(self._device).clone()
        self._set_capturable(True)
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads go on using the device: one pins memory.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._values = self._work(self._episode)
            self._graph = graph
        except RuntimeError as error:
            print(
                f"fastproto: steps are not captured as a CUDA graph and stay slower: {error}",
                file=sys.stderr,
            )
            self.capture, self._episode = False, None
            self.optimizer.zero_grad()
        finally:
            self._set_capturable(False)  # it warns of steps that are not captured

    def _set_capturable(self, value: bool) -> None:
        for group in self.optimizer.param_groups:
            group["capturable"] = value

    def _on_stream(self) -> contextlib.AbstractContextManager[Any]:
        if self._stream is None:
            return contextlib.nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        return torch.cuda.stream(self._stream)


def _shapes(episode: Episode) -> tuple[object, ...]:
    return (episode.num_classes, *(tensor.shape for tensor in episode.tensors().values()))
