# SPDX-License-Identifier: Apache-2.0
"""The notebooks in examples/ run, and show what they showed; small enough to keep."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "examples").glob("*.ipynb"))
LARGEST = 500_000  # bytes


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_was_run(path, tmp_path):
    assert path.stat().st_size < LARGEST
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    shown = [{output.output_type for output in cell.outputs} for cell in cells]
    assert not any("error" in types for types in shown)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=300, resources=resources).execute()
    assert [{output.output_type for output in cell.outputs} for cell in cells] == shown
