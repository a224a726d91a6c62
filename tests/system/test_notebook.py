"""The notebook runs from its first cell to its last, and the model has learned what it says."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from fsdp_qlora.config import PROJECT_DIR

pytestmark = pytest.mark.system


def test_the_notebook_trains_answers_and_merges(tmp_path: Path, monkeypatch):
    """In an empty directory, without outputs that were committed."""
    monkeypatch.setenv("PYTHONPATH", str(PROJECT_DIR))
    notebook = nbformat.read(PROJECT_DIR / "recipes" / "quickstart.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs for cell in cells)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=280, resources=resources).execute()
    said = ["".join(out.get("text", "") for out in cell.outputs) for cell in cells]
    values = [out.data["text/plain"] for cell in cells for out in cell.outputs if "data" in out]
    assert "fits" in "".join(said) and "12 " in "".join(said)
    assert "blue" in values[-2] and "model.safetensors" in values[-1]
    assert (tmp_path / "quickstart" / "notebook" / "report.html").is_file()
