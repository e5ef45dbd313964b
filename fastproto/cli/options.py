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

Options: TypeAlias = argparse._ActionsContainer  # a parser or a group of it


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
    parser.add_argument("--labels", nargs="+", metavar="TABLE",
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


def labels_beside(label: Path) -> dict[int, str] | None:
    """The label table of the data set that a label map is in; None where there is none."""
    folder = label.absolute().parent
    table = folder.parent / "dataset.json"
    if folder.name in ("labels", "labelsTr") and table.is_file():
        return read_labels([str(table)])
    return None


def read_labels(items: Sequence[str]) -> dict[int, str]:
    """Label value -> name from ``--labels``, a JSON file or NAME=VALUE pairs; no background.

    Raises:
        LabelError: The table cannot be read, is empty or contradicts itself.
    """
    subject: object = "--labels"
    if all("=" in item for item in items):
        pairs = [(value, name) for name, _, value in (item.rpartition("=") for item in items)]
    else:
        require(
            len(items) == 1,
            subject,
            found=" ".join(items),
            allowed="one JSON file, or only NAME=VALUE pairs",
            error=LabelError,
        )
        subject = Path(items[0])
        pairs = _read_table(subject)
    labels: dict[int, str] = {}
    for value, name in pairs:
        require(
            value.isdigit() and int(value) not in labels,
            subject,
            found=f"value {value!r} for {name!r}",
            allowed="a different whole number from 0 for every name",
            error=LabelError,
        )
        labels[int(value)] = name
    labels.pop(0, None)
    allowed = "at least one value above 0"
    require(labels, subject, found="no label", allowed=allowed, error=LabelError)
    return labels


def _read_table(path: Path) -> list[tuple[str, str]]:
    """Values and names of a JSON file, whichever of them is the key."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LabelError(
            path,
            found=f"no readable JSON ({error})",
            allowed='NAME=VALUE pairs, or a JSON file such as {"1": "liver", "2": "spleen"}',
        ) from error
    if isinstance(content, dict) and isinstance(content.get("labels"), dict):
        content = content["labels"]
    found = type(content).__name__
    require(isinstance(content, dict), path, found=found, allowed="a JSON object", error=LabelError)
    return [
        (key, str(other)) if key.lstrip("-").isdigit() else (str(other), key)
        for key, other in content.items()
    ]


def choose_classes(wanted: Sequence[str], labels: Mapping[int, str], option: str) -> list[int]:
    """Label values of organs given by name or by value.

    Raises:
        LabelError: A name or value is not in ``labels``.
    """
    by_name = {name.casefold(): value for value, name in labels.items()}
    by_name |= {str(value): value for value in labels}
    unknown = [item for item in wanted if item.casefold() not in by_name]
    found = ", ".join(item or "an empty name" for item in unknown)
    known = ", ".join(f"{name} ({value})" for value, name in labels.items())
    require(not unknown, option, found=found, allowed=known, error=LabelError)
    return [by_name[item.casefold()] for item in wanted]


def whole_number(allowed: str, least: int = 0, **words: Any) -> Callable[[str], Any]:
    """What parses a number, or one of these words, for argparse."""

    def parse(text: str) -> Any:
        if text in words:
            return words[text]
        if not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"found {text!r}; allowed: {allowed}")
        return int(text)

    return parse


positive = whole_number("a whole number above 0", 1)
steps = whole_number("auto, or a number from 0", auto="auto")
