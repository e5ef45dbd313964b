# SPDX-License-Identifier: Apache-2.0
"""What an episode is, and what every source of episodes does.

An episode is a pure function of (seed, index): nothing is remembered from one to the next, so a
resumed run needs no loader state and any episode can be made again from a log line.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastproto.errors import require
from fastproto.training.augment import Augmentation, AugmentParams, Cut, cut_batch

T = TypeVar("T")


@dataclass
class Episode:
    """A batch of E few-shot tasks on the device that trains.

    Attributes:
        support_images: [E, S, 3, H, W] float32, three equal channels.
        support_masks: [E, S, H, W] int64, 0 = background, 1..num_classes - 1; ``IGNORE`` (-100) for
            pixels that count nowhere.
        query_images: [E, Q, 3, H, W] float32.
        query_masks: [E, Q, H, W] int64.
        num_classes: Classes, background included.
        description: Where the slices are from.
    """

    support_images: Tensor
    support_masks: Tensor
    query_images: Tensor
    query_masks: Tensor
    num_classes: int
    description: str

    def to(self, device: torch.device) -> Episode:
        """The same on another device; from pinned memory without waiting for it."""
        return self._moved(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Episode:
        """The same in memory that a GPU reads by itself."""
        return self._moved(Tensor.pin_memory)

    def clone(self) -> Episode:
        """The same in memory of its own."""
        return self._moved(Tensor.clone)

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def _moved(self, move: Callable[[Tensor], Tensor]) -> Episode:
        moved: dict[str, Any] = {name: move(value) for name, value in self.tensors().items()}
        return replace(self, **moved)


@dataclass(frozen=True)
class Draw:
    """One episode before augmentation: support slices first, then query slices.

    Attributes:
        cuts: S + Q fields of view, labels already renumbered 0..ways or ``IGNORE``.
        description: Where the slices are from.
    """

    cuts: list[Cut]
    description: str


@dataclass(eq=False)
class EpisodeSource(ABC):
    """Draws episodes, augments them in one batch, and puts them on a device.

    Args:
        seed: Episode i is a function of seed and i.
        size: Side of the network's images in pixels.
        shots: Support slices of each foreground class; an episode has ``shots * ways``.
        ways: Foreground classes.
        queries: Query slices.
        augmentation: Ranges of the random changes, each slice with its own; None for none.
        device: Where the augmentation runs and the tensors end.
    """

    seed: int
    _: KW_ONLY
    size: int
    shots: int = 1
    ways: int = 1
    queries: int = 1
    augmentation: Augmentation | None = None
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        for name in ("shots", "ways", "queries"):
            value = getattr(self, name)
            require(value >= 1, name, found=repr(value), allowed="an integer of at least 1")
        self.device = torch.device(self.device)

    @abstractmethod
    def draw(self, generator: torch.Generator) -> Draw:
        """Choose slices and classes of one episode with the numbers of ``generator``."""

    def episode(self, index: int) -> Episode:
        """Episode ``index``, with E = 1."""
        return self.batch([index])

    def batch(self, indices: Sequence[int]) -> Episode:
        """Several episodes as one, augmented together."""
        cuts, params, said = [], [], []
        for index in indices:
            generator = episode_generator(self.seed, index)
            drawn = self.draw(generator)
            cuts += drawn.cuts
            params.append(
                AugmentParams.identity(len(drawn.cuts))
                if self.augmentation is None
                else self.augmentation.draw(generator, len(drawn.cuts), self.size, self.size)
            )
            said.append(f"episode {index}: {drawn.description}")
        images, labels = cut_batch(cuts, self.size, AugmentParams.cat(params), self.device)
        images = images.repeat(1, 3, 1, 1).unflatten(0, (len(said), -1))
        labels = labels.unflatten(0, (len(said), -1))
        support = self.shots * self.ways
        return Episode(
            support_images=images[:, :support],
            support_masks=labels[:, :support],
            query_images=images[:, support:],
            query_masks=labels[:, support:],
            num_classes=self.ways + 1,
            description="; ".join(said),
        )


class MixedEpisodes(EpisodeSource):
    """Each episode from one of several sources, drawn by weight.

    Args:
        sources: Sources of the same seed, sizes, augmentation and device.
        weights: How often each is drawn, in any unit.
    """

    def __init__(self, sources: Sequence[EpisodeSource], weights: Sequence[float]):
        shared = {field.name: getattr(sources[0], field.name) for field in fields(EpisodeSource)}
        super().__init__(**shared)
        self.sources = list(sources)
        self.weights = torch.tensor(weights, dtype=torch.float32)

    def draw(self, generator: torch.Generator) -> Draw:
        """See ``EpisodeSource.draw``."""
        chosen = int(torch.multinomial(self.weights, 1, generator=generator))
        return self.sources[chosen].draw(generator)


def episode_generator(seed: int, index: int) -> torch.Generator:
    """The CPU generator of episode ``index``; hashed, so that neighbours share nothing."""
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def choice(items: Sequence[T], generator: torch.Generator) -> T:
    """One of ``items``, drawn uniformly."""
    return items[int(torch.randint(len(items), (1,), generator=generator))]
