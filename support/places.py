"""Can these files and folders be used? A script, a checkpoint, the folders of the data and of the results."""

import ast
import contextlib
import json
import os
import sys
import tempfile
import tokenize
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

from support.failure import one_line
from support.folder import is_free

HERE = Path(__file__).resolve().parent.parent
JOB_NAME = "hello-pt"
RESERVED = {"job", "data", "cifar10", "model", "support", *sys.stdlib_module_names}  # modules, and no script's name


def client_script(text: str) -> tuple[Path, bool]:
    """Find a client script as given, or beside job.py, and see that it can be sent to the sites.

    Returns:
        The script, and whether it answers the server's validate tasks: whether it calls is_evaluate.
    """
    try:
        script = next(path.resolve() for path in (Path(text), HERE / text) if path.suffix == ".py" and path.is_file())
        with warnings.catch_warnings(), tokenize.open(script) as source:
            warnings.simplefilter("ignore")
            tree = ast.parse(source.read())
            compile(tree, script, "exec")
    except (StopIteration, OSError):
        raise ValueError(f"there is no Python file {text!r}") from None
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise ValueError(f"{text!r} is not valid Python: {error}") from error
    loaded = getattr(sys.modules.get(script.stem), "__file__", None)
    if script.stem in RESERVED or loaded not in (None, str(script)):
        raise ValueError(f"{text!r} has the name of a module that the job needs: rename the script")
    model = script.with_name("model.py")
    if model.exists() and not model.samefile(HERE / "model.py"):  # a job holds one module of a name
        raise ValueError(f"{text!r} has another model.py beside it: move the script, or run that folder's job.py")
    calls = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return script, any(call.split(".")[-1] == "is_evaluate" for call in calls)


def checkpoint(text: str, create_model: Callable) -> Path:
    """Check that a file holds finite weights of a model; no code in it is run."""
    file = Path(os.path.realpath(text))
    if not file.is_file() or file.suffix == ".py":  # the job holds it under its name, beside the scripts
        raise ValueError(f"there is no checkpoint file {text!r}")
    model = create_model()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            weights = torch.load(file, map_location="cpu", weights_only=True)
        weights = weights.get("model", weights)
    except Exception as error:  # whatever a file may raise that isn't a checkpoint
        kind = "is no file of torch.save's, or damaged" if file.stat().st_size else "is empty"
        kind = "holds something else than weights, such as a whole model" if zipfile.is_zipfile(file) else kind
        raise ValueError(f"{text!r} {kind}: write one with torch.save(model.state_dict(), FILE)") from error
    try:
        model.load_state_dict(weights)
    except Exception as error:
        raise ValueError(f"{text!r} holds no weights of {type(model).__name__}: {one_line(str(error))}") from error
    if not all(tensor.isfinite().all() for tensor in model.state_dict().values()):  # as numbers of the model's types
        raise ValueError(f"{text!r} holds weights that are not finite")
    return file


def usable_folder(text: str, writable: bool = True) -> Path:
    """Return the path of a folder that is there and can be used, or that can be made."""
    try:
        folder = Path(text).expanduser().resolve()
        with contextlib.suppress(FileNotFoundError):
            folder.stat()
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        usable = bool(text) and existing.is_dir() and os.access(existing, os.X_OK)
        if usable and (writable or existing != folder):
            tempfile.TemporaryFile(dir=existing).close()  # root may do everything, but not in /proc
    except (OSError, RuntimeError, ValueError):  # among them: a name too long, a link to itself, a user unknown
        usable = False
    if not usable:
        raise ValueError(f"can't write to {text!r}: choose another folder")
    return folder


def data_folder(text: str, sites: list[str]) -> str:
    """Check the data folder of each site, whose name stands for {site} in it."""
    folder = os.path.expandvars(text)
    if "$" in folder:
        raise ValueError(f"a variable in {text!r} is not set")
    for name in sites:
        usable_folder(folder.replace("{site}", name), writable=False)  # data that is there needs no writing
    return str(Path(folder).expanduser().resolve())


def workspace_folder(text: str) -> Path:
    """Check that a run can use a folder, and that nothing in it has the name that the run's own folder will have."""
    folder = usable_folder(text)
    run_folder = folder / JOB_NAME
    if not is_free(run_folder):
        raise ValueError(f"{run_folder} was not made by job.py: move it, or choose another folder")
    return folder


def json_file(text: str) -> Path:
    """Check that a file can be written, and replaces none but an earlier run's: a mistaken name destroys nothing."""
    file = usable_folder(os.path.dirname(text) or ".") / os.path.basename(text)
    try:
        if os.path.lexists(file):
            report = json.loads(file.read_text() if file.is_file() and not file.is_symlink() else "")
            if not {"settings", "rounds", "models"} <= report.keys():
                raise ValueError
    except (OSError, ValueError, AttributeError, RecursionError):
        raise ValueError(f"{text!r} is something else than an earlier run's JSON: choose another name") from None
    return file
