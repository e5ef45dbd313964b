# SPDX-License-Identifier: Apache-2.0
"""What subcommands share: runtime options, label tables, and options from fields of settings.

Nothing here imports torch, numpy or SimpleITK before the arguments are parsed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from fastproto.errors import LabelError, require
from fastproto.training.config import describe

if TYPE_CHECKING:
    import torch

    from fastproto.data.label_table import LabelTable

Options: TypeAlias = argparse._ActionsContainer  # a parser or a group of it


class Once(argparse._StoreAction):
    """Of a file to read or write: given again, the first would be lost without a word."""

    given = False

    def __call__(self, parser: argparse.ArgumentParser, *rest: Any) -> None:
        if self.given:
            raise argparse.ArgumentError(self, "found twice; allowed: once")
        self.given = True
        super().__call__(parser, *rest)


EXIT_SOME_FAILED = 2  # some of several scans or cases, the others are done
ONE_FILE: dict[str, Any] = {"type": Path, "action": Once, "required": True}


def add_fields(
    config: Any, groups: Mapping[str, Options], /, **types: Callable[[str], object]
) -> None:
    """An option for every field of a dataclass that has a flag and is of one of the groups.

    Args:
        config: Its fields' metadata are `fastproto.training.config.Option`.
        groups: Where the options of a group go.
        types: Which function reads the text of a field; else the metadata say it.
    """
    for option in fields(config):
        about = option.metadata
        if about.get("flag") and about["group"] in groups:
            flag, _, metavar = about["flag"].partition(" ")
            argument = {**about["allowed"].argument, **about["argument"]}
            argument |= {"metavar": metavar} if metavar else {}
            argument |= {"type": types[option.name]} if option.name in types else {}
            group = groups[about["group"]]
            group.add_argument(flag, dest=option.name, help=describe(option), **argument)


def given(config: Any, args: argparse.Namespace) -> dict[str, Any]:
    """The fields of ``config`` that the command line gives, where absent ones are suppressed."""
    flags = {option.name for option in fields(config) if option.metadata.get("flag")}
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(args).items()
        if name in flags
    }


def read_settings(pairs: Iterable[str]) -> dict[str, Any]:
    """``NAME=VALUE`` pairs; a value is JSON where it can be, else text."""
    settings: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        require(equals, "--set", found=pair, allowed="NAME=VALUE")
        try:
            settings[name] = json.loads(text)
        except ValueError:
            settings[name] = text
    return settings


# fmt: off
def add_runtime_options(parser: argparse.ArgumentParser) -> None:
    """``--device`` and ``--threads``."""
    group = parser.add_argument_group("runtime")
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto",
        help="where to compute; auto takes the GPU if there is one")
    group.add_argument("--threads", type=positive, default=None, metavar="N",
        help="processor threads (default: all cores)")


def add_series_option(parser: Options) -> None:
    """``--series``."""
    parser.add_argument("--series", metavar="UID",
        help="SeriesInstanceUID, where a DICOM folder holds several series")


def add_force_option(parser: Options) -> None:
    """``--force``."""
    parser.add_argument("--force", action="store_true",
        help="go on with a scan whose values are not what the model was trained on: a CT that is "
        "not in Hounsfield units, a CT where MR is expected, MR where CT is, PET")


def add_label_options(parser: Options) -> None:
    """``--labels``: what the values of a label map are called."""
    parser.add_argument("--labels", nargs="+", action="extend", metavar="TABLE",
        help="names of the label values: a JSON file ({'1': 'liver'}, {'liver': 1} or a "
        "dataset.json), or NAME=VALUE pairs such as liver=1 (default: those of the data set that "
        "the label map is in)")
# fmt: on


@contextmanager
def runtime(args: argparse.Namespace) -> Iterator[torch.device]:
    """Apply the runtime options, yield the device to use, and set the threads back.

    Raises:
        ArgumentError: CUDA where there is none.
    """
    import torch

    available = torch.cuda.is_available()
    require(
        available or args.device != "cuda",
        "--device",
        found="cuda, but torch sees no CUDA device",
        allowed="auto or cpu on this machine",
        fix="Check the driver, and that torch was installed with CUDA.",
    )
    device = torch.device("cuda" if available and args.device != "cpu" else "cpu")
    threads = torch.get_num_threads()
    try:
        if args.threads:
            torch.set_num_threads(args.threads)
        yield device
    finally:
        torch.set_num_threads(threads)


@contextmanager
def progress_bar(title: str, unit: str) -> Iterator[Callable[..., None]]:
    """A bar on a terminal; yields what moves it: ``advance(done, total)``, with a loss or not."""
    from tqdm import tqdm

    with tqdm(desc=title, unit=unit, leave=False, disable=None) as bar:

        def advance(done: int, total: int, loss: float | None = None) -> None:
            bar.total = total
            if loss is not None:
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update(done - bar.n)

        yield advance


def read_labels(items: Sequence[str]) -> LabelTable:
    """The names from ``--labels``: a JSON file, or NAME=VALUE pairs.

    Raises:
        LabelError: The table cannot be read, is empty or contradicts itself.
    """
    from fastproto.data.label_table import label_table, read_json

    pairs: list[tuple[str, object]] = []
    subject: object = "--labels"
    for item in items if all("=" in item for item in items) else ():
        name, _, value = item.rpartition("=")
        pairs.append((name, int(value) if value.isdecimal() else value))
    if not pairs:
        require(
            len(items) == 1,
            subject,
            found=" ".join(items),
            allowed="one JSON file, or only NAME=VALUE pairs",
            error=LabelError,
        )
        subject = Path(items[0])
        allowed = 'NAME=VALUE pairs, or a JSON file such as {"1": "liver", "2": "spleen"}'
        content = read_json(subject, allowed, LabelError)
        labels = content.get("labels")
        pairs = list((labels if isinstance(labels, dict) else content).items())
    table = label_table(pairs, subject)
    allowed = "at least one value above 0"
    require(table.names, subject, found="no label", allowed=allowed, error=LabelError)
    return table


def whole_number(allowed: str, least: int = 0, **words: Any) -> Callable[[str], Any]:
    """What parses a number, or one of these words, for argparse."""

    def parse(text: str) -> Any:
        if text in words:
            return words[text]
        if not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"found {text!r}; allowed: {allowed}")
        return int(text)

    return parse


def shard(text: str) -> tuple[int, int]:
    """``I/N``, part I of N, counted from 1, for argparse."""
    part, slash, parts = text.partition("/")
    numbers = part.isdigit() and parts.isdigit()
    if not slash or not numbers or not 1 <= int(part) <= int(parts):
        raise argparse.ArgumentTypeError(
            f"found {text!r}; allowed: I/N with I from 1 to N, such as 1/8 to 8/8"
        )
    return int(part), int(parts)


positive = whole_number("a whole number above 0", 1)
steps = whole_number("auto, or a number from 0", auto="auto")
