"""Run docs/hello-pt.ipynb from top to bottom, and save it with its outputs:

python tests/hello_pt_notebook.py docs/hello-pt.ipynb

That takes some minutes. Arguments such as DATASET=synthetic change the notebook's variables for this run alone.
"""

import hashlib
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

LONGEST_CELL = 600  # seconds


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def code_hash(notebook: nbformat.NotebookNode) -> str:
    """Return a hash of the code. The notebook's metadata keep that of the code which made the outputs."""
    return hashlib.sha256("\0".join(cell.source for cell in code_cells(notebook)).encode()).hexdigest()


def merge_lines(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Make one output of what was printed in a row, as JupyterLab does."""
    merged = []
    for output in outputs:
        if merged and output.output_type == "stream" and merged[-1].get("name") == output.name:
            merged[-1].text += output.text
        else:
            merged.append(output)
    return merged


def run(file: Path, variables: dict[str, str]) -> None:
    """Run a notebook in its folder and save its outputs.

    Raises:
        CellExecutionError: a cell failed. Nothing is saved.
    """
    notebook = nbformat.read(file, as_version=4)
    sources = [cell.source for cell in notebook.cells]
    for cell in code_cells(notebook):
        for name, value in variables.items():
            cell.source = re.sub(rf'^{name} = ".*?"', f'{name} = "{value}"', cell.source, flags=re.MULTILINE)
    place = {"metadata": {"path": str(file.parent)}}
    client = NotebookClient(notebook, timeout=LONGEST_CELL, resources=place, record_timing=False)
    client.execute()
    for cell, source in zip(notebook.cells, sources):
        cell.source = source
    for cell in code_cells(notebook):
        cell.outputs = merge_lines(cell.outputs)
    notebook.metadata["code_of_the_outputs"] = code_hash(notebook)
    nbformat.write(notebook, file)


if __name__ == "__main__":
    run(Path(sys.argv[1]).resolve(), dict(argument.split("=", 1) for argument in sys.argv[2:]))
