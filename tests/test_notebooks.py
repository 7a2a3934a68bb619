"""The notebooks run from top to bottom, in a kernel of their own, and end with a model that refuses."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "examples" / "notebooks"


@pytest.mark.parametrize(
    "name, tuned, adjusted",
    [
        ("repair_a_lora", r"^([\d.]+) to make", r"\n([\d.]+) i cannot"),
        ("files_to_files", r"tuned ([\d.]+)", r"adjusted ([\d.]+)"),
    ],
)
def test_a_notebook_ends_with_a_model_that_refuses(name, tuned, adjusted, tmp_path):
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    shown = [output.text for output in outputs if output.get("name") == "stdout"]
    found = [[float(m[1]) for text in shown for m in re.finditer(pattern, text)] for pattern in (tuned, adjusted)]
    assert found[0][-1] >= 0.8 and found[1][-1] <= 0.1, shown


def test_notebooks_are_stored_as_they_are_written():
    notebooks = sorted(FOLDER.glob("*.ipynb"))
    assert len(notebooks) == 2
    for path in notebooks:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
        assert not any(cell.get("outputs") for cell in notebook.cells), path.name
