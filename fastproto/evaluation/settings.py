# SPDX-License-Identifier: Apache-2.0
"""What a cross-validation measures and compares: names, and what they mean.

Nothing here imports torch or numpy, so that help appears at once.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from fastproto.errors import ArgumentError

METHODS = {
    "fastproto": "without adaptation",
    "adapted": "with it",
    "prototypes": "the same encoder without a decoder",
    "one-scan": "the same network trained on the annotated scan alone",
    "registration": "the annotated organs carried over",
}
USUAL = tuple(name for name in METHODS if name != "one-scan")
WITHOUT_MODEL = ("registration",)
EPISODIC = ("fastproto", "prototypes")  # those that EP1 and EP2 are defined for
PROTOCOLS = {
    "ep1": "EP1: three annotated slices, the organ's extent is given, one organ at a time",
    "ep2": "EP2: one annotated slice, the organ's slices alone count, one organ at a time",
    "whole": "Whole volumes: every slice counts, all organs at once",
}
VIEWS = ("organ", "body")
NO_MODEL = "none"


@dataclasses.dataclass(frozen=True)
class CrossValidation:
    """What to measure, on what, after which training.

    Args:
        data: Data set with labels.
        output: Folder for results and trainings.
        test_cases: The only cases to test, in one fold; empty for ``folds``.
        folds: Number of folds, see `fastproto.evaluation.protocol.folds`.
        setting: 1: the organs may occur in training slices, as tissue without a name. 2: a training
            slice that shows any of a group's organs is dropped.
        classes: Organs to segment, names or label values; empty for all.
        groups: Setting 2: organs that are held out together; one training for each group.
        annotated: Cases to learn from, each in turn; empty for every test case. Those that are no
            test cases may have been seen in training.
        model: A model file or run folder, or "base", to use instead of training; "none" for methods
            that need none; None to train.
        more_data: Further data sets to train on.
        training: Fields of `TrainConfig`. Unless they say so, training sees no label. Cases to hold
            out are held out beside the tests.
        methods: Of ``METHODS``.
        protocols: Of ``PROTOCOLS``.
        z_margin: Which slices count in EP1 and EP2, see `counted_slices`.
        options: Of `make_method`.
        device: "cpu" or "cuda".
        progress: Show progress bars on stderr.

    Raises:
        ArgumentError: Settings that do not fit together.
    """

    data: str
    output: str
    test_cases: tuple[str, ...] = ()
    folds: int = 5
    setting: int = 1
    classes: tuple[str | int, ...] = ()
    groups: tuple[tuple[str | int, ...], ...] = ()
    annotated: tuple[str, ...] = ()
    model: str | None = None
    more_data: tuple[str, ...] = ()
    training: dict[str, Any] = dataclasses.field(default_factory=dict)
    methods: tuple[str, ...] = USUAL
    protocols: tuple[str, ...] = tuple(PROTOCOLS)
    z_margin: int | None = 0
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    device: str = "cpu"
    progress: bool = True

    def __post_init__(self) -> None:
        if (self.setting == 2) != bool(self.groups):
            raise ArgumentError(
                "groups",
                found="groups of organs in setting 1" if self.groups else "none in setting 2",
                allowed="one or more groups in setting 2, none in setting 1",
            )
        if self.model == NO_MODEL and self.needing_model:
            raise ArgumentError(
                "methods",
                found=f"{', '.join(self.needing_model)} without a model",
                allowed=", ".join(WITHOUT_MODEL),
            )

    @property
    def needing_model(self) -> list[str]:
        """The methods that need a model."""
        return [name for name in self.methods if name not in WITHOUT_MODEL]
