# SPDX-License-Identifier: Apache-2.0
"""Every block of the tutorials does what the page says: a tiny network and patients, few steps.

``sh`` and ``python`` blocks are run, page by page, in an empty folder; ``text`` is what something
prints. What cannot be run has the comment ``<!-- not run: why -->`` in the line before.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from support.tiny_encoder import TinyEncoder

from fastproto.cli import main
from fastproto.data import Preprocessing, phantom
from fastproto.nn import FewShotUNet
from fastproto.nn.encoders import ENCODERS, Entry
from fastproto.segmentation import task

PAGES = sorted((Path(__file__).resolve().parents[2] / "docs" / "tutorials").glob("*.md"))
BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<why>.+) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
LANGUAGES = ("sh", "python", "text")
SHAPE = (16, 64, 64)
# Added to the commands as the pages have them; of an option given twice the last one counts.
LEARNING = ["--slices", "3", "--adapt", "0"]
QUICK = {
    "segment": ["--prior", "box"],
    "learn": LEARNING,
    "train": ["--minutes", "0.02"],
}


class Block(NamedTuple):
    """A fenced block of a page, and why it is not run."""

    line: int
    language: str
    text: str
    why: str | None


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            text[: found.start("text")].count("\n") + 1,
            found["language"],
            found["text"],
            found["why"],
        )
        for found in BLOCK.finditer(text)
    ]


def quick(arguments: list[str]) -> list[str]:
    """The command with less to do."""
    more = list(QUICK.get(arguments[0], []))
    if "--example" in arguments:
        more += LEARNING
    return arguments + more


def run_shell(text: str) -> None:
    for line in text.replace("\\\n", " ").splitlines():
        program, *arguments = shlex.split(line)
        assert program == "fastproto", f"mark what is not run: {line}"
        assert main(quick(arguments)) == 0, line


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Another base model, and other patients."""
    monkeypatch.setitem(ENCODERS, "tiny", Entry(TinyEncoder))
    torch.manual_seed(0)
    known = {
        "ct": Preprocessing("ct", image_size=64, mean=-20.0, std=120.0).to_dict(),
        "mr": Preprocessing("mr", image_size=64).to_dict(),
    }
    file = tmp_path_factory.mktemp("base") / "base.safetensors"
    FewShotUNet(encoder="tiny").save(file, {"preprocessing": known})
    monkeypatch.setattr(task, "BASE_FILE", file)
    monkeypatch.setitem(phantom.write_phantom.__kwdefaults__, "shape", SHAPE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": page.stem}
    ran = 0
    for block in blocks(page):
        assert block.language in LANGUAGES, f"{page}:{block.line}"
        if block.why or block.language == "text":
            continue
        ran += 1
        if block.language == "sh":
            run_shell(block.text)
        else:  # numbered as the page, for the traceback
            code = "\n" * (block.line - 1) + block.text
            exec(compile(code, str(page), "exec"), names)
    assert ran, f"{page} shows nothing that runs"
    assert page.read_text(encoding="utf-8").count("```") == 2 * len(blocks(page))
