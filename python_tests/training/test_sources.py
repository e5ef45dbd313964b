# SPDX-License-Identifier: Apache-2.0
"""A configuration's data: its cases, its classes, and the share of each source."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fastproto.data.geometry import canonical
from fastproto.data.phantom import write_phantom
from fastproto.data.volume import read_label, write_volume
from fastproto.defaults import IGNORE
from fastproto.errors import InputError, LabelError
from fastproto.training import TrainConfig
from fastproto.training.episodes import EpisodeSource, episode_generator
from fastproto.training.sources import read_training_data

Configure = Callable[..., TrainConfig]


def drawn(source: EpisodeSource, count: int) -> list[str]:
    """The descriptions of some episodes."""
    return [source.draw(episode_generator(0, index)).description for index in range(count)]


def test_no_label_is_looked_at_without_their_share(
    configure: Configure, phantom: Path, tmp_path: Path
):
    shutil.copytree(phantom, tmp_path / "data")
    for label in (tmp_path / "data" / "labels").iterdir():
        label.write_bytes(b"nobody reads this")
    config = configure(
        tmp_path / "run", data=str(tmp_path / "data"), label_fraction=0.0, validation_cases=()
    )
    data = read_training_data(config)
    assert data.validation is None
    assert all("supervoxel" in text for text in drawn(data.training, 10))
    assert data.extra["classes"] == {}


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_labels_have_their_share_of_the_episodes(
    configure: Configure, tmp_path: Path, share: float
):
    source = read_training_data(configure(tmp_path, label_fraction=share)).training
    found = sum("class " in text for text in drawn(source, 200)) / 200
    assert found == pytest.approx(share, abs=0.1)


def test_several_data_sets_of_both_modalities(configure: Configure, phantom: Path, tmp_path: Path):
    """One with labels, one without, and a plain folder of a single scan."""
    bare = write_phantom(tmp_path / "mr", patients=3, modality="mr", shape=(16, 64, 64))
    shutil.rmtree(bare / "labels")
    description = json.loads((bare / "dataset.json").read_text())
    del description["labels"]
    (bare / "dataset.json").write_text(json.dumps(description))
    plain = tmp_path / "plain"
    plain.mkdir()
    shutil.copy(phantom / "images" / "ct_001.nii.gz", plain / "one.nii.gz")
    folders = tuple(map(str, (phantom, bare, plain)))
    config = configure(tmp_path / "run", data=folders, holdout_cases=("ct_001", "mr_000"))
    data = read_training_data(config)
    assert data.slices.keys() == {"0/ct_000", "1/mr_001", "1/mr_002", "2/one"}
    assert data.extra["preprocessing"].keys() == {"ct", "mr"}
    assert data.extra["preprocessing"]["ct"]["mean"] is not None
    assert data.extra["training_cases"] == ["ct_000", "mr_001", "mr_002", "one"]
    assert data.summary.startswith("learning from 4 scans without labels (supervoxels) and, in 1")
    texts = drawn(data.training, 300)
    for case in ("ct_", "mr_", "one"):
        found = sum(f"support {case}" in text for text in texts) / 300
        assert found == pytest.approx(1 / 3, abs=0.09), case
    assert all("support ct_" in text for text in texts if "class " in text)
    assert "ct_002" in data.validation.episode(0).description


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"holdout": ("spleen", "heart")}, "heart"),
        ({"classes": ("heart",)}, "heart"),
        ({"classes": ("spleen", "liver")}, "base classes"),
        ({"holdout_cases": ("ct_9",)}, "no case ct_9"),
        ({"validation_cases": ("ct_9",)}, "no case ct_9"),
        ({"holdout_cases": ("ct_000", "ct_001")}, "no case left"),
    ],
)
def test_unknown_classes_and_cases_are_named(
    configure: Configure, tmp_path: Path, changes: dict, message: str
):
    with pytest.raises(InputError, match=message):
        read_training_data(configure(tmp_path, **changes))


def test_setting_two_drops_slices_with_held_out_classes(configure: Configure, tmp_path: Path):
    every, without = (
        read_training_data(configure(tmp_path, drop_excluded_slices=drop)).slices
        for drop in (False, True)
    )
    assert without.keys() == every.keys()
    for case, slices in without.items():
        assert set(slices) < set(every[case])


def test_validation_is_the_same_for_every_seed(configure: Configure, tmp_path: Path):
    first, second = (
        read_training_data(configure(tmp_path, seed=seed)).validation.episode(0) for seed in (0, 1)
    )
    assert torch.equal(first.query_images, second.query_images)
    assert "ct_002" in first.description
    assert "ct_000" not in first.description


@pytest.fixture
def relabelled(phantom: Path, tmp_path: Path) -> Callable[..., Path]:
    """Makes a copy of the data set in which a dot is drawn, in some slices of some cases."""

    def make(labels: dict[str, int], pixels: int = 1, value: int = 50) -> Path:
        folder = tmp_path / "data"
        shutil.copytree(phantom, folder)
        description = json.loads((folder / "dataset.json").read_text())
        (folder / "dataset.json").write_text(json.dumps({**description, "labels": labels}))
        for path in (folder / "labels").iterdir():
            label = read_label(path)
            label.array[(label.array > 0) & ~np.isin(label.array, list(labels.values()))] = 0
            label.array[4:9, 30 : 30 + pixels, 30 : 30 + pixels] = value
            write_volume(path, label.array, like=label)
        return folder

    return make


def test_classes_asked_for_that_no_episode_can_have_are_named(
    configure: Configure, relabelled: Callable[..., Path], tmp_path: Path
):
    data = str(relabelled({"liver": 1, "Dot": 50, "nowhere": 51}))
    shared = {"data": data, "holdout": ()}
    read = read_training_data(configure(tmp_path / "run", **shared))
    assert read.extra["classes"] == {"1": "liver"}  # all that there are, nobody asked for more
    read = read_training_data(configure(tmp_path / "run", classes=("LIVER",), **shared))
    assert read.extra["classes"] == {"1": "liver"}
    for unused in ("dot", 50, "nowhere"):
        config = configure(tmp_path / "run", classes=("liver", unused), **shared)
        with pytest.raises(LabelError, match=rf"classes: found {unused}, .* 5 pixels"):
            read_training_data(config)
    config = configure(tmp_path / "run", classes=("liver", "dot"), min_pixels=1, **shared)
    assert read_training_data(config).extra["classes"] == {"1": "liver", "50": "Dot"}
    (tmp_path / "data" / "labels" / "ct_001.nii.gz").unlink()  # so nothing is learned from labels
    with pytest.raises(LabelError, match=r"classes: found liver, .* every case needs a label map"):
        read_training_data(configure(tmp_path / "run", classes=("liver",), **shared))


def test_classes_held_out_are_found_in_any_case(configure: Configure, tmp_path: Path):
    data = read_training_data(configure(tmp_path, holdout=("SPLEEN", "Left Kidney")))
    assert set(data.extra["holdout"].values()) == {"spleen", "left kidney"}
    assert not {"spleen", "left kidney"} & set(data.extra["classes"].values())


def test_what_is_ignored_is_nothing_to_train_on(
    configure: Configure, relabelled: Callable[..., Path], tmp_path: Path
):
    data = str(relabelled({"liver": 1, "gallbladder": 9, "ignore": 50}, pixels=20))
    config = configure(tmp_path / "run", data=data, holdout=("gallbladder",), label_fraction=1.0)
    read = read_training_data(config)
    assert read.extra["classes"] == {"1": "liver"}
    episode = read.training.batch(range(30))
    for masks in (episode.support_masks, episode.query_masks):
        assert set(masks.unique().tolist()) == {IGNORE, 0, 1}
    assert set(read.validation.batch(range(30)).query_masks.unique().tolist()) == {IGNORE, 0, 1}
    for classes in (("ignore",), (50,)):
        with pytest.raises(LabelError, match="allowed: 1 liver, 9 gallbladder"):
            read_training_data(dataclasses.replace(config, classes=classes))
    # What is ignored may be a class held out: setting 2 sees none of its slices.
    config = dataclasses.replace(config, label_fraction=0.0, drop_excluded_slices=True)
    config = dataclasses.replace(config, validation_episodes=0)
    kept = read_training_data(config).slices["0/ct_000"]
    label = read_label(tmp_path / "data" / "labels" / "ct_000.nii.gz")
    seen = canonical(label).array
    clean = ~np.isin(seen, (9, 50)).any(axis=(1, 2))
    assert 0 < len(kept) < len(clean)
    assert set(kept) <= set(np.flatnonzero(clean).tolist())


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "holdout"), [("ixi_brain_mr", (4, 6, 7, 8)), ("openkbp_hn_ct", (1, 2))]
)
def test_episodes_of_real_scans(
    test_data: Path, configure: Configure, tmp_path: Path, name: str, holdout: tuple[int, ...]
):
    data = test_data / name
    cases = json.loads((data / "dataset.json").read_text())["cases"]
    config = configure(
        tmp_path, data=str(data), holdout=holdout, image_size=128, holdout_cases=tuple(cases[5:]),
        validation_cases=tuple(cases[3:5]), validation_episodes=1,
    )  # fmt: skip
    read = read_training_data(config)
    assert read.slices.keys() == {f"0/{case}" for case in cases[:3]}
    assert read.validation is not None
    for episode in (read.training.batch(range(8)), read.validation.batch(range(8))):
        assert episode.support_images.isfinite().all()
        assert episode.support_images.abs().max() < 20
        assert (episode.support_masks == 1).flatten(1).sum(1).min() > 0
    assert (episode.query_masks == 1).flatten(1).sum(1).min() > 0
