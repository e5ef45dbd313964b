# SPDX-License-Identifier: Apache-2.0
"""What experiments share: arguments, and the record that is written."""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"


def arguments(doc: str | None, **paths: str | None) -> argparse.ArgumentParser:
    """A parser that says what the script does and needs these paths, each with its help."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    for name, text in paths.items():
        parser.add_argument(f"--{name}", type=Path, required=True, help=text)
    return parser


def today() -> str:
    """Today's date, as it stands in records and their names."""
    return datetime.date.today().isoformat()


def write_campaign(name: str, packages: Iterable[str], **content: Any) -> Path:
    """A record of a campaign, with the command, the machine and the versions; returns its path."""
    from fastproto.evaluation.report import machine, versions

    path = RESULTS / f"{today()}-{name}.json"
    command = shlex.join(["python", f"scripts/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    about = versions("fastproto", *packages, "python")
    write(path, command=command, machine=machine(), versions=about, **content)
    return path


def write(path: Path, **content: Any) -> None:
    """A record with today's date."""
    record = {"date": today(), **content}
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
