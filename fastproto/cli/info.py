# SPDX-License-Identifier: Apache-2.0
"""``fastproto info``: what is installed, and which backends can run here."""

from __future__ import annotations

import argparse
from typing import Any

HELP = "versions, backends, processor"
DESCRIPTION = """\
Show versions, which backends of the fused operation can run on this machine and why the others
cannot, and what processor and GPUs there are. Please paste it into bug reports; it holds no names
and no paths."""
EXAMPLE = """\
  fastproto info
  fastproto info --json > machine.json"""

PACKAGES = ("torch", "numpy", "SimpleITK", "safetensors", "scipy")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(args: argparse.Namespace) -> int:
    """Print the description of this installation."""
    import json

    facts = describe()
    print(json.dumps(facts, indent=2) if args.json else to_text(facts))
    return 0


def describe() -> dict[str, Any]:
    """Versions, processor, GPUs and backends, ready for JSON."""
    import os
    import platform
    from importlib import metadata

    import torch

    from fastproto._version import __version__
    from fastproto.op import backends, library

    gpus = range(torch.cuda.device_count())
    return {
        "fastproto": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "cpu": {"cores": os.cpu_count(), "level": library.cpu_level()},
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(index) for index in gpus],
        "build": library.build_info(),
        "backends": [
            {"name": name, "available": available, "reason": reason}
            for name, available, reason in backends.describe()
        ],
    }


def to_text(facts: dict[str, Any]) -> str:
    """The same facts as aligned lines."""
    cpu = facts["cpu"]
    rows = [
        ("fastproto", facts["fastproto"]),
        ("python", f"{facts['python']}, {facts['platform']}"),
        *facts["packages"].items(),
        ("processor", f"{cpu['cores']} cores, {facts['threads']} threads"),
        ("kernels", cpu["level"] or "none: this is a pure Python installation"),
        ("gpus", ", ".join(facts["gpus"]) or "none"),
    ]
    for backend in facts["backends"]:
        state = "available" if backend["available"] else "not available"
        if backend["reason"]:
            state += f": {backend['reason']}"
        rows.append((f"backend {backend['name']}", state))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
