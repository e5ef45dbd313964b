# SPDX-License-Identifier: Apache-2.0
"""``fastproto export``: the network as a file that runs without this package."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fastproto._files import check_writable
from fastproto.cli import options
from fastproto.cli.learn import add_model_option
from fastproto.errors import require

HELP = "write the network as ONNX or for AOTInductor, for programs without this package"
DESCRIPTION = """\
Write the network as a file that other programs run: images and the prototypes of a task in,
probabilities out, for any number of images, classes and prototypes. A task that adapted the network
needs a file of its own, made with --task. The file's answers are compared with the network's before
it replaces another. examples/onnx_segment.py uses one without torch."""
EXAMPLE = """\
  fastproto export --onnx model.onnx
  fastproto export --task organs.task --onnx organs.onnx"""


# fmt: off
def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--onnx", **options.ONE_FILE | {"required": False}, metavar="FILE",
        help="ONNX file to write, of standard operators alone; it takes images of any size")
    parser.add_argument("--aoti", **options.ONE_FILE | {"required": False}, metavar="FILE",
        help="AOTInductor package to write (.pt2): machine code for this kind of processor or GPU "
        "that torch runs without Python; it takes images of the model's size")
    add_model_option(parser, backend=False)
    parser.add_argument("--task", type=Path, action=options.Once, metavar="TASK",
        help="task file whose adapted weights the network is to have")
    options.add_runtime_options(parser)
# fmt: on


def run(args: argparse.Namespace) -> int:
    """Write the files."""
    from fastproto.nn.weights import checksum, read_safetensors
    from fastproto.segmentation import Task, load_model
    from fastproto.segmentation.task import known_preprocessing

    wanted = [path for path in (args.onnx, args.aoti) if path]
    allowed = "--onnx FILE, --aoti FILE or both"
    require(wanted, "export", found="nothing to write", allowed=allowed)
    for path in wanted:
        check_writable(path)
    with options.runtime(args) as device:
        from fastproto.nn import export

        if args.onnx:
            export.check_onnx()
        if args.aoti:
            export.check_aoti(args.aoti)
        model = load_model(args.model)
        about: dict[str, Any] = {"fingerprint": model.fingerprint()}
        if args.task:
            task = Task.load(args.task)
            task.check_model(model, name=args.task, fingerprint=about["fingerprint"])
            about["task"] = checksum(read_safetensors(args.task)[0])
            known = [task.preprocessing]
            model = task.adapted(model)
        else:
            known = [*known_preprocessing(model).values()]
        about["preprocessing"] = {each.modality: each.to_dict() for each in known}
        if args.onnx:
            _report(args.onnx, export.export_onnx(model, args.onnx, about))
        if args.aoti:
            size = max(each.image_size for each in known)
            _report(args.aoti, export.export_aoti(model.to(device), args.aoti, size, about))
    return 0


def _report(path: Path, difference: float) -> None:
    print(
        f"{path}: {path.stat().st_size / 1e6:.1f} MB, its probabilities differ from the network's "
        f"by {difference:.1g} at most"
    )
