# SPDX-License-Identifier: Apache-2.0
"""The program as a process: what it imports, prints and leaves when memory or patience ends."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings

import numpy as np
import pytest
import torch

from fastproto.cli import main
from fastproto.data import read_volume, write_volume
from fastproto.errors import FastprotoWarning
from fastproto.nn import FewShotUNet
from fastproto.segmentation import predict

from .conftest import CHOSEN

FOREIGN = "Größe-患者.nii.gz"  # what neither ASCII nor code page 1252 has
ELSEWHERE = tempfile.gettempdir()  # not the sources, whose package has no native library
HEAVY = ("torch._dynamo", "sympy", "scipy.signal", "scipy.spatial", "skimage", "matplotlib")


def start(*arguments: object, code: str = "", encoding: str = "utf-8") -> subprocess.Popen[str]:
    """The program in a process of its own, after ``code``; Ctrl-C counts, which nohup turns off."""
    code = f"import sys; from fastproto.cli import main\n{code}\nsys.exit(main())"
    code = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n{code}"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ELSEWHERE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding=encoding,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def segment(program, source: object, output: object, *more: object) -> list[object]:
    return ["segment", "--model", program.model, "-i", source, "-o", output, *more]


def test_nothing_heavy_is_imported_that_is_not_used(program, phantom, tmp_path):
    """Two seconds of torch are enough; its compiler takes three, scipy.signal one."""
    code = (
        "import sys\n"
        "def assert_without(*names):\n"
        "    found = [name for name in names if name in sys.modules]\n"
        "    assert not found, found\n"
        "import fastproto\n"
        "assert_without('torch', 'numpy', 'SimpleITK', 'scipy')\n"
        "fastproto.proto_attention\n"
        f"assert_without('SimpleITK', 'scipy', *{HEAVY})\n"
        "from fastproto.segmentation import load_model\n"
        f"load_model(sys.argv[2])\n"
        f"assert_without(*{HEAVY})\n"
        "from fastproto.cli import main\n"
        "assert main(sys.argv[3:]) == 0\n"
        f"assert_without(*{HEAVY})\n"
    )
    example = ["--example", *program.example, *CHOSEN, "--prior", "deformable"]
    source = phantom / "images" / "mr_001.nii.gz"
    arguments = segment(program, source, tmp_path / "out.nii.gz", *example)
    command = [sys.executable, "-c", code, "", str(program.model), *map(str, arguments)]
    done = subprocess.run(command, cwd=ELSEWHERE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_warning_is_a_line_and_the_same_one_is_said_once(monkeypatch, capsys, tmp_path):
    def warn(*_: object, **__: object) -> None:
        for text in ("a.nii: mended.", "a.nii: mended.", "b.nii: mended."):
            warnings.warn(text, FastprotoWarning, stacklevel=2)
        warnings.warn("of another library", RuntimeWarning, stacklevel=2)

    monkeypatch.setattr("fastproto.data.phantom.write_phantom", warn)
    with pytest.warns(RuntimeWarning, match="of another library"):
        assert main(["phantom", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().err == (
        "fastproto: warning: a.nii: mended.\nfastproto: warning: b.nii: mended.\n"
    )
    with pytest.warns(FastprotoWarning):  # outside a command it is a warning like any other
        warn()


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_name_that_the_terminal_cannot_show_stops_nothing(
    encoding, program, task_file, phantom, tmp_path, monkeypatch
):
    scans, out = tmp_path / "scans", tmp_path / "out"
    scans.mkdir()
    shutil.copy(phantom / "images" / "mr_001.nii.gz", scans / FOREIGN)
    (scans / f"damaged-{FOREIGN}").write_bytes(b"nothing")
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    options = ["--task", task_file, "--no-overlay"]
    status, said, errors = finish(start(*segment(program, scans, out, *options), encoding=encoding))
    assert status == 2, errors
    assert "Traceback" not in errors
    assert r"-\u60a3\u8005.nii.gz" in said
    assert r"damaged-Gr" in errors
    assert "1 of 2 scans failed" in errors
    assert [path.name for path in out.iterdir()] == [FOREIGN]


def test_a_scan_that_memory_does_not_hold_is_told_and_the_next_goes_on(
    program, task_file, phantom, tmp_path
):
    """The limit comes with the second scan: 64 GB of zeros, none of which are on the disk."""
    scans, out = tmp_path / "scans", tmp_path / "out"
    scans.mkdir()
    for name in ("a.nii.gz", "c.nii.gz"):
        shutil.copy(phantom / "images" / "mr_001.nii.gz", scans / name)
    large = scans / "b.nii"
    small = read_volume(scans / "a.nii.gz")
    write_volume(large, small.array, like=small)
    with large.open("r+b") as file:
        file.seek(42)
        file.write(np.array([4000, 4000, 2000], "<i2").tobytes())  # NIfTI-1's dim
        file.truncate(352 + 4000 * 4000 * 2000 * small.array.itemsize)
    limit = (
        "import fastproto.data.volume as volume\n"
        "read = volume.read_volume\n"
        "def limited(path, **options):\n"
        "    import resource\n"
        "    if path.name == 'b.nii':\n"
        "        resource.setrlimit(resource.RLIMIT_AS, (2**35, 2**35))\n"
        "    return read(path, **options)\n"
        "volume.read_volume = limited\n"
    )
    arguments = segment(program, scans, out, "--task", task_file, "--no-overlay", "--threads", 1)
    status, said, errors = finish(start(*arguments, code=limit))
    assert status == 2, errors
    assert "Traceback" not in errors
    first, last = errors.splitlines()
    assert "b.nii: found too little memory: " in first
    assert " GB in use" in first
    assert last == "fastproto: 1 of 3 scans failed"
    assert {path.name for path in out.iterdir()} == {"a.nii.gz", "c.nii.gz"}
    assert f"{scans / 'c.nii.gz'} -> " in said


@pytest.fixture
def small_gpu(monkeypatch):
    """A GPU, as far as its errors go, that holds so many slices at once."""
    seen: list[int] = []
    original = FewShotUNet.segment

    def limit(most: int) -> list[int]:
        def segment(model, images, prototypes):
            seen.append(len(images))
            if len(images) > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return original(model, images, prototypes)

        monkeypatch.setattr(FewShotUNet, "segment", segment)
        return seen

    return limit


def test_a_small_gpu_gets_smaller_batches(
    program, task_file, phantom, tmp_path, small_gpu, capsys, results
):
    scan = phantom / "images" / "mr_001.nii.gz"
    options = ["--task", task_file, "--no-overlay"]
    assert program.segment(scan, tmp_path / "whole.nii.gz", *options, "--batch-size", 2) == 0
    capsys.readouterr()
    seen = small_gpu(2)
    assert program.segment(scan, tmp_path / "out.nii.gz", *options) == 0
    assert seen[:3] == [predict.BATCH, predict.BATCH // 2, 2]
    assert max(seen[3:]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "GPU" in line]
    assert said == [
        f"fastproto: warning: the GPU: {a} slices at once are too many for its memory; "
        f"going on with {b}"
        for a, b in ((8, 4), (4, 2))
    ]
    assert (tmp_path / "out.nii.gz").read_bytes() == (tmp_path / "whole.nii.gz").read_bytes()
    small_gpu(0)
    assert program.segment(scan, tmp_path / "none.nii.gz", *options) == 2
    said = capsys.readouterr().err
    assert f"{scan}: found too little memory on the GPU: 2.00 GiB were wanted; allowed" in said
    assert not (tmp_path / "none.nii.gz").exists()


def test_a_gpu_without_room_for_the_network_is_told(
    program, task_file, phantom, tmp_path, monkeypatch, capsys
):
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")

    monkeypatch.setattr("fastproto.segmentation.load_model", full)
    scan = phantom / "images" / "mr_001.nii.gz"
    assert program.segment(scan, tmp_path / "out.nii.gz", "--task", task_file) == 2
    said = capsys.readouterr().err
    assert "found too little memory on the GPU: 2.00 MiB were wanted; allowed" in said
    assert "--device cpu" in said


@pytest.mark.parametrize("command", ["learn", "segment", "train"])
def test_an_output_that_cannot_be_written_is_noticed_before_computing(
    command, program, task_file, phantom, tmp_path, monkeypatch, capsys
):
    def compute(*_: object, **__: object) -> None:
        raise AssertionError("computed")

    monkeypatch.setattr("fastproto.segmentation.load_model", compute)
    monkeypatch.setattr("fastproto.training.trainer.read_training_data", compute)
    (tmp_path / "file").touch()
    output = tmp_path / "file" / "output"
    if command == "learn":
        assert program.learn(output, *CHOSEN) == 2
    elif command == "segment":
        assert program.segment(phantom / "images", output, "--task", task_file) == 2
    else:
        assert main(["train", "--data", str(phantom), "--out", str(output)]) == 2
    assert "cannot be written (Not a directory)" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "learn", "segment"])
def test_ctrl_c_at_any_time_is_130_without_a_traceback(command, program, phantom, tmp_path):
    """From the import of torch to the work itself."""
    folder = tmp_path / "out"
    if command == "train":
        arguments = ["train", "--data", phantom, "--out", folder, "--image-size", 64]
        arguments += ["--batch", 1, "--set", "checkpoint_every=1"]
    elif command == "learn":
        image, label = program.example
        arguments = ["learn", "--model", program.model, "--image", image, "--label", label]
        arguments += [*CHOSEN[:3], "--adapt", 1000, "-o", folder / "organs.task"]
    else:
        example = ["--example", *program.example, *CHOSEN[:3], "--adapt", 1000]
        arguments = segment(program, phantom / "images", folder, *example)
    for delay in (0.1, 0.8, 4.0) if command == "segment" else (4.0,):
        process = start(*arguments, code="print('begun', flush=True)")
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        status, _, errors = finish(process)
        assert status == 130, errors
        assert "Traceback" not in errors
        assert errors.endswith("fastproto: interrupted\n")
        assert not list(tmp_path.glob("**/.partial-*"))
        assert not (folder / "organs.task").exists()
        shutil.rmtree(folder, ignore_errors=True)
