# SPDX-License-Identifier: Apache-2.0
"""Training in several processes at once: *ranks*, as torchrun starts them.

Every rank holds the whole network and draws episodes of its own. Gradients are averaged in one flat
buffer, so that weights stay the same bits everywhere. Texts that ranks tell each other go through
the store of the rendezvous, not through pickles.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastproto.errors import ArgumentError, TrainingError, require

_WAIT = timedelta(minutes=10)  # for a step; longer than a validation or a checkpoint takes
_PREPARE = timedelta(hours=12)  # for the scans to be read
_GRACE = 30.0  # seconds for that rank to end, whereupon torchrun ends the others
_runs = itertools.count()  # of this process: each has names of its own in the store


@dataclass(frozen=True)
class Ranks:
    """What a process must know of those that train together, itself included.

    Attributes:
        number: Its own, from 0; rank 0 writes whatever is written.
        count: Of all; 1 where a process trains alone, and what is below changes nothing.
        local: Its number on its machine.
        local_count: Of those on its machine.
        store: Where ranks leave texts for each other.
    """

    number: int = 0
    count: int = 1
    local: int = 0
    local_count: int = 1
    store: Any = None

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes."""
        return self.number == 0

    def device(self, name: str) -> torch.device:
        """The device that a configuration means; each of several ranks has a GPU of its own.

        Raises:
            ArgumentError: PyTorch cannot use it, or there are fewer GPUs than ranks.
        """
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if name == "auto":
            name = "cuda" if gpus else "cpu"
        if self.count > 1 and name.startswith("cuda"):
            found = None if name == "cuda" else f"{name!r} for {self.count} processes"
            found = found or f"{gpus} GPUs for {self.local_count} processes of this machine"
            require(
                name == "cuda" and self.local < gpus,
                "device",
                found=found,
                allowed="cuda, with a GPU for each process, or cpu",
                fix="Give torchrun --nproc-per-node the number of GPUs.",
            )
            name = f"cuda:{self.local}"
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as error:
            raise ArgumentError(
                "device",
                found=f"{name!r} ({str(error).splitlines()[0]})",
                allowed="auto, cpu, or a GPU that this PyTorch can use",
            ) from error

    @contextlib.contextmanager
    def connected(self, device: torch.device) -> Iterator[None]:
        """Meanwhile tensors can be averaged, on ``device``.

        Raises:
            TrainingError: Another rank ended, or did not answer for ten minutes. torchrun may
                notice it first, and sends SIGTERM.
        """
        if self.count == 1:
            yield
            return
        backend = "nccl" if device.type == "cuda" else "gloo"
        if backend == "nccl":
            torch.cuda.set_device(device)
        try:
            with _told_to_end():
                dist.init_process_group(
                    backend,
                    store=dist.PrefixStore("group", self.store),
                    rank=self.number,
                    world_size=self.count,
                    timeout=_WAIT,
                    device_id=device if backend == "nccl" else None,
                )
                yield
        except RuntimeError as error:
            if not _is_of_ranks(error):
                raise
            raise TrainingError(
                f"process {self.number} of {self.count}",
                found=f"that another one ended or does not answer ({str(error).splitlines()[0]})",
                allowed="all of them, to the end",
                fix="See what the other one said, if anything. The last checkpoint is complete: "
                "resume the run with the same command.",
            ) from error
        dist.destroy_process_group()  # after an error it would wait for the others

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        """Run the body in rank 0, then in the others, and go on when all have done it.

        Where one fails the others end without a word.
        """
        if self.count == 1:
            yield
            return
        if not self.first and self.hear("done/0") != "yes":
            self.leave()
        try:
            yield
        except BaseException:
            self.tell(f"done/{self.number}", "no")
            raise
        if "no" in self.told_by_all("done", "yes"):
            self.leave()

    def tell(self, key: str, text: str) -> None:
        """Leave a text for the other ranks."""
        self.store.set(key, text)

    def hear(self, key: str) -> str:
        """The text that a rank left, as soon as it has.

        Raises:
            TrainingError: The store is gone, with the machine that held it.
        """
        try:
            self.store.wait([key], _PREPARE)
            return bytes(self.store.get(key)).decode()
        except RuntimeError as error:
            raise TrainingError(
                f"process {self.number} of {self.count}",
                found=f"no connection to the others ({str(error).splitlines()[0]})",
                allowed="a first machine that stays up",
                fix="See what the first process said, if anything.",
            ) from error

    def told_by_all(self, key: str, text: str) -> list[str]:
        """The texts of all ranks, which must all call this."""
        if self.count == 1:
            return [text]
        self.tell(f"{key}/{self.number}", text)
        return [self.hear(f"{key}/{number}") for number in range(self.count)]

    def leave(self) -> NoReturn:
        """End this process, for a reason that another rank tells."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(_GRACE)  # torchrun reports the process that ends first, and ends this one
        sys.exit(2)

    def share(self, model: nn.Module) -> None:
        """Give all ranks the weights of rank 0."""
        if self.count > 1:
            for tensor in model.state_dict().values():
                dist.broadcast(tensor, 0)

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Put the mean over ranks into float32 tensors of one device."""
        if self.count == 1:
            return
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        flat /= self.count
        for tensor, mean in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(mean.view_as(tensor))

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over ranks of a float32 tensor, which it takes the place of."""
        self.average([tensor])
        return tensor

    def of_first(self, number: float, device: torch.device) -> float:
        """The number that rank 0 has."""
        if self.count == 1:
            return number
        tensor = torch.tensor(number, dtype=torch.float64, device=device)
        dist.broadcast(tensor, 0)
        return tensor.item()


def join() -> Ranks:
    """The ranks as torchrun's environment describes them.

    Raises:
        TrainingError: They do not find each other.
    """
    environment = os.environ
    count = int(environment.get("WORLD_SIZE", 1))
    if count == 1 or not dist.is_available():
        return Ranks()
    try:
        store, number, count = next(dist.rendezvous("env://", timeout=_WAIT))
    except (RuntimeError, ValueError) as error:
        raise TrainingError(
            f"WORLD_SIZE={count}",
            found=f"no way to the other processes ({str(error).splitlines()[0]})",
            allowed="processes that torchrun started",
            fix="Start it by torchrun, or unset WORLD_SIZE to train in one process.",
        ) from error
    local, local_count = (int(environment.get(n, 0)) for n in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    store = dist.PrefixStore(f"fastproto/{next(_runs)}", store)
    return Ranks(number, count, local, local_count or count, store)


class _ToldToEnd(RuntimeError):
    """SIGTERM."""


@contextlib.contextmanager
def _told_to_end() -> Iterator[None]:
    """Let SIGTERM raise, once; after an error of ranks it is ignored, so that this can be told."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(*_: Any) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise _ToldToEnd("SIGTERM from torchrun")

    after = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    except RuntimeError:
        after = signal.SIG_IGN
        raise
    finally:
        signal.signal(signal.SIGTERM, after)


def _is_of_ranks(error: RuntimeError) -> bool:
    """Whether a collective raised it; gloo's errors are of no class of their own."""
    return isinstance(error, (dist.DistError, _ToldToEnd)) or "gloo" in str(error).lower()
