"""The example of docs/own-model-and-data.md: its files in a copy of the program, and what it must return."""

import argparse
import functools
import importlib.util
import re
import shlex
import shutil

from conftest import REPO, copy_repo, replace
from documentation import command
from reference import fedavg

PAGE = (REPO / "docs" / "own-model-and-data.md").read_text()
WINE = REPO / "docs" / "own"


def block_after(words):
    """Return the page's first block of code after these words."""
    assert PAGE.count(words) == 1
    return re.search(r"```(?:diff|python)\n(.*?)```", PAGE.partition(words)[2], re.DOTALL)[1]


def flags_of(words):
    """Return the flags of job.py in a command of the page."""
    return shlex.split(command("docs/own-model-and-data.md", words).partition("python job.py ")[2])


DROPOUT, REGRESSION = block_after("## A flag of your own"), block_after("For a regression:")
EVALUATE, OWN_FLAG = flags_of("cp docs/own/*.py ."), flags_of("--train_args")


def copy_with_wine(folder):
    """Copy the program, with docs/own's files in it, and the page's own flag in both clients."""
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
    for hunk in re.split(r"^@@.*\n", diff, flags=re.MULTILINE)[1:]:
        lines = hunk.splitlines(keepends=True)
        old, new = ("".join(line[1:] for line in lines if line[0] in signs) for signs in (" -", " +"))
        replace(file, old, new)


def wine_flags():
    """Return the arguments that docs/own/data.py wants."""
    return argparse.Namespace(seed=0, sites=["site-1", "site-2"], ratio=5)


def expected_wine(**start):
    """Return what plain PyTorch and a step-weighted mean give."""
    model, data = load_module(WINE / "model.py"), load_module(WINE / "data.py")
    train_sets = [data.load_data(wine_flags(), site)[0] for site in wine_flags().sites]
    create_model = functools.partial(model.create_model, dropout=0.2)
    return fedavg(train_sets, seed=0, create_model=create_model, drop_last=True, **start)
