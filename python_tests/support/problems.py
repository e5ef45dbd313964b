# SPDX-License-Identifier: Apache-2.0
"""One list of proto_attention problems for tests, benchmarks and profiling."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """A size of the op and how its inputs are made.

    Attributes:
        name: Short, unique, fit for a test id.
        bags: Prototypes of each bag, episode by episode: len(bags) episodes of equally many bags.
        queries: Query images per episode.
        dim: Channels D.
        height: Pixels.
        width: Pixels.
        mean: Added to unit-variance features and prototypes before the ReLU.
        constant: Every third feature and prototype vector is constant over channels.
        duplicated: All prototypes of a bag are the same vector.
        spare: Rows of ``protos`` past the last bag.
        layout: "nchw", "channels_last" or "strided" (a slice of a larger tensor).
    """

    name: str
    bags: tuple[tuple[int, ...], ...]
    queries: int = 1
    dim: int = 512
    height: int = 16
    width: int = 16
    mean: float = 0.0
    constant: bool = False
    duplicated: bool = False
    spare: int = 0
    layout: str = "nchw"

    @property
    def episodes(self) -> int:
        """E."""
        return len(self.bags)

    @property
    def ways(self) -> int:
        """K."""
        return len(self.bags[0])

    @property
    def sizes(self) -> dict[str, int]:
        """What the plan of CUDA kernels asks, as keywords of ``backends.explain``."""
        return {
            "episodes": self.episodes,
            "queries": self.queries,
            "ways": self.ways,
            "dim": self.dim,
            "pixels": self.height * self.width,
            "total": sum(map(sum, self.bags)) + self.spare,
        }

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Shape of the result with ``concat=True``."""
        return (self.episodes, self.queries, self.ways, 2 * self.dim, self.height, self.width)

    def make(
        self,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> tuple[Tensor, ...]:
        """(feat, protos, offsets): ReLU of normal numbers, as behind a ResNet's last block.

        The same numbers on every device.
        """
        generator = torch.Generator().manual_seed(seed)

        def features(*shape: int) -> Tensor:
            values = torch.randn(*shape, generator=generator, dtype=torch.float64) + self.mean
            return values.relu()

        feat = features(self.episodes, self.queries, self.height, self.width, self.dim)
        counts = torch.tensor([0, *(n for episode in self.bags for n in episode)])
        offsets = counts.cumsum(0).to(torch.int32)
        protos = features(int(offsets[-1]) + self.spare, self.dim)
        if self.duplicated:
            protos[:] = protos[:1]
        if self.constant:
            feat.flatten(0, 3)[::3] = self.mean + 0.1
            protos[::3] = self.mean + 0.1
        feat, protos = feat.to(device, dtype), protos.to(device, dtype)
        feat = feat.movedim(-1, 2)  # [E, Q, D, H, W], channels last in memory
        if self.layout == "nchw":
            feat = feat.contiguous()
        elif self.layout == "strided":
            larger = feat.new_zeros(*feat.shape[:-1], 2 * self.width)
            larger[..., ::2] = feat
            feat = larger[..., ::2]
        return feat, protos, offsets.to(device)


PROBLEMS = [
    Problem("one_image_one_class", ((32,),)),
    Problem("background_and_organ", ((200, 9),)),
    Problem("n_0", ((0,),), dim=64),
    Problem("n_1", ((1,),), dim=64),
    Problem("n_2", ((2,),), dim=64),
    Problem("n_63", ((63,),), dim=64),
    Problem("n_64", ((64,),), dim=64),
    Problem("n_65", ((65,),), dim=64),
    Problem("n_129", ((129,),), dim=64),
    Problem("mixed_bags", ((0, 1, 70), (5, 130, 0)), queries=3, dim=96, height=7, width=9),
    Problem("hw_1", ((3, 4),), dim=40, height=1, width=1),
    Problem("hw_49", ((20, 3),), dim=128, height=7, width=7),
    Problem("hw_257", ((20, 3),), dim=32, height=257, width=1),
    Problem("d_1", ((5,),), dim=1, height=3, width=3),
    Problem("d_5", ((5, 2),), dim=5, height=6, width=6),
    Problem("d_130", ((9,),), dim=130, height=5, width=13),
    Problem("channels_last", ((33, 7),), queries=2, dim=100, layout="channels_last"),
    Problem("strided", ((33, 7),), queries=2, dim=48, height=9, width=5, layout="strided"),
    Problem("spare_rows", ((8, 2),), dim=48, height=4, width=4, spare=11),
    Problem("constant_vectors", ((12, 7),), dim=64, mean=3.0, constant=True),
    Problem("duplicated", ((12,),), dim=64, duplicated=True),
    Problem("mean_over_std_10", ((70, 9),), dim=256, mean=10.0),
]
