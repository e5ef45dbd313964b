# SPDX-License-Identifier: Apache-2.0
"""The native op of the CPU, and the reference, by the questions that every backend is asked."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
from support import conformance
from support.conformance import WRITTEN, Backend, edges, registration, values
from support.problems import PROBLEMS

import fastproto.op.native  # noqa: F401  (defines torch.ops.fastproto)
from fastproto import proto_attention

TOPICS = ("numbers", "edges", "torch", "opcheck", "autocast", "cpu", "memory", "float64")


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


BACKENDS = [
    Backend(
        "native",
        functools.partial(proto_attention, backend="native"),
        frozenset(TOPICS),
        ops="fastproto::proto_attention",
        repeated=(WRITTEN, *PROBLEMS[:2], PROBLEMS[9]),
        variations=[functools.partial(threads, count) for count in (1, 2, 3, 2)],
        # Roundings in float64: a mean of seven has 7 here and 8 in the kernel, and F and G * F one
        # each.
        constant=17 / 2,
        compiler="inductor",
    ),
    Backend(
        "reference",
        functools.partial(proto_attention, backend="reference"),
        frozenset({"edges"}),
    ),
]
globals().update(conformance.ask(BACKENDS, values, edges, registration))
