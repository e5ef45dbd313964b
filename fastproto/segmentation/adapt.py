# SPDX-License-Identifier: Apache-2.0
"""Adaptation: a short training of the network on the annotated scan itself."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from fastproto.data.preprocessing import PreparedVolume
from fastproto.defaults import IGNORE
from fastproto.losses import EpisodeLoss
from fastproto.nn.base import FewShotModel
from fastproto.training.augment import Augmentation, Cut
from fastproto.training.episodes import Draw, EpisodeSource, choice

BATCH = 4
LEARNING_RATE = 3e-4
BACKGROUND_WEIGHT = 0.5
SHOTS, QUERIES = 2, 2
ANYWHERE = 0.3  # share of the query slices that are drawn from anywhere around the organ
REACH_MM = 30.0  # how far around it


@dataclass(frozen=True, eq=False)
class AnnotatedOrgan:
    """One organ of an annotated scan.

    Attributes:
        value, name: Of its label.
        view: The scan, seen in the organ's field of view.
        masks: [n, S, S] bool, the organ in every slice.
        slices: Numbers of the slices to learn from, ascending.
        ignored: [n, S, S] bool, pixels that count nowhere; None for none.
    """

    value: int
    name: str
    view: PreparedVolume
    masks: Tensor
    slices: tuple[int, ...]
    ignored: Tensor | None = None

    @cached_property
    def inside(self) -> list[int]:
        """Those of ``slices`` that show the organ."""
        return [number for number in self.slices if self.masks[number].any()]

    @cached_property
    def region(self) -> list[int]:
        """``slices`` and all slices without the organ that lie at most ``REACH_MM`` from it."""
        holding = self.masks.flatten(1).any(dim=1).nonzero().flatten().tolist()
        reach = round(REACH_MM / self.view.spacing[0])
        near = range(max(holding[0] - reach, 0), min(holding[-1] + reach + 1, len(self.masks)))
        empty = [n for n in near if n not in holding and self.shown[n]]
        return sorted({*self.slices, *empty})

    @cached_property
    def shown(self) -> Tensor:
        """[n] bool, the slices of which some pixel counts."""
        if self.ignored is None:
            return torch.ones(len(self.masks), dtype=torch.bool)
        return ~self.ignored.flatten(1).all(dim=1)

    def labels(self, numbers: int | Sequence[int]) -> Tensor:
        """[..., S, S] int8 of some slices: 1 for the organ, ``IGNORE`` for what counts nowhere."""
        index = numbers if isinstance(numbers, int) else list(numbers)
        labels = self.masks[index].to(torch.int8)
        if self.ignored is not None:
            labels[self.ignored[index]] = IGNORE
        return labels


class AnnotatedEpisodes(EpisodeSource):
    """Episodes whose support and query are slices of the annotated scan, one organ at a time.

    Args:
        organs: What is drawn in it.
        seed, options: See ``EpisodeSource``.
    """

    def __init__(self, organs: Sequence[AnnotatedOrgan], seed: int, **options: Any):
        super().__init__(seed, shots=SHOTS, queries=QUERIES, **options)
        self.organs = list(organs)
        self._picture = cache(lambda organ, number: organ.view.images(number, number + 1)[0, 0])

    def draw(self, generator: torch.Generator) -> Draw:
        """See ``EpisodeSource.draw``."""
        organ = choice(self.organs, generator)
        chosen = [choice(organ.inside, generator) for _ in range(self.shots)]
        for _ in range(self.queries):
            anywhere = float(torch.rand(1, generator=generator)) < ANYWHERE
            chosen.append(choice(organ.region if anywhere else organ.inside, generator))
        side = organ.view.view.side
        zoomed = side * 1.25 ** (2 * float(torch.rand(1, generator=generator)) - 1)
        cuts = []
        for number in chosen:
            moved = (torch.rand(2, generator=generator) * 2 - 1) * 0.1 * side + side / 2
            image, label = self._picture(organ, number), organ.labels(number)
            cuts.append(Cut(image, label, (side, side), tuple(moved.tolist()), zoomed))
        return Draw(cuts, f"{organ.name}, slices {', '.join(map(str, chosen))}")


def adapt_model(
    model: FewShotModel,
    organs: Sequence[AnnotatedOrgan],
    steps: int,
    *,
    seed: int = 0,
    parts: str = "decoder",
    progress: Callable[[int, int, float], object] | None = None,
) -> tuple[FewShotModel, dict[str, Tensor]]:
    """Train a copy of ``model`` on the annotated scan.

    Normalisation keeps the statistics of the model: a few slices of one scan would replace them
    with their own. A step is of ``BATCH`` episodes, which ``seed`` determines. ``parts`` says which
    weights change, those of the "decoder" or "all"; ``progress`` is called after each step with the
    steps done, the steps in all and the loss.

    Returns:
        The trained copy in evaluation mode, and the weights in which it differs.
    """
    device = next(model.parameters()).device
    adapted = copy.deepcopy(model).eval()
    if device.type == "cpu":
        adapted = adapted.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_(parts == "all" or name.startswith("decoder."))
    trained = {name: value for name, value in adapted.named_parameters() if value.requires_grad}
    source = AnnotatedEpisodes(
        organs,
        seed,
        size=organs[0].view.image_size,
        augmentation=Augmentation(rotation=10, zoom=(0.85, 1.2)),
        device=device,
    )
    loss = EpisodeLoss(ce=1.0, align=0.0, cycle=0.0, class_weights=[BACKGROUND_WEIGHT, 1.0])
    optimizer = torch.optim.AdamW(trained.values(), lr=LEARNING_RATE, weight_decay=1e-4)
    for step in range(steps):
        rate = 0.5 * (1 + math.cos(math.pi * step / steps)) * min(1.0, (step + 1) / 10)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * rate
        total, _, _ = loss(adapted, source.batch(range(step * BATCH, (step + 1) * BATCH)))
        total.backward()
        torch.nn.utils.clip_grad_norm_(list(trained.values()), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if progress is not None:
            progress(step + 1, steps, total.item())
    changed = {name: value.detach().cpu().half() for name, value in trained.items()}
    adapted.load_state_dict(changed, strict=False)  # as precise as a task file keeps them
    return adapted.requires_grad_(True), changed
