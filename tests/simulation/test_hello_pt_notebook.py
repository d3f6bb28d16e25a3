"""docs/hello-pt.ipynb: it runs from a clean copy on synthetic images, and its saved outputs are those of its code."""

import ast
import os
import re
import shutil
import subprocess
import sys

import nbformat
import pytest

from conftest import REPO, copy_repo, end_all
from hello_pt_notebook import code_cells, code_hash

FILE = REPO / "docs" / "hello-pt.ipynb"
NOTEBOOK = nbformat.read(FILE, as_version=4)
TEXT = "\n\n".join(cell.source for cell in NOTEBOOK.cells if cell.cell_type == "markdown")


@pytest.fixture
def copy(tmp_path):
    """A copy of what the notebook needs, in which it lies at the same place."""
    repo = copy_repo(tmp_path / "repo")
    shutil.copy(REPO / "requirements.txt", repo)
    shutil.copytree(REPO / "docs", repo / "docs")
    yield repo / "docs" / "hello-pt.ipynb"
    end_all(tmp_path)


def execute(file, **variables):
    # ipykernel catches what a cell's processes print, unless it believes that it runs in a test.
    env = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    program = REPO / "tests" / "hello_pt_notebook.py"
    arguments = [f"{name}={value}" for name, value in variables.items()]
    command = [sys.executable, program, file, *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)


def kinds(cell):
    """Return what a cell puts out, without warnings: other releases of a library have others."""
    kinds = [(output.output_type, output.get("name"), *output.get("data", {})) for output in cell.outputs]
    return [kind for kind in kinds if "stderr" not in kind]


def printed(cell):
    return "".join(output.get("text", "") for output in cell.outputs)


def test_notebook_runs_from_a_clean_copy(copy, tmp_path):
    run = execute(copy, DATASET="synthetic", WORKSPACE=tmp_path / "workspace")
    assert run.returncode == 0, run.stderr

    saved = nbformat.read(copy, as_version=4)
    assert [cell.source for cell in saved.cells] == [cell.source for cell in NOTEBOOK.cells]
    now, before = code_cells(saved), code_cells(NOTEBOOK)
    assert [kinds(cell) for cell in now] == [kinds(cell) for cell in before]
    run_of_sites = "".join(printed(cell) for cell in now if "job.main" in cell.source)
    assert len(re.findall(r"^site-[123]  round [1-8]/8  epoch 1/1  loss", run_of_sites, re.MULTILINE)) == 3 * 8
    recipes = [cell.outputs[0].data["text/plain"] for cell in (*now, *before) if "make_recipe" in cell.source]
    assert len(recipes) == 2 and recipes[0] == recipes[1] and "FedAvgRecipe(" in recipes[0]


def test_cell_that_fails_is_an_error_and_nothing_is_saved(copy):
    notebook = nbformat.read(copy, as_version=4)
    code_cells(notebook)[0].source += "\n1 / 0"
    nbformat.write(notebook, copy)
    before = copy.read_bytes()
    run = execute(copy)
    assert run.returncode != 0 and "ZeroDivisionError" in run.stderr
    assert copy.read_bytes() == before


def test_saved_outputs_are_those_of_the_code_on_cifar10():
    assert NOTEBOOK.metadata.get("code_of_the_outputs") == code_hash(NOTEBOOK), "run tests/hello_pt_notebook.py"
    cells = code_cells(NOTEBOOK)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not any(output.output_type == "error" or output.get("name") == "stderr" for output in outputs)
    output = "".join(printed(cell) for cell in cells)
    assert "\nTraining on cifar10 (dirichlet split of alpha 0.1).\n" in f"\n{output}"
    assert set(re.findall(r"(?<![\w*.])/\w+/\w+/", output)) == {"/tmp/nvflare/"}  # no path of some computer


def test_notebook_is_short_and_light():
    assert len(NOTEBOOK.cells) <= 25
    assert sum(len(cell.source.splitlines()) for cell in code_cells(NOTEBOOK)) <= 150
    assert FILE.stat().st_size <= 1_500_000


def test_notebook_explains_every_argument_of_the_recipe():
    calls = [node for node in ast.walk(ast.parse((REPO / "job.py").read_text())) if isinstance(node, ast.Call)]
    (recipe,) = [call for call in calls if getattr(call.func, "id", "") == "FedAvgRecipe"]
    arguments = [keyword.arg for keyword in recipe.keywords]
    assert re.findall(r"^\| `(\w+)` \|", TEXT, re.MULTILINE) == arguments
    assert f"`FedAvgRecipe` gets {len(arguments)} arguments" in TEXT


def test_links_of_the_notebook_lead_to_files():
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", TEXT) if not target.startswith("http")]
    assert targets
    assert [target for target in targets if not (FILE.parent / target).exists()] == []
