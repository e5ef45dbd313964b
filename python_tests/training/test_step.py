# SPDX-License-Identifier: Apache-2.0
"""One step: AdamW's, none where a number is not finite, and the same from a graph."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from fastproto.losses import EpisodeLoss
from fastproto.nn import FewShotUNet
from fastproto.training import step as step_module
from fastproto.training.episodes import Episode
from fastproto.training.step import Step

pytestmark = pytest.mark.usefixtures("tiny_encoder")
LOSS = EpisodeLoss(class_weights=torch.tensor([0.2, 1.0]))


def episode(seed: int, queries: int = 1) -> Episode:
    generator = torch.Generator().manual_seed(seed)
    masks = torch.zeros(2, 1, 32, 32, dtype=torch.long)
    masks[..., 4 : 20 + seed, 8:24] = 1
    return Episode(
        support_images=torch.randn(2, 1, 3, 32, 32, generator=generator),
        support_masks=masks,
        query_images=torch.randn(2, queries, 3, 32, 32, generator=generator),
        query_masks=masks.expand(-1, queries, -1, -1).clone(),
        num_classes=2,
        description="random",
    )


def make(capture: bool = False) -> tuple[FewShotUNet, Step]:
    torch.manual_seed(0)
    model = FewShotUNet("tiny").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, fused=True)
    return model, Step(model, optimizer, LOSS, 1.0, contextlib.nullcontext, capture=capture)


def same(ones: Iterable[Tensor], others: Iterable[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


def test_equals_the_plain_loop() -> None:
    model, step = make()
    plain = copy.deepcopy(model)
    rate = torch.tensor(1e-3).item()  # float32, as everywhere
    optimizer = torch.optim.AdamW(plain.parameters(), lr=rate, fused=True)
    for index in range(3):
        found = step(episode(index), 1e-3)
        total, parts, _ = LOSS(plain, episode(index))
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(list(plain.parameters()), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert found["loss"] == total.item()
        assert found["grad_norm"] == norm.item()
        assert {name: found[name] for name in parts} == {n: v.item() for n, v in parts.items()}
    assert same(model.parameters(), plain.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_number_that_is_not_finite_changes_no_weight() -> None:
    model, step = make()
    step(episode(0), 1e-3)
    moments = (value for each in step.optimizer.state.values() for value in each.values())
    state = [*model.parameters(), *moments]
    before = [value.clone() for value in state]
    bad = episode(1)
    bad.query_images[0, 0, 0, 5, 5] = math.inf
    assert not math.isfinite(step(bad, 1e-3)["loss"])
    assert same(before, state)
    step(episode(2), 1e-3)
    assert not torch.equal(before[0], state[0])


@pytest.fixture
def without_a_chip(pretended_streams: None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """CUDA graphs of a CPU: capturing notes what is to be done, replaying does it."""
    events: list[str] = []

    class Graph:
        step: Step

        def replay(self) -> None:
            events.append("replay")
            self.step._values.copy_(work(self.step, self.step._episode))

    work = Step._work

    def noted(self: Step, each: Episode) -> Tensor:
        if self._episode is None or self._graph is not None:
            events.append("eager")
            return work(self, each)
        Graph.step = self
        return torch.zeros(len(self._names))

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(Step, "_work", noted)
    return events


def test_the_graph_gets_every_episode_and_rate(without_a_chip: list[str]) -> None:
    batches = [episode(index) for index in range(6)]
    batches.insert(4, episode(9, queries=2))  # of another shape
    rates = [1e-3 / (index + 1) for index in range(7)]
    results, models = [], []
    for capture in (False, True):
        model, step = make(capture)
        for group in step.optimizer.param_groups:
            group["lr"] = torch.tensor(0.0)  # the graph's rate is of float32
        without_a_chip.clear()
        results.append([step(*both) for both in zip(batches, rates, strict=True)])
        models.append(model)
    assert without_a_chip == ["eager"] * 3 + ["replay", "eager"] + ["replay"] * 2
    assert results[0] == results[1]
    assert same(*(model.parameters() for model in models))


def test_where_capturing_fails_the_step_is_taken_and_said(
    without_a_chip: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, plain = make()
    plain.optimizer.param_groups[0]["lr"] = torch.tensor(0.0)
    _, step = make(capture=True)
    monkeypatch.setattr(step_module, "_WARM_UP", 1)

    @contextlib.contextmanager
    def failing(*args: object, **kwargs: object):
        yield
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", failing)
    for index in range(3):
        want = plain(episode(index), 1e-3)
        assert step(episode(index), 1e-3) == want
    said = capsys.readouterr().err
    assert said.count("not captured as a CUDA graph") == 1
    assert "not permitted" in said
