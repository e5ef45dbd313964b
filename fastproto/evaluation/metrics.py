# SPDX-License-Identifier: Apache-2.0
"""The metrics: one record each, which rows, tables, JSON and the program's help read.

Published "HD95" and "NSD" differ between tools; these are MONAI's, as each definition says. Empty
masks: where both are empty, nothing can be measured and every metric is NaN (averages leave it
out). Where one is empty, shares are 0 and distances NaN: a missed organ has no distance, so it must
be counted beside the averages.

Nothing here imports numpy before something is measured, so that help appears at once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from fastproto.evaluation.surfaces import MaskPair

NSD_TOLERANCE_MM = 2.0


@dataclasses.dataclass(frozen=True)
class Metric:
    """A number that tells how well two masks agree.

    Args:
        name: In rows and JSON.
        title: In tables.
        definition: One line.
        function: Computes it.
        unit: "mm" of distances, none of shares from 0 to 1.
        at_tolerance: Whether the tolerance belongs to its name.
    """

    name: str
    title: str
    definition: str
    function: Callable[[MaskPair], float]
    unit: str = ""
    at_tolerance: bool = False

    def __call__(
        self,
        prediction: ArrayLike,
        truth: ArrayLike,
        spacing: Sequence[float] | None = None,
        nsd_tolerance: float = NSD_TOLERANCE_MM,
    ) -> float:
        """Of two masks; see `MaskPair` for the arguments and what is raised."""
        from fastproto.evaluation.surfaces import MaskPair

        return self.function(MaskPair(prediction, truth, spacing, nsd_tolerance))

    def column(self, nsd_tolerance: float = NSD_TOLERANCE_MM) -> str:
        """Title of its column."""
        if self.at_tolerance:
            return f"{self.title} @ {nsd_tolerance:g} mm"
        return f"{self.title} [{self.unit}]" if self.unit else self.title

    def text(self, value: float) -> str:
        """A value in a table."""
        if math.isnan(value):
            return "-"
        return f"{value:.2f}" if self.unit else f"{value:.3f}"

    def spread(self, value: Mapping[str, float]) -> str:
        """A mean with its standard deviation in a table."""
        std = value["std"]
        return self.text(value["mean"]) + ("" if math.isnan(std) else f" ± {self.text(std)}")


# Of masks of any dimension; the others need volumes.
dice = Metric("dice", "Dice", "2|A&B| / (|A|+|B|) over voxels", lambda pair: pair.overlap())
METRICS: tuple[Metric, ...] = (
    dice,
    Metric(
        "hd95",
        "HD95",
        "mm, larger of the two directed 95th percentiles between border voxels "
        "(MONAI compute_hausdorff_distance, percentile=95)",
        lambda pair: pair.far(95),
        unit="mm",
    ),
    Metric(
        "assd",
        "ASSD",
        "mm, mean of both directed distances between border voxels, pooled "
        "(MONAI compute_average_surface_distance, symmetric=True)",
        lambda pair: pair.mean_distance(),
        unit="mm",
    ),
    Metric(
        "nsd",
        "NSD",
        "share of surface area within the tolerance, marching-cubes elements "
        "(DeepMind surface-distance; MONAI compute_surface_dice, use_subvoxels=True)",
        lambda pair: pair.share_nearby(),  # Nikolov et al., arXiv:1809.04430
        at_tolerance=True,
    ),
)
