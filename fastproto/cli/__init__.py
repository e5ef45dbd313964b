# SPDX-License-Identifier: Apache-2.0
"""The program ``fastproto``: one subcommand per module of this package.

Parsing arguments imports neither torch nor numpy nor SimpleITK, so that help appears at once; each
subcommand imports what it needs when it runs.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence

from fastproto._version import __version__
from fastproto.cli import crossval, evaluate, info, learn, phantom, segment, train
from fastproto.errors import FastprotoError

COMMANDS = (phantom, train, learn, segment, evaluate, crossval, info)
FORMER_NAMES = {"register": "learn"}

DESCRIPTION = "Segment an organ nobody trained for, in CT and MR, from one annotated scan."

EXAMPLE = """\
example:
  fastproto phantom --out phantom-ct --patients 8
  fastproto segment --example phantom-ct/images/ct_000.nii.gz phantom-ct/labels/ct_000.nii.gz \\
      --classes spleen "left kidney" -i phantom-ct/images -o results
  fastproto evaluate --prediction results --truth phantom-ct --labels spleen=2 "left kidney=4"
  fastproto train --data phantom-ct --model base --minutes 10 --out run"""

EXIT_INPUT_ERROR = 2
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit status.

    Args:
        argv: Arguments without the program's name; None takes the command line's.

    Returns:
        0, 2 for input that cannot be used (its message is on stderr), 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    words[:1] = [FORMER_NAMES.get(word, word) for word in words[:1]]
    args = _parser().parse_args(words)
    try:
        return args.run(args)
    except FastprotoError as error:
        if args.verbose:
            traceback.print_exc()
        print(f"fastproto: error: {error}", file=sys.stderr)
        return EXIT_INPUT_ERROR
    except KeyboardInterrupt:
        print("fastproto: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastproto",
        description=DESCRIPTION,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fastproto {__version__}")
    subparsers = parser.add_subparsers(title="subcommands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(subparsers)
    return parser
