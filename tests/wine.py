"""The example of docs/own-model-and-data.md: its diffs, its files over a copy of the program, what it must return."""

import argparse
import functools
import importlib.util
import re
import shlex
import shutil

from conftest import REPO, copy_repo
from documentation import command
from reference import fedavg

PAGE = (REPO / "docs" / "own-model-and-data.md").read_text()
MODEL_DIFF, DATA_DIFF, REGRESSION, DROPOUT = re.findall(r"```diff\n(.*?)```", PAGE, re.DOTALL)
WINE = REPO / "docs" / "wine"


def flags_of(words):
    """Return the flags of job.py in a command of the page."""
    return shlex.split(command("docs/own-model-and-data.md", words).partition("python job.py ")[2])


EVALUATE, OWN_FLAG = flags_of("cp docs/wine/*.py ."), flags_of("--train_args")


def copy_with_wine(folder):
    """Copy the program, with docs/wine's files in it, and the page's own flag in both clients."""
    repo = copy_repo(folder)
    for name in ("model.py", "data.py"):
        shutil.copy(WINE / name, repo / name)
    for name in ("client.py", "client_with_eval.py"):
        apply(DROPOUT, repo / name)
    return repo


def load_module(file):
    spec = importlib.util.spec_from_file_location(f"own_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def apply(diff, file):
    """Change a file as a diff of the page says."""
    source = file.read_text()
    for hunk in re.split(r"^@@.*\n", diff, flags=re.MULTILINE)[1:]:
        lines = hunk.splitlines(keepends=True)
        old, new = ("".join(line[1:] for line in lines if line[0] in signs) for signs in (" -", " +"))
        assert source.count(old) == 1
        source = source.replace(old, new)
    file.write_text(source)


def expected_wine(**start):
    """Return what plain PyTorch and a step-weighted mean give."""
    model, data = load_module(WINE / "model.py"), load_module(WINE / "data.py")
    args = argparse.Namespace(seed=0, n_clients=2, ratio=5)
    train_sets = [data.load_data(args, site)[0] for site in ("site-1", "site-2")]
    create_model = functools.partial(model.create_model, dropout=0.2)
    return fedavg(train_sets, seed=0, create_model=create_model, drop_last=True, **start)
