# SPDX-License-Identifier: Apache-2.0
"""What is published: the source archive holds what git has; every file names the same version."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from fastproto import __version__

ROOT = Path(__file__).resolve().parents[2]
MAKE_ARCHIVE = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
# Of no use without the forge or the checkout.
LEFT_OUT = (".ci/", ".github/", ".gitignore", ".pre-commit-config.yaml")
ADDED = ("PKG-INFO", "setup.cfg")


@pytest.fixture(scope="module")
def committed() -> set[str]:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("this is no checkout of git")
    return {name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()}


def test_the_source_archive_holds_what_git_has(committed, tmp_path, monkeypatch):
    pytest.importorskip("setuptools", "77")
    copy = tmp_path / "copy"  # egg-info is written beside what it describes
    for name in committed:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).symlink_to(ROOT / name)
    (copy / "fastproto" / "lib").mkdir()
    (copy / "fastproto" / "lib" / "libfastproto_cpu.so").touch()  # an earlier build's
    monkeypatch.setenv("FASTPROTO_NATIVE", "0")
    command = [sys.executable, "-c", MAKE_ARCHIVE, str(tmp_path)]
    subprocess.run(command, cwd=copy, check=True, capture_output=True)
    with tarfile.open(tmp_path / f"fastproto-{__version__}.tar.gz") as archive:
        names = {m.name.split("/", 1)[1] for m in archive.getmembers() if not m.isdir()}
    names = {n for n in names if n not in ADDED and not n.startswith("fastproto.egg-info/")}
    assert names == {name for name in committed if not name.startswith(LEFT_OUT)}


def test_every_file_names_this_version():
    for name, pattern in (("CHANGELOG.md", r"^## (.+)$"), ("CITATION.cff", r"^version: (.+)$")):
        found = re.search(pattern, (ROOT / name).read_text("utf-8"), re.MULTILINE)
        assert found, name
        assert found[1] == __version__, name
