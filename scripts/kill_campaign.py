# SPDX-License-Identifier: Apache-2.0
"""Ends train, learn and segment at random moments; what comes after must be as if nothing had been.

Every command runs on tiny inputs, in processes forked from one that has imported everything. It is
killed (SIGKILL), interrupted (SIGINT), and meets a full disk (a small tmpfs where one may be
mounted, and a limit on the size of files) at random moments or sizes; then it is resumed or
repeated. Of the two commands that are started on one run folder one must be refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import records

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "python_tests"))
SLOWEST = 300.0  # seconds after which a run hangs


class Command(NamedTuple):
    """A command on tiny inputs, whose results lie in a folder ``out`` of their own."""

    first: Callable[[Path], list[str]]
    again: Callable[[Path], list[str]]  # what a user does after it was ended early


def commands(inputs: Path) -> dict[str, Command]:
    """The commands on what `prepare` made."""
    model, images, labels = inputs / "model.safetensors", inputs / "mr/images", inputs / "mr/labels"
    case = "mr_000.nii.gz"

    def train(out: Path) -> list[str]:
        words = f"train --data {inputs / 'mr'} --out {out} --encoder tiny --image-size 32 --batch 1"
        words += " --steps 6 --threads 1 --device cpu --set checkpoint_every=2 min_pixels=5"
        words += " validation_episodes=1 validate_every=4 progress=false output_stride=16"
        return words.split()

    def resume(out: Path) -> list[str]:
        begun = (out / "config.json").exists()
        return ["train", "--out", str(out), "--resume", "--threads", "1"] if begun else train(out)

    def learn(out: Path) -> list[str]:
        words = f"learn --model {model} --image {images / case} --label {labels / case} --slices 4"
        words += f" --labels liver=1 spine=5 --adapt 3 --prior affine --threads 1 -o {out}/o.task"
        return words.split()

    def segment(out: Path) -> list[str]:
        words = f"segment --model {model} --task {inputs / 'o.task'} -i {images} -o {out}"
        words += " --prior box --probabilities --uncertainty --threads 1"
        return words.split()

    return {
        "train": Command(train, resume),
        "learn": Command(learn, learn),
        "segment": Command(segment, segment),
    }


def prepare(inputs: Path) -> None:
    """Two small scans, an untrained model and a task."""
    import torch

    from fastproto.cli import main
    from fastproto.data import Preprocessing
    from fastproto.data.phantom import write_phantom
    from fastproto.nn import FewShotUNet

    write_phantom(inputs / "mr", patients=2, modality="mr", shape=(12, 48, 48))
    torch.manual_seed(0)
    known = {"mr": Preprocessing("mr", image_size=32).to_dict()}
    FewShotUNet(encoder="tiny").save(inputs / "model.safetensors", {"preprocessing": known})
    if main(commands(inputs)["learn"].first(inputs)):
        raise SystemExit("the task was not learned")


def warm() -> None:
    """Import what the commands need, and start no thread: a fork would lack it."""
    import PIL.Image  # noqa: F401
    import scipy.ndimage  # noqa: F401
    import torch
    import torch._dynamo  # by the optimisers
    from support.tiny_encoder import TinyEncoder

    import fastproto.data.phantom
    import fastproto.evaluation.report
    import fastproto.segmentation
    import fastproto.training.trainer  # noqa: F401
    from fastproto.nn.encoders.registry import ENCODERS, Entry

    torch.set_num_threads(1)
    ENCODERS["tiny"] = Entry(TinyEncoder)


def fork(body: Callable[[], int | None], said: Path) -> int:
    """A process that runs ``body``, what it says going to ``said``; returns its number."""
    sys.stdout.flush()
    if process := os.fork():
        return process
    status = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        stream = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        status = body() or 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def wait(process: int) -> int:
    """The exit status of a process; negative: the signal that ended it."""
    end = time.monotonic() + SLOWEST
    while time.monotonic() < end:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    raise TimeoutError(f"a run took more than {SLOWEST:.0f} s")


def start(arguments: list[str], said: Path, limit: int | None = None) -> int:
    """The program with these arguments, in a process; ``limit`` is on the bytes of a file."""
    from fastproto.cli import main

    def body() -> int:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        return main(arguments)

    return fork(body, said)


def contents(out: Path) -> dict[str, str]:
    """What a finished command left: a hash of every file, without times of day and durations."""
    from fastproto.nn.weights import checksum, read_safetensors

    found = {}
    for path in sorted(out.rglob("*")):
        if not path.is_file():
            continue
        if path.name == "state.safetensors":
            tensors, _ = read_safetensors(path)  # the metadata have the duration
            found[str(path.relative_to(out))] = checksum(tensors)
            continue
        data = path.read_bytes()
        if path.name == "log.jsonl":
            log = [json.loads(line) for line in data.splitlines()]
            kept = [{k: v for k, v in each.items() if k != "seconds"} for each in log]
            data = json.dumps(kept).encode()
        if path.name == "config.json":
            data = json.dumps({**json.loads(data), "output": None}).encode()
        found[str(path.relative_to(out))] = hashlib.sha256(data).hexdigest()
    return found


def check_halfway(out: Path, reference: dict[str, str], partial: bool) -> None:
    """Every file is whole, and no other is there but ``.partial-*`` of a process that was killed.

    Raises:
        ValueError: A file is half written or too many.
    """
    from fastproto.nn.weights import read_safetensors

    for path in out.rglob("*"):
        name = str(path.relative_to(out))
        if ".partial-" in name:
            if not partial:
                raise ValueError(f"{name} was left")
        elif path.name in ("state.safetensors", "model.safetensors"):
            read_safetensors(path)  # raises what is damaged
        elif path.name == "config.json":
            json.loads(path.read_text())
        elif path.is_file() and path.name != "log.jsonl":  # which grows; a resumed run mends it
            whole = hashlib.sha256(path.read_bytes()).hexdigest() == reference.get(name)
            if not whole:
                raise ValueError(f"{name} is half written")


class Campaign:
    """Runs of commands that are ended early, and what came of them.

    Args:
        folder: For inputs and results.
        seed: Of the moments.

    Attributes:
        record: For each command and kind of end, how often it was tried and how it went.
    """

    def __init__(self, folder: Path, seed: int):
        self.folder, self.random = folder, random.Random(seed)
        self.said = folder / "said.txt"
        self.record: dict[str, dict[str, Any]] = {}
        if wait(fork(lambda: prepare(folder), self.said)):
            raise RuntimeError(self.said.read_text())
        self.commands = commands(folder)
        self.seconds: dict[str, float] = {}
        self.reference: dict[str, dict[str, str]] = {}
        for name, command in self.commands.items():
            began = time.monotonic()
            self.expect(command.first(self.folder / name), 0)
            self.seconds[name] = time.monotonic() - began
            self.reference[name] = contents(self.folder / name)

    def expect(self, arguments: list[str], status: int) -> None:
        """Run to the end."""
        got = wait(start(arguments, self.said))
        if got != status:
            raise ValueError(f"exit status {got}: {self.said.read_text()}")

    @contextlib.contextmanager
    def trial(self, name: str, kind: str) -> Iterator[dict[str, Any]]:
        """One try, whose failure is recorded."""
        row = self.record.setdefault(f"{name}, {kind}", {"tries": 0, "ended early": 0})
        row["tries"] += 1
        try:
            yield row
        except (ValueError, RuntimeError, OSError) as error:
            row.setdefault("failures", []).append(f"{type(error).__name__}: {error}"[:2000])

    def settle(self, name: str, out: Path) -> None:
        """Resume or repeat, and compare with the run that nothing ended."""
        self.expect(self.commands[name].again(out), 0)
        got, expected = contents(out), self.reference[name]
        if got != expected:
            differing = sorted(k for k in got.keys() | expected if got.get(k) != expected.get(k))
            raise ValueError(f"other results in {', '.join(differing)}")

    def end_by(self, name: str, number: signal.Signals) -> None:
        """A signal at a random moment of the command."""
        killed = number == signal.SIGKILL
        with self.trial(name, number.name) as row, self.place() as out:
            process = start(self.commands[name].first(out), self.said)
            time.sleep(self.random.uniform(0, self.seconds[name]))
            os.kill(process, number)
            status = wait(process)
            if status not in (0, -number if killed else 130):
                raise ValueError(f"exit status {status}: {self.said.read_text()}")
            row["ended early"] += status != 0
            check_halfway(out, self.reference[name], partial=killed)
            self.settle(name, out)

    def fill_up(self, name: str, *, by_limit: bool) -> None:
        """A disk that is full after a random number of bytes; then it has room."""
        sizes = [path.stat().st_size for path in (self.folder / name).rglob("*") if path.is_file()]
        most = max(sizes) if by_limit else sum(sizes)
        kind = "file size limit" if by_limit else "full tmpfs"
        size = self.random.randrange(4096, max(most, 4097))
        with self.trial(name, kind) as row, self.place(None if by_limit else size) as out:
            limit = size if by_limit else None
            status = wait(start(self.commands[name].first(out), self.said, limit))
            said = self.said.read_text()
            if status not in (0, 2) or "Traceback" in said:
                raise ValueError(f"exit status {status}: {said}")
            row["ended early"] += status != 0
            check_halfway(out, self.reference[name], partial=False)
            if not by_limit:
                remount = ["mount", "-o", "remount,size=1g", str(out.parent)]
                subprocess.run(remount, check=True, capture_output=True)
            self.settle(name, out)

    @contextlib.contextmanager
    def place(self, size: int | None = None) -> Iterator[Path]:
        """A folder for results that does not exist yet, on a disk of so many bytes."""
        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            if size is None:
                yield Path(name, "out")
                return
            mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", name]
            subprocess.run(mount, check=True, capture_output=True)
            try:
                yield Path(name, "out")
            finally:
                subprocess.run(["umount", name], check=True)

    def together(self) -> None:
        """Two trainings are started on one folder, at about the same time."""
        with self.trial("train", "two processes") as row, self.place() as out:
            arguments = self.commands["train"].first(out)
            others = self.folder / "other.txt"
            both = [start(arguments, self.said)]
            time.sleep(self.random.uniform(0, self.seconds["train"] / 2))
            both.append(start(arguments, others))
            statuses = sorted(map(wait, both))
            said = self.said.read_text() + others.read_text()
            if statuses != [0, 2] or "another process is working in it" not in said:
                raise ValueError(f"exit statuses {statuses}: {said}")
            row["ended early"] += 1
            self.settle("train", out)


def can_mount() -> bool:
    """Whether this user may mount a tmpfs."""
    with tempfile.TemporaryDirectory() as name:
        try:
            mount = ["mount", "-t", "tmpfs", "-o", "size=4096", "tmpfs", name]
            subprocess.run(mount, check=True, capture_output=True)
            subprocess.run(["umount", name], check=True)
        except (OSError, subprocess.CalledProcessError):
            return False
    return True


def campaign(folder: Path, moments: int, others: int, seed: int) -> dict[str, Any]:
    """Kill every command at ``moments`` moments, end it ``others`` times in every other way."""
    warm()
    runs = Campaign(folder, seed)
    for name in runs.commands:
        for _ in range(moments):
            runs.end_by(name, signal.SIGKILL)
        for _ in range(others):
            runs.end_by(name, signal.SIGINT)
            runs.fill_up(name, by_limit=True)
            if can_mount():
                runs.fill_up(name, by_limit=False)
    for _ in range(others):
        runs.together()
    return {"seconds": {k: round(v, 2) for k, v in runs.seconds.items()}, "ends": runs.record}


def main() -> None:
    """Run the campaign, print it, and write it if wanted."""
    parser = records.arguments(__doc__)
    parser.add_argument("--moments", type=int, default=100, help="kills of each command")
    parser.add_argument("--others", type=int, default=20, help="ends in each other way")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results")
    args = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        found = campaign(Path(name), args.moments, args.others, args.seed)
    found["minutes"] = round((time.monotonic() - began) / 60, 1)
    print(f"seconds of a run: {found['seconds']}; minutes of all: {found['minutes']}")
    for kind, row in found["ends"].items():
        failures = len(row.get("failures", ()))
        print(f"{kind:<24} {row['tries']:>4} tries, {row['ended early']:>4} ended early, "
              f"{failures} failed")  # fmt: skip
        for failure in row.get("failures", ()):
            print(f"  {failure}")
    if args.write:
        path = records.write_campaign("kill", ("torch", "safetensors"), **found)
        print(f"Result: {path}")
    sys.exit(any("failures" in row for row in found["ends"].values()))


if __name__ == "__main__":
    main()
