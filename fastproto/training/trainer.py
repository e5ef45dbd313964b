# SPDX-License-Identifier: Apache-2.0
"""The training loop: episodes in, a run folder out, resumable bit for bit."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from tqdm import tqdm

from fastproto._files import alone_in, write_text
from fastproto._memory import enough_memory, return_large_buffers
from fastproto.defaults import IGNORE
from fastproto.errors import FastprotoWarning, TrainingError
from fastproto.losses import PARTS, EpisodeLoss
from fastproto.nn import FewShotUNet
from fastproto.nn.batch_norm import synchronise_norms
from fastproto.nn.inference import computes_bfloat16
from fastproto.segmentation.task import known_preprocessing, load_model
from fastproto.training.checkpoint import load_state, save_state
from fastproto.training.config import NETWORK, TrainConfig
from fastproto.training.episodes import Episode
from fastproto.training.log import RunLog
from fastproto.training.prefetch import ahead, prefetch
from fastproto.training.ranks import Ranks, join
from fastproto.training.resume import require_same_slices, saved_run
from fastproto.training.schedule import Schedule, learning_rate
from fastproto.training.sources import TrainingData, read_training_data
from fastproto.training.step import Step
from fastproto.training.supervoxels import cores

_LESS_MEMORY = (
    "Resume it with recompute=on, or start a new run with a smaller batch, image_size, store_size "
    "or encoder, or with fewer scans; other programs may hold memory as well."
)


def train(config: TrainConfig, *, resume: bool = False) -> Path:
    """Train a ``FewShotUNet``, or carry an interrupted training on.

    The run folder holds ``config.json``, ``log.jsonl`` (a record for each step and validation),
    ``state.safetensors`` (the last checkpoint, complete) and ``model.safetensors`` (the weights of
    that checkpoint, to use). At the end these are the *last* weights, not those of the best
    validation: the schedule ends near zero, and the validation classes are base classes, whose Dice
    can still rise while that of unseen classes falls.

    A resumed run computes the same bits as one that was never interrupted, on the same machine
    with the same number of threads; on a GPU as far as its operators are deterministic
    (``torch.use_deterministic_algorithms``). With more ``steps`` or ``minutes`` than before it is
    lengthened: warm-up and fall of the learning rate begin anew at its checkpoint.

    Started by torchrun in N processes (*ranks*) it trains in all of them, each with a batch of its
    own, on the episodes that one process has with a batch N times as large. Rank 0 writes and
    says what there is to say; the others read data and output folder too. What makes another rank
    end, other than an error of its own, is told by one of them.

    Args:
        config: See ``TrainConfig``.
        resume: Carry on from the last checkpoint in ``config.output``. A run that was killed before
            its first checkpoint begins again.

    Returns:
        The run folder.

    Raises:
        OutputError: The folder holds a run and ``resume`` is off, another process trains in it, or
            it cannot be written.
        ResourceError: There is too little memory.
        CheckpointError: Nothing to resume, a damaged state, or one of another configuration.
        TrainingError: The loss or its gradient is not finite, or another rank ended; the last
            checkpoint stays as it was.
        InputError: Data or options that cannot be used.
    """
    return_large_buffers()
    folder = Path(config.output)
    ranks = join()
    device = ranks.device(config.device)
    chosen = any(getattr(config, name) == "auto" for name in NETWORK)
    config = config.resolved(gpu=device.type == "cuda")
    with contextlib.ExitStack() as stack:
        if not ranks.first:  # rank 0 shows and warns
            config = replace(config, progress=False)
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore", FastprotoWarning)
        with ranks.in_turn():
            if ranks.first:
                stack.enter_context(alone_in(folder))
            stack.enter_context(enough_memory(folder, _LESS_MEMORY))
            saved = saved_run(config, folder, resume, ranks.count)
            start = None
            preprocessing = None
            if saved is not None:
                config = replace(config, **{name: saved["config"][name] for name in NETWORK})
                preprocessing = saved["preprocessing"]
            elif config.start is not None:
                start = load_model(config.start)
                known = known_preprocessing(start)
                preprocessing = {modality: each.to_dict() for modality, each in known.items()}
                first = next(iter(known.values()))
                network = {**start.config, "image_size": first.image_size, "plane": first.plane}
                config = replace(config, **network)
            data = read_training_data(config, preprocessing)
            schedule = Schedule.of(config, saved)
            if config.progress:
                _introduce(config, data, schedule, device, ranks)
                if saved is None and start is None and device.type == "cpu" and chosen:
                    print(
                        "fastproto: a network and images small enough for a CPU were chosen; "
                        "encoder and image_size choose others",
                        file=sys.stderr,
                    )
            require_same_slices(config, folder, data.slices, saved, ranks)
            if ranks.first:
                write_text(folder / "config.json", json.dumps(config.to_dict(), indent=1) + "\n")
        stack.enter_context(ranks.connected(device))
        _train(config, data, start, saved, schedule, device, ranks)
    return folder


def _train(
    config: TrainConfig,
    data: TrainingData,
    start: FewShotUNet | None,
    saved: dict[str, Any] | None,
    schedule: Schedule,
    device: torch.device,
    ranks: Ranks,
) -> None:
    """Train from the beginning, from a model or from a checkpoint."""
    folder = Path(config.output)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        model = start or FewShotUNet(
            weights=config.weights if saved is None else None,
            **{name: getattr(config, name) for name in FewShotUNet.config_keys},
        )
        model.decoder.recompute = config.recompute
        # Channels last: a third faster on CPUs, and what tensor cores want.
        model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if config.sync_batch_norm and ranks.count > 1:
            synchronise_norms(model)
        optimizer = torch.optim.AdamW(
            model.parameters(), config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        step, seconds = 0, 0.0
        if saved is not None:
            load_state(folder / "state.safetensors", model, optimizer)
            step, seconds = saved["step"], saved["seconds"]
        ranks.share(model)
        with contextlib.ExitStack() as stack:
            log = None
            if ranks.first:
                log = stack.enter_context(RunLog(folder, step, tensorboard=config.tensorboard))
            _Run(config, data, model, optimizer, log, seconds, schedule, ranks).go(step)


def _introduce(
    config: TrainConfig, data: TrainingData, schedule: Schedule, device: torch.device, ranks: Ranks
) -> None:
    """Say what is trained on what, and until when."""
    until = f"{config.steps} steps" if config.minutes is None else f"{config.minutes:g} minutes"
    if schedule.step:
        until += f" in all, warm-up and schedule anew from step {schedule.step},"
    where = str(device) if ranks.count == 1 else f"{ranks.count} times {device.type}"
    print(
        f"fastproto: {data.summary}; {config.encoder}, output stride {config.output_stride}, "
        f"images of {config.image_size} pixels, {ranks.count * config.batch} episodes a step, "
        f"{until} on {where}",
        file=sys.stderr,
    )


def episode_dice(logits: Tensor, target: Tensor) -> float:
    """Mean Dice of the foreground classes that the target holds; NaN where it holds none.

    Args:
        logits: [E, Q, K, H, W].
        target: [E, Q, H, W] integers 0..K-1; what is ``IGNORE`` does not count.
    """
    prediction = logits.argmax(dim=2).masked_fill(target == IGNORE, IGNORE)
    scores = []
    for label in range(1, logits.shape[2]):
        mine, truth = prediction == label, target == label
        size = int(truth.sum())
        if size > 0:
            scores.append(2 * int((mine & truth).sum()) / (int(mine.sum()) + size))
    return _mean(scores)


def _mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers) if numbers else math.nan


@dataclass
class _Run:
    """The loop and what it needs; ``seconds`` are those of all steps so far.

    The log is None in a rank that writes nothing.
    """

    config: TrainConfig
    data: TrainingData
    model: FewShotUNet
    optimizer: torch.optim.Optimizer
    log: RunLog | None
    seconds: float
    schedule: Schedule
    ranks: Ranks

    def __post_init__(self) -> None:
        config = self.config
        self.device = next(self.model.parameters()).device
        self.low_precision = config.precision == "bfloat16"
        if config.precision == "auto":
            self.low_precision = computes_bfloat16(self.device)
        alone = self.ranks.count == 1
        weights = torch.tensor([config.background_weight] + [1.0] * config.ways)
        self.take_step = Step(
            self.model,
            self.optimizer,
            EpisodeLoss(
                **{name: getattr(config, name) for name in PARTS},
                class_weights=weights.to(self.device),
                mean_weight=None if alone else self.ranks.mean,
            ),
            config.clip_norm,
            self.autocast,
            capture=config.cuda_graph and self.device.type == "cuda" and alone,
            average=self.ranks.average,
        )
        self.validation_dice = math.nan
        self.saved_step = 0
        self.episodes: Iterator[Episode] = iter(())

    def go(self, step: int) -> None:
        """Train on from the state after ``step`` steps."""
        config = self.config
        if step == 0:
            self.checkpoint(0)
        else:
            self.save_model(step)  # the process may have died between the state and the model
        self.model.train()
        auto = min(8, cores() // self.ranks.local_count) if self.device.type == "cuda" else 0
        workers = auto if config.workers == "auto" else config.workers
        steps = range(step + 1, config.steps + 1)
        place = self.ranks.number, self.ranks.count
        batches = prefetch(self.data.training, config.batch, steps, workers, *place)
        episodes = ahead(batches, self.device)
        with (
            contextlib.closing(episodes) as self.episodes,
            tqdm(
                initial=step,
                total=config.steps if config.minutes is None else None,
                unit="step",
                # Redrawn rarely where it goes to a file.
                mininterval=0.5 if sys.stderr.isatty() else 30,
                disable=not config.progress,
            ) as bar,
        ):
            last = self.progress(step) >= 1  # steps or minutes are used up
            while not last:
                step += 1
                loss = self.step(step)
                last = self.progress(step) >= 1
                if last or step % config.validate_every == 0:
                    self.validate(step)
                if last or step % config.checkpoint_every == 0:
                    self.checkpoint(step)
                shown = {"loss": f"{loss:.3f}"}
                if config.minutes is not None:
                    shown["minutes"] = f"{self.seconds / 60:.1f}/{config.minutes:g}"
                if not math.isnan(self.validation_dice):
                    shown["validation_dice"] = f"{self.validation_dice:.3f}"
                bar.set_postfix(shown, refresh=False)
                bar.update()

    def progress(self, step: int) -> float:
        """Share of the run that is done when ``step`` ends, as far as is known before it."""
        return self.schedule.progress(self.config, step, self.seconds)

    def step(self, step: int) -> float:
        """One optimiser step; returns the loss."""
        began = time.perf_counter()
        episode = next(self.episodes)
        rate = learning_rate(self.config, self.progress(step))
        record = self.take_step(episode, rate)
        loss, norm = record["loss"], record["grad_norm"]
        if not (math.isfinite(loss) and math.isfinite(norm)):  # all ranks have the same numbers
            self.stop(step, f"loss {loss}, gradient norm {norm}", episode.description)
        seconds = self.ranks.of_first(time.perf_counter() - began, self.device)
        self.seconds += seconds
        if self.log is not None:
            if step == self.schedule.step + 1 > 1:
                self.log.write(step, schedule_from=self.schedule.step, steps=self.config.steps)
            self.log.write(step, **record, learning_rate=rate, seconds=round(seconds, 4))
        return loss

    def stop(self, step: int, numbers: str, description: str) -> NoReturn:
        """End the run after a step that has not touched the weights."""
        described = "; ".join(self.ranks.told_by_all(f"step {step}", description))
        if not self.ranks.first:
            self.ranks.leave()
        raise TrainingError(
            f"step {step}",
            found=f"{numbers} in {described}",
            allowed="finite numbers",
            fix=f"The weights of step {self.saved_step} are in {self.file('model')}, and "
            f"{self.file('state')} can be resumed. Look at the slices named; a lower learning rate "
            "or clip_norm, or precision float32, may help.",
        )

    @torch.no_grad()
    def validate(self, step: int) -> None:
        """Log the mean Dice over the fixed validation episodes, if there are any."""
        source = self.data.validation
        if source is None or self.log is None:
            return
        self.model.eval()
        scores = []
        for index in range(self.config.validation_episodes):
            episode = source.episode(index).to(self.device)
            with self.autocast():
                logits = self.model(
                    episode.support_images,
                    episode.support_masks,
                    episode.query_images,
                    num_classes=episode.num_classes,
                )
            scores.append(episode_dice(logits, episode.query_masks))
        self.model.train()
        self.validation_dice = _mean([score for score in scores if not math.isnan(score)])
        self.log.write(step, validation_dice=self.validation_dice)

    def checkpoint(self, step: int) -> None:
        """Write the state, then the model made from it; only the state is read on resume."""
        if self.log is None:
            return
        self.log.sync()
        metadata = {
            "step": step,
            "ranks": self.ranks.count,
            "seconds": self.seconds,
            "schedule": self.schedule,
            "config": self.config.to_dict(),
            "preprocessing": self.data.extra["preprocessing"],
            "slices": self.data.slices,
        }
        save_state(self.file("state"), self.model, self.optimizer, metadata)
        self.save_model(step)

    def save_model(self, step: int) -> None:
        """Write the weights to use, with what is needed to use them."""
        if self.log is None:
            return
        self.model.save(self.file("model"), {**self.data.extra, "step": step})
        self.saved_step = step

    def file(self, name: str) -> Path:
        return Path(self.config.output, f"{name}.safetensors")

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Bfloat16 where it is wanted."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.low_precision)
