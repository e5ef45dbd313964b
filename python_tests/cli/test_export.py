# SPDX-License-Identifier: Apache-2.0
"""``fastproto export``: files that answer as the network does, and what is refused before."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from safetensors import safe_open
from support.tiny_encoder import TinyEncoder

from fastproto._version import __version__
from fastproto.cli import main
from fastproto.data import Preprocessing, read_label, read_volume
from fastproto.data.geometry import FieldOfView, canonical
from fastproto.errors import ArgumentError, OutputError
from fastproto.nn import FewShotUNet, export
from fastproto.nn.encoders import registry
from fastproto.segmentation import Task, load_model

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "onnx_segment.py"
SIZES = [(1, 2, 1, 64, 64), (3, 2, 9, 64, 64), (2, 5, 4, 96, 48), (1, 3, 2, 61, 77)]


@pytest.fixture(scope="module")
def onnx_file(model_file, tmp_path_factory) -> Path:
    pytest.importorskip("onnxscript")
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    assert main(["export", "--model", str(model_file), "--onnx", str(path)]) == 0
    return path


def expected(model, images, prototypes, lengths) -> np.ndarray:
    three = images.unsqueeze(1).expand(-1, -1, 3, -1, -1)
    with torch.inference_mode():
        logits = model.segment(three, export.packed(prototypes, lengths))
    return logits[:, 0].softmax(dim=1).numpy()


@pytest.mark.parametrize("sizes", SIZES)
def test_onnx_gives_the_networks_probabilities(onnx_file, model_file, sizes):
    runtime = pytest.importorskip("onnxruntime")
    model = load_model(model_file)
    images, prototypes, lengths = export.problem(model, *sizes, seed=5)
    assert (lengths == 0).any()
    lengths[-1, 0] = 1
    unused = torch.arange(sizes[2]) >= lengths[..., None]
    prototypes[unused] = float("nan")  # never looked at
    session = runtime.InferenceSession(onnx_file, providers=["CPUExecutionProvider"])
    inputs = zip(export.INPUTS, (images, prototypes, lengths), strict=True)
    (found,) = session.run(None, {name: each.numpy() for name, each in inputs})
    for network in (model, model.for_inference(torch.float32)):
        assert np.abs(found - expected(network, images, prototypes, lengths)).max() < 1e-4


def test_onnx_has_standard_operators_and_says_what_it_is(onnx_file, model_file):
    file = pytest.importorskip("onnx").load(onnx_file)
    assert {node.domain for node in file.graph.node} == {""}
    assert [each.domain for each in file.opset_import] == [""]
    assert not file.functions
    shapes = {
        each.name: [side.dim_param or side.dim_value for side in each.type.tensor_type.shape.dim]
        for each in (*file.graph.input, *file.graph.output)
    }
    assert shapes == {
        "images": ["batch", 1, "height", "width"],
        "prototypes": ["batch", "classes", "prototypes", 512],
        "lengths": ["batch", "classes"],
        "probabilities": ["batch", "classes", "height", "width"],
    }
    about = json.loads({each.key: each.value for each in file.metadata_props}["fastproto"])
    model = load_model(model_file)
    assert about["version"] == __version__
    assert about["encoder"] == "resnet18"
    assert about["fingerprint"] == model.fingerprint()
    assert about["preprocessing"] == model.extra["preprocessing"]


def test_the_example_needs_no_torch_and_agrees_with_the_package(
    onnx_file, model_file, task_file, phantom, tmp_path
):
    scan = read_volume(phantom / "images" / "mr_001.nii.gz")
    label = read_label(phantom / "labels" / "mr_001.nii.gz", like=scan)
    task, model = Task.load(task_file), load_model(model_file)
    organ = task.organs[0]
    prepared = task.preprocessing.prepare(scan)
    middle = np.argwhere(prepared.to_canonical(label.array) == organ.value).mean(axis=0)
    view = prepared.at(FieldOfView(*middle[1:].tolist(), organ.side))
    image = sitk.DICOMOrient(sitk.ReadImage(str(scan.path)), "LPS")
    point = image.TransformContinuousIndexToPhysicalPoint(middle[::-1].tolist())
    numbers = [*range(len(organ.slices))]
    bags = organ.prototypes.pick([[numbers, numbers]] * len(prepared))
    with torch.inference_mode():
        images = view.images(0, len(prepared))[:, None].expand(-1, -1, 3, -1, -1)
        logits = model.for_inference(torch.float32).segment(images, bags)[:, 0]
    odds = logits[:, 1:] - logits[:, :1] + organ.bias
    want = view.restore(odds, 0, len(prepared))[:, 0] > 0

    out = tmp_path / "found.nii.gz"
    arguments = [onnx_file, task_file, organ.name, scan.path, ",".join(map(str, point)), out]
    # An import of torch fails in it.
    script = f"import runpy, sys; sys.modules['torch'] = None; runpy.run_path({str(EXAMPLE)!r})"
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = canonical(read_label(out)).array == 1
    assert want.any()
    assert not want.all()
    assert (found != want).mean() < 1e-3  # where both classes are as likely

    adapted = tmp_path / "adapted.task"
    weights = {"decoder.head.bias": torch.ones(1).half()}
    dataclasses.replace(task, weights=weights, adapted_steps=3).save(adapted)
    command[4] = str(adapted)
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "fastproto export --task" in done.stderr


@pytest.fixture
def tiny(monkeypatch, tmp_path) -> Path:
    """The file of a model that compiles soon."""
    monkeypatch.setitem(registry.ENCODERS, "tiny", registry.Entry(TinyEncoder))
    extra = {"preprocessing": {"mr": Preprocessing("mr", image_size=64).to_dict()}}
    FewShotUNet("tiny").save(tmp_path / "tiny.safetensors", extra)
    return tmp_path / "tiny.safetensors"


@pytest.mark.slow
def test_aoti_gives_the_networks_probabilities(tiny, tmp_path, capsys):
    path = tmp_path / "model.pt2"
    try:
        export.check_aoti(path)
    except ArgumentError as error:
        pytest.skip(str(error))
    assert main(["export", "--model", str(tiny), "--aoti", str(path), "--device", "cpu"]) == 0
    assert f"{path}: " in capsys.readouterr().out
    run, model = torch._inductor.aoti_load_package(str(path)), load_model(tiny)
    inputs = export.problem(model, 5, 3, 6, 64, 64, seed=5)
    assert np.abs(run(*inputs).numpy() - expected(model, *inputs)).max() < 1e-4
    about = json.loads(run.get_metadata()["fastproto"])
    assert (about["encoder"], about["fingerprint"]) == ("tiny", model.fingerprint())


def test_the_weights_that_a_task_adapted(model_file, task_file, tmp_path, monkeypatch):
    task, model = Task.load(task_file), load_model(model_file)
    weights = {"decoder.head.bias": torch.full((1,), 2.0).half()}
    adapted = tmp_path / "adapted.task"
    dataclasses.replace(task, weights=weights, adapted_steps=3).save(adapted)
    written = []

    def keep(network, path, about):
        path.touch()
        written.append((network, about))
        return 0.0

    monkeypatch.setattr(export, "export_onnx", keep)
    files = ["--model", str(model_file), "--onnx", str(tmp_path / "model.onnx")]
    assert main(["export", *files, "--task", str(adapted)]) == 0
    ((network, about),) = written
    assert network.decoder.head.bias.item() == 2
    assert about["fingerprint"] == model.fingerprint()
    with safe_open(adapted, framework="numpy") as file:
        assert about["task"] == json.loads(file.metadata()["fastproto"])["checksum"]
    assert about["preprocessing"] == {"mr": task.preprocessing.to_dict()}


def test_a_file_that_answers_otherwise_is_not_written(tiny, tmp_path):
    model = load_model(tiny)
    with pytest.raises(OutputError, match=r"differ from the network's by inf; allowed: 0\.0001"):
        export.check(model, lambda images, *_: torch.full((), float("nan")), tmp_path / "a.onnx")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "export: found nothing to write; allowed: --onnx FILE, --aoti FILE or both"),
        (["--onnx", "."], ".: found a folder"),
        (["--aoti", "model.so"], "model.so: found the suffix '.so'; allowed: .pt2"),
        (["--onnx", "a.onnx"], "Run: pip install 'fastproto[export]'."),
    ],
)
def test_refused_before_computing(options, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr("fastproto.segmentation.load_model", None)
    assert main(["export", *options]) == 2
    assert said in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]
