# SPDX-License-Identifier: Apache-2.0
"""What every backend of the op is asked: one function a question, collected for each backend.

A test module names its backends and adds the questions to its own tests:

    globals().update(conformance.ask(BACKENDS, values, edges))

A question takes ``backend`` and whichever of ``AXES`` it wants; it is asked of the backends that
have its topic:

* numbers: of all kernels, each family of them;
* edges: what the specification says, so of the reference too;
* unchecked: of kernels that read offsets and temperature themselves, as no host has;
* torch: the op as PyTorch sees it, once for all families;
* opcheck, autocast: the same of registered ops, and of the op as users call it;
* cpu: of a whole op on CPU tensors, whose bits depend neither on a chip nor on the rows to spare;
* memory: of ops and families that care how features lie in memory;
* float64 and tf32: of backends that take it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from support.compare import assert_within_rounding
from support.environment import environment
from support.problems import PROBLEMS, Problem

for _name in ("edges", "registration", "values"):  # failed assertions tell what they compared
    pytest.register_assert_rewrite(f"support.conformance.{_name}")

Op = Callable[..., Tensor]
Question = TypeVar("Question", bound=Callable[..., None])

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMS = ((True, True), (True, False), (False, True), (False, False))
SMALL = Problem("small", ((70, 5),), dim=64, height=8, width=8)
TINY = (
    Problem("mixed", ((0, 1, 7), (5, 3, 0)), queries=2, dim=6, height=3, width=2),
    Problem("channels_last", ((3, 7),), 2, dim=6, height=3, width=2, layout="channels_last"),
    Problem("strided", ((3, 7),), dim=6, height=3, width=2, layout="strided"),
    Problem("spare", ((3, 1),), dim=6, height=1, width=1, spare=2),
)
EXPANDED = Problem("expanded", ((2, 1), (0, 2)), queries=3, dim=16, height=4, width=4)
WRITTEN = Problem("written", ((5, 0, 9),), dim=24, height=2, width=4, spare=70)


def offsets_of(*counts: int) -> Tensor:
    """Offsets of bags of so many prototypes."""
    return torch.tensor([0, *counts]).cumsum(0).to(torch.int32)


def without_dead_half(problems: Sequence[Problem], dtype: torch.dtype) -> list[Problem]:
    """Without those in which a dead vector's gradient leaves the range of float16."""
    return [p for p in problems if not (p.constant and dtype == torch.float16)]


@dataclasses.dataclass(frozen=True)
class Backend:
    """What is asked, and how much it can be asked."""

    name: str  # of the tests
    call: Op  # ``proto_attention`` on it
    topics: frozenset[str]  # of questions
    traced: Callable[[], Op] | None = None  # makes what torch.compile sees of ``call``, if not all
    ops: str = ""  # its pair of registered ops, without "_fwd" and "_bwd"
    modes: tuple[bool, ...] = ()  # the last inputs of these
    says: str = "native backend"  # what it calls itself in an error
    dtypes: tuple[torch.dtype, ...] = DTYPES  # that it takes
    device: str = "cpu"
    variables: Mapping[str, str] = dataclasses.field(default_factory=dict)  # of the environment
    ready: Callable[[], None] = lambda: None  # skips where it cannot run
    # Why it does not take a problem.
    refusal: Callable[[Problem, torch.dtype], str | None] = lambda problem, dtype: None
    # Within rounding, in a type; equal to the reference; differentiated (``fast``: along one
    # direction) and given to opcheck; and where the size does not matter.
    problems: Callable[[torch.dtype], Sequence[Problem]] = lambda dtype: PROBLEMS
    float64: Sequence[Problem] = tuple(PROBLEMS)
    differentiated: Sequence[Problem] = TINY
    fast: bool = False
    small: Problem = SMALL
    # Within rounding, each in ``forms``: with concat or without, a tensor or a number.
    temperatures: Sequence[float] = (0.001, 0.02, 0.025, 0.05, 1.0, 50.0)
    forms: Sequence[tuple[bool, bool]] = FORMS
    tf32: Op | None = None  # ``call`` with one TF32 product, on ``coarse``
    coarse: Sequence[Problem] = ()
    # Problems whose bits repeat, in ``repeated_dtypes`` and under ``variations``.
    repeated: Sequence[Problem] = (WRITTEN,)
    repeated_dtypes: tuple[torch.dtype, ...] = DTYPES
    variations: Sequence[Callable[[], contextlib.AbstractContextManager[None]]] = (
        contextlib.nullcontext,
    )
    written: Sequence[Problem] = (WRITTEN,)  # of which every element is
    expanded: Problem = EXPANDED  # given as one expanded image, equal to ``expanded_digits``
    expanded_digits: float = 2**-7
    # Relative and absolute error of a single float32 prototype's copy (docs/math.md).
    copied: float = 0.0
    copied_digits: float = 0.0
    # Error of the mean that is left of a constant feature: relative, in eps; or in any type,
    # relative and absolute.
    constant: float = 4.0
    constant_digits: float | None = None
    compiler: str = "aot_eager"  # of torch.compile, in the types ``compiled``
    compiled: tuple[torch.dtype, ...] = (torch.float32,)

    @property
    def half(self) -> tuple[torch.dtype, ...]:
        """Types of two bytes that it takes."""
        return tuple(dtype for dtype in self.dtypes if dtype.itemsize == 2)

    def check(self, problem: Problem, dtype: torch.dtype) -> None:
        """Skip what it does not take."""
        reason = self.refusal(problem, dtype)
        if reason is not None:
            pytest.skip(reason)

    def make(self, problem: Problem, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
        """(feat, protos, offsets), where it takes them."""
        self.check(problem, dtype)
        return list(problem.make(dtype, seed, self.device))

    def leaves(self, problem: Problem, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
        """The same; features and prototypes want gradients."""
        feat, protos, offsets = self.make(problem, dtype, seed)
        return [feat.requires_grad_(), protos.requires_grad_(), offsets]

    def hold(
        self, problem: Problem, dtype: torch.dtype, op: Op | None = None, **options: Any
    ) -> None:
        """To the yardstick, in a problem that it takes."""
        self.check(problem, dtype)
        assert_within_rounding(op or self.call, problem, dtype, device=self.device, **options)


def asked(topic: str) -> Callable[[Question], Question]:
    """A question of this topic."""

    def mark(question: Question) -> Question:
        question.topic = topic  # type: ignore[attr-defined]
        return question

    return mark


Row = dict[str, Any]
AXES: dict[str, Callable[[Backend, Row], Iterable[Any]]] = {
    "dtype": lambda backend, row: backend.dtypes,
    "any_dtype": lambda backend, row: (
        *backend.dtypes,
        *([torch.float64] if "float64" in backend.topics else []),
    ),
    "half": lambda backend, row: backend.half,
    "problem": lambda backend, row: backend.problems(row["dtype"]),
    "in_float64": lambda backend, row: backend.float64,
    "differentiated": lambda backend, row: backend.differentiated,
    "temperature": lambda backend, row: backend.temperatures,
    "form": lambda backend, row: backend.forms,
    "coarse": lambda backend, row: backend.coarse,
    "repeated_dtype": lambda backend, row: backend.repeated_dtypes,
    "repeated": lambda backend, row: backend.repeated,
    "written": lambda backend, row: backend.written,
    "compiled": lambda backend, row: backend.compiled,
}


def _rows(
    question: Callable[..., None], names: Sequence[str], backends: Iterable[Backend]
) -> Iterator[list[Any]]:
    """Every backend that is asked, with each of the values on the axes among ``names``."""
    topic = getattr(question, "topic", "numbers")
    for backend in backends:
        rows: list[Row] = [{"backend": backend}] if topic in backend.topics else []
        for axis in names:
            rows = [{**row, axis: value} for row in rows for value in AXES[axis](backend, row)]
        yield from (list(row.values()) for row in rows)


def _axes(names: Iterable[str]) -> list[str]:
    return [axis for axis in AXES if axis in set(names)]


def _word(value: Any) -> str:
    if isinstance(value, tuple):
        return "-".join(map(str, value))
    return str(getattr(value, "name", value))


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """One that can run, in its environment."""
    found: Backend = request.param
    found.ready()
    with environment(**found.variables):
        yield found


def ask(backends: Sequence[Backend], *modules: ModuleType) -> dict[str, Any]:
    """The questions of some modules that any of the backends is asked, for a test module."""
    found = {
        name: question
        for module in modules
        for name, question in vars(module).items()
        if name.startswith("test_")
        and any(_rows(question, _axes(inspect.signature(question).parameters), backends))
    }

    def generate(metafunc: pytest.Metafunc) -> None:
        if "backend" in metafunc.fixturenames:
            axes = _axes(metafunc.fixturenames)
            rows = list(_rows(metafunc.function, axes, backends))
            ids = ["-".join(map(_word, row)) for row in rows]
            metafunc.parametrize(["backend", *axes], rows, ids=ids, indirect=["backend"])

    return {"backend": backend, "pytest_generate_tests": generate, **found}
