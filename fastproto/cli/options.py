# SPDX-License-Identifier: Apache-2.0
"""What subcommands share: the shape of their help, runtime options and label tables.

Nothing here imports torch, numpy or SimpleITK before the arguments are parsed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from fastproto.errors import ArgumentError, LabelError

if TYPE_CHECKING:
    import torch

Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def new_parser(
    subparsers: Subparsers,
    name: str,
    run: Callable[[argparse.Namespace], int],
    *,
    help: str,
    description: str,
    example: str,
    argument_default: str | None = None,
) -> argparse.ArgumentParser:
    """A subcommand whose help ends with a runnable example."""
    parser = subparsers.add_parser(
        name,
        help=help,
        description=description,
        epilog=f"example:\n{example}",
        formatter_class=_HelpFormatter,
        argument_default=argument_default,
    )
    parser.add_argument(
        "-v", "--verbose", action="store_true", default=False, help="show the traceback of an error"
    )
    parser.set_defaults(run=run)
    return parser


def add_runtime_options(parser: argparse.ArgumentParser) -> None:
    """``--device`` and ``--threads``."""
    group = parser.add_argument_group("runtime")
    group.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where to compute; auto takes the GPU if there is one",
    )
    group.add_argument(
        "--threads",
        type=positive,
        default=None,
        metavar="N",
        help="processor threads (default: all cores)",
    )


@contextmanager
def runtime(args: argparse.Namespace) -> Iterator[torch.device]:
    """Apply the runtime options, yield the device to use, and set the threads back."""
    import torch

    device = choose_device(args.device)
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


def add_series_option(parser: argparse.ArgumentParser) -> None:
    """``--series``."""
    parser.add_argument(
        "--series",
        metavar="UID",
        help="SeriesInstanceUID, where a DICOM folder holds several series",
    )


def choose_device(name: str) -> torch.device:
    """The device that ``auto``, ``cpu`` or ``cuda`` means here.

    Raises:
        ArgumentError: ``cuda`` where there is none.
    """
    import torch

    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ArgumentError(
            "--device",
            found="cuda, but torch sees no CUDA device",
            allowed="auto or cpu on this machine",
            fix="Check the driver, and that torch was installed with CUDA.",
        )
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def add_label_options(parser: argparse._ActionsContainer) -> None:
    """``--labels``: what the values of a label map are called."""
    parser.add_argument(
        "--labels",
        nargs="+",
        metavar="TABLE",
        help="names of the label values: a JSON file ({'1': 'liver'}, {'liver': 1} or a "
        "dataset.json), or NAME=VALUE pairs such as liver=1 (default: those of the data set that "
        "the label map is in)",
    )


def labels_beside(label: Path) -> dict[int, str] | None:
    """The label table of the data set that a label map is in; None where there is none."""
    table = label.absolute().parent.parent / "dataset.json"
    if label.absolute().parent.name in ("labels", "labelsTr") and table.is_file():
        return read_labels([str(table)])
    return None


def read_labels(items: Sequence[str]) -> dict[int, str]:
    """Label value -> name from ``--labels``, background left out.

    Args:
        items: One JSON file, or NAME=VALUE pairs.

    Raises:
        LabelError: The table cannot be read, is empty or contradicts itself.
    """
    if all("=" in item for item in items):
        pairs = [tuple(reversed(item.rsplit("=", 1))) for item in items]
        return _table("--labels", pairs)
    if len(items) > 1:
        raise LabelError(
            "--labels", found=" ".join(items), allowed="one JSON file, or only NAME=VALUE pairs"
        )
    path = Path(items[0])
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
    if not isinstance(content, dict):
        raise LabelError(path, found=type(content).__name__, allowed="a JSON object")
    return _table(path, [_value_first(*item) for item in content.items()])


def choose_classes(wanted: Sequence[str], labels: dict[int, str], option: str) -> list[int]:
    """Label values of organs given by name or by value.

    Raises:
        LabelError: A name or value is not in ``labels``.
    """
    by_name = {name.casefold(): value for value, name in labels.items()}
    by_name |= {str(value): value for value in labels}
    if unknown := [item for item in wanted if item.casefold() not in by_name]:
        known = ", ".join(f"{name} ({value})" for value, name in labels.items())
        raise LabelError(option, found=", ".join(unknown), allowed=known)
    return [by_name[item.casefold()] for item in wanted]


def positive(text: str) -> int:
    """Parse a whole number above 0, for argparse."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}; allowed: a whole number above 0")
    return int(text)


def steps(text: str) -> int | str:
    """Parse a number of steps or "auto", for argparse."""
    if text == "auto":
        return text
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"found {text!r}; allowed: auto, or a number from 0")
    return int(text)


class _HelpFormatter(argparse.HelpFormatter):
    """Wraps descriptions and help, and leaves examples as they were written."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith("example:"):
            return text
        return super()._fill_text(text, width, indent)


def _value_first(key: str, content: object) -> tuple[str, str]:
    """One entry of a JSON table, written either way round, as (value, name)."""
    return (key, str(content)) if key.lstrip("-").isdigit() else (str(content), key)


def _table(subject: object, pairs: Sequence[tuple[str, ...]]) -> dict[int, str]:
    labels: dict[int, str] = {}
    for value, name in pairs:
        if not value.isdigit() or int(value) in labels:
            raise LabelError(
                subject,
                found=f"value {value!r} for {name!r}",
                allowed="a different whole number from 0 for every name",
            )
        labels[int(value)] = name
    labels.pop(0, None)
    if not labels:
        raise LabelError(subject, found="no label", allowed="at least one value above 0")
    return labels
