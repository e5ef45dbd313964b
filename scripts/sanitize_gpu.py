# SPDX-License-Identifier: Apache-2.0
"""The native CUDA kernels on a few small problems: what compute-sanitizer watches.

compute-sanitizer --tool racecheck python scripts/sanitize_gpu.py --for racecheck

Forward and backward, every family of kernels that this GPU has, forced. Values are not
compared: the tests do that.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "python_tests"))

import torch
from support.problems import Problem
from torch import Tensor

import fastproto
from fastproto.errors import ArgumentError
from fastproto.op import backends, library

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Tails of pixels, prototypes and channels; several bags of a tile; one that is full.
TAILS = Problem("tails", ((0, 70), (5, 1)), queries=2, dim=72, height=4, width=6, spare=3)
ODD = Problem("odd", ((33, 7),), dim=37, height=5, width=7)
FULL = Problem("full", ((130,),), dim=512, height=8, width=8)
LAYOUTS = ("nchw", "channels_last")


def cases(tool: str) -> Iterator[tuple[Problem, torch.dtype, str]]:
    """Racecheck takes its time: one type stands for both of two bytes, one layout for both."""
    for dtype in DTYPES:
        if tool == "racecheck" and dtype == torch.float16:
            continue
        for layout in LAYOUTS if tool != "racecheck" else LAYOUTS[:1]:
            for problem in (TAILS, ODD, FULL):
                yield problem, dtype, layout


def with_layout(problem: Problem, dtype: torch.dtype, layout: str) -> list[Tensor]:
    """Operands whose every byte was copied from the host."""
    feat, protos, offsets = problem.make(dtype)
    if layout == "channels_last":
        return [x.cuda() for x in (feat.movedim(2, -1).contiguous(), protos, offsets)]
    return [x.cuda() for x in (feat, protos, offsets)]


def run_op(problem: Problem, dtype: torch.dtype, layout: str) -> None:
    """Forward without and with a backward; the temperature is a number, then a tensor."""
    feat, protos, offsets = with_layout(problem, dtype, layout)
    if layout == "channels_last":
        feat = feat.movedim(-1, 2)
    with torch.no_grad():
        fastproto.proto_attention(feat, protos, offsets, backend="native")
    feat.requires_grad_()
    protos.requires_grad_()
    t = torch.tensor(0.05).cuda().requires_grad_()
    for temperature, leaves in ((0.05, (feat, protos)), (t, (feat, protos, t))):
        out = fastproto.proto_attention(
            feat, protos, offsets, temperature=temperature, backend="native"
        )
        torch.autograd.grad(out, leaves, torch.ones(out.shape, dtype=dtype).cuda())
    torch.cuda.synchronize()


def main() -> int:
    """Run them, and say how many."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--for", dest="tool", default="memcheck", help="the sanitizer's tool")
    tool = parser.parse_args().tool
    broken = library.cuda_is_broken()
    if broken is not None:
        print(f"sanitize_gpu.py: the native backend does not run: {broken}", file=sys.stderr)
        return 1
    reason = backends.why_not("native", "cuda")
    if reason is not None:
        print(f"sanitize_gpu.py: nothing to run: {reason}", file=sys.stderr)
        return 2
    runs = 0
    for family in backends.CUDA_FAMILIES:
        os.environ["FASTPROTO_CUDA_KERNELS"] = family
        for problem, dtype, layout in cases(tool):
            last = layout == "channels_last"
            try:
                backends.explain(**problem.sizes, dtype=dtype, channels_last=last, save=True)
            except ArgumentError:
                continue  # not for this family, chip, type or size
            run_op(problem, dtype, layout)
            runs += 1
            print(family, problem.name, str(dtype)[6:], layout, flush=True)
    del os.environ["FASTPROTO_CUDA_KERNELS"]
    print(f"{runs} problems")
    return 0


if __name__ == "__main__":
    sys.exit(main())
