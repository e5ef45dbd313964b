# SPDX-License-Identifier: Apache-2.0
"""Runs the notebooks of examples/ and keeps what they show, without the time of day."""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbclient import NotebookClient

if __name__ == "__main__":
    for path in sorted((Path(__file__).resolve().parents[1] / "examples").glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        resources = {"metadata": {"path": str(path.parent)}}
        NotebookClient(notebook, timeout=300, record_timing=False, resources=resources).execute()
        nbformat.write(notebook, path)
        print(path.name)
