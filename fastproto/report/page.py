# SPDX-License-Identifier: Apache-2.0
"""One HTML file that needs nothing else: no network, no folder beside it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fastproto._files import write_text
from fastproto._version import __version__
from fastproto.data.geometry import SIDES

_FOLDER = Path(__file__).with_name("page")


def write_page(path: str | os.PathLike[str], title: str, **parts: Any) -> None:
    """Write the page; each part that is given has a section of ``page/page.html``.

    Args:
        path: HTML file to write.
        title: Its heading.
        parts: ``training``, ``scores`` and ``results``: what `training_contents`,
            `scores_contents` and `Results.contents` return, or None.

    Raises:
        OutputError: The file cannot be written.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    pages = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,  # names of files and organs hold what they like
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = (_FOLDER.joinpath(f"page.{end}").read_text("utf-8") for end in ("css", "js"))
    text = pages.get_template("page.html").render(
        title=title, style=style, script=script, version=__version__, sides=SIDES, **parts
    )
    write_text(path, text)
