# SPDX-License-Identifier: Apache-2.0
"""The program ``fastproto``: one subcommand per module of this package.

A module has HELP, DESCRIPTION, EXAMPLE, ``add_options`` and ``run``. Parsing arguments imports
neither torch nor numpy nor SimpleITK, so that help appears at once; each subcommand imports what it
needs when it runs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

from fastproto._files import abandon
from fastproto._version import __version__
from fastproto.cli import crossval, evaluate, export, info, learn, phantom, report, segment, train
from fastproto.errors import FastprotoError, FastprotoWarning

COMMANDS = (phantom, train, learn, segment, evaluate, report, crossval, export, info)
FORMER_NAMES = {"register": "learn"}

DESCRIPTION = "Segment an organ nobody trained for, in CT and MR, from one annotated scan."
EXAMPLE = """\
  fastproto phantom --out phantom-ct --patients 8
  fastproto segment --example phantom-ct/images/ct_000.nii.gz phantom-ct/labels/ct_000.nii.gz \\
      --classes spleen "left kidney" -i phantom-ct/images -o results
  fastproto evaluate --prediction results --truth phantom-ct --labels spleen=2 "left kidney=4"
  fastproto train --data phantom-ct --model base --minutes 10 --out run"""

EXIT_INPUT_ERROR = 2
EXIT_INTERRUPTED = 130
_INTERRUPTED = "fastproto: interrupted"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; ``argv`` has no program's name, None takes the command line's.

    Returns:
        0, 2 for input that cannot be used (its message is on stderr), 130 after Ctrl-C.

    A `FastprotoWarning` is a line on stderr, and letters that a stream lacks are escaped.
    """
    try:
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                # A terminal may lack the letters of a file's name; a log shows each line at once.
                stream.reconfigure(errors="backslashreplace", line_buffering=True)
        words = list(sys.argv[1:] if argv is None else argv)
        words[:1] = [FORMER_NAMES.get(word, word) for word in words[:1]]
        args = _parser().parse_args(words)
        with _warnings_in_a_line(), _interruptible_imports():
            return args.run(args)
    except FastprotoError as error:
        if args.verbose:
            traceback.print_exc()
        print(f"fastproto: error: {error}", file=sys.stderr)
        return EXIT_INPUT_ERROR
    except KeyboardInterrupt:
        print(_INTERRUPTED, file=sys.stderr)
        return EXIT_INTERRUPTED


@contextlib.contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    """Print each different `FastprotoWarning` once, in a line; other warnings as Python does."""
    said: set[str] = set()
    with warnings.catch_warnings():
        warnings.simplefilter("always", FastprotoWarning)
        others = warnings.showwarning

        def show(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
            if not issubclass(category, FastprotoWarning):
                others(message, category, *where, **more)
            elif str(message) not in said:
                said.add(str(message))
                from tqdm import tqdm  # an unfinished bar stays below

                tqdm.write(f"fastproto: warning: {message}", file=sys.stderr)

        warnings.showwarning = show
        yield


@contextlib.contextmanager
def _interruptible_imports() -> Iterator[None]:
    """End at once where Ctrl-C comes during an import: libraries catch it there or trip over it."""
    former = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(former):
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        while frame is not None:
            if frame.f_code.co_filename.startswith("<frozen importlib"):
                abandon()
                print(_INTERRUPTED, file=sys.stderr, flush=True)
                os._exit(EXIT_INTERRUPTED)
            frame = frame.f_back
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastproto",
        description=DESCRIPTION,
        epilog=f"example:\n{EXAMPLE}",
        formatter_class=_HelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fastproto {__version__}")
    subparsers = parser.add_subparsers(title="subcommands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        subparser = subparsers.add_parser(
            command.__name__.rpartition(".")[2],
            help=command.HELP,
            description=command.DESCRIPTION,
            epilog=f"example:\n{command.EXAMPLE}",
            formatter_class=_HelpFormatter,
        )
        subparser.add_argument(
            "-v", "--verbose", action="store_true", help="show the traceback of an error"
        )
        subparser.set_defaults(run=command.run)
        command.add_options(subparser)
    return parser


class _HelpFormatter(argparse.HelpFormatter):
    """Wraps descriptions and help, and leaves examples as they were written."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith("example:"):
            return text
        return super()._fill_text(text, width, indent)
