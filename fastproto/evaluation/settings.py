# SPDX-License-Identifier: Apache-2.0
"""What a cross-validation measures and compares: names, what they mean, and every option.

A new option is one new field: its metadata, an `Option`, says all else about it. Nothing here
imports torch or numpy, so that help appears at once.
"""

# ruff: noqa: RUF009 - `_option` and `_list` are `field`s
from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Literal

from fastproto.errors import require
from fastproto.training.config import Allowed, Option

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

_ANY = Allowed("anything", lambda value: True)


def _option(flag: str, help: str, *, group: Any = "", argument: Any = (), **default: Any) -> Any:
    """A field with a ``default`` or a ``default_factory``; the rest is for `Option`."""
    option = Option(_ANY, flag, help=help, group=group, argument=dict(argument))
    return field(**default, metadata=vars(option))


def _list(flag: str, help: str, *, default: Any = (), group: str = "", **argument: Any) -> Any:
    argument = {"nargs": "+", "action": "extend", **argument}
    return _option(flag, help, default=default, group=group, argument=argument)


# fmt: off
@dataclass(frozen=True)
class MethodOptions:
    """How the methods work."""

    view: str = _option("--view", default="organ", argument={"choices": VIEWS},
        help="EP1 and EP2: field of view, around the organ's expected place or the whole body")
    prior: str = _option("--prior", default="deformable",
        argument={"choices": ("box", "affine", "deformable")},
        help="what network and prior use; all are measured alone")
    slices: int = _option("--slices N", default=12,
        help="annotated slices of an organ, for whole volumes")
    adapt_steps: int | Literal["auto"] = _option("--adapt-steps N", default="auto",
        help="of the method adapted")
    one_scan_steps: int = _option("--one-scan-steps N", default=300, help="of the method one-scan")


@dataclass(frozen=True)
class CrossValidation:
    """What to measure, on what, after which training; ArgumentError where it does not fit together.

    Each field's help says what it is. Beyond that: annotated cases that are no test cases may have
    been seen in training; a ``z_margin`` of None counts all slices; cases that ``training`` holds
    out are held out beside the tests.
    """

    data: str = _option("--data DIR", "data set with labels", argument={"required": True})
    output: str = _option("--out OUT", "folder for all results", argument={"required": True})
    _: KW_ONLY
    modality: Literal["ct", "mr"] | None = _option("--modality", default=None,
        argument={"choices": ("ct", "mr")},
        help="modality of the data, where dataset.json does not say")
    folds: int = _option("--folds N", default=5, group="cases",
        help="folds, consecutive in the data set's order; the scan after a fold is tested with it")
    test_cases: tuple[str, ...] = _list("--test-cases CASE", "one fold of these cases",
        group="cases")
    annotated: tuple[str, ...] = _list("--annotated CASE",
        help="cases to learn from, each in turn (default: all, every test case)")
    classes: tuple[str | int, ...] = _list("--classes ORGAN", "organs, by name or label value")
    setting: int = _option("--setting", default=1, argument={"type": int, "choices": (1, 2)},
        help="1: training slices may show the organs, unnamed; 2: training slices with any organ "
        "of the group are dropped")
    groups: tuple[tuple[str | int, ...], ...] = _list("--groups ORGAN,ORGAN",
        help="setting 2: organs held out together; one training each")
    methods: tuple[str, ...] = _list("--methods METHOD", default=USUAL, choices=METHODS,
        help="; ".join(f"{name}: {meaning}" for name, meaning in METHODS.items())
        + f" (default: all but {', '.join(METHODS.keys() - USUAL)})")
    protocols: tuple[str, ...] = _list("--protocols PROTOCOL", default=tuple(PROTOCOLS),
        choices=PROTOCOLS,
        help="ep1: an annotated slice for each third of the organ; ep2: one slice for all of it; "
        "whole: whole volumes (default: all)")
    z_margin: int | None = _option("--z-margin N", default=0,
        help="EP1 and EP2: slices beyond the organ that count as well, or all")
    options: dict[str, Any] = field(default_factory=dict)  # see `MethodOptions`
    model: str | None = _option("--model RUN", default=None, group="training",
        help="run folder, model file or base: train nothing; none: only registration")
    more_data: tuple[str, ...] = _list("--more-data DIR", "further data to train on",
        group="training")
    training: dict[str, Any] = _option("--set NAME=VALUE", default_factory=dict, group="training",
        argument={"nargs": "+", "action": "extend"},
        help="fields of fastproto.training.TrainConfig, such as minutes=30; without more, training "
        "sees no label")
    device: str = "cpu"
    progress: bool = True  # bars on stderr
    # fmt: on

    def __post_init__(self) -> None:
        require(
            (self.setting == 2) == bool(self.groups),
            "groups",
            found="groups of organs in setting 1" if self.groups else "none in setting 2",
            allowed="one or more groups in setting 2, none in setting 1",
        )
        require(
            self.model != NO_MODEL or not self.needing_model,
            "methods",
            found=f"{', '.join(self.needing_model)} without a model",
            allowed=", ".join(WITHOUT_MODEL),
        )

    @property
    def needing_model(self) -> list[str]:
        """The methods that need a model."""
        return [name for name in self.methods if name not in WITHOUT_MODEL]
