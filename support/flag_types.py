"""Is a single flag right? Types for argparse, each of which returns the finished value."""

import argparse
import ast
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from model import create_model
from support.text import HERE, MODULES, describe, one_line

RESERVED = {"job", "data", "cifar10", "model", "support", *sys.stdlib_module_names}  # no script's name


def within(kind: Callable, low: float, high: float) -> Callable:
    """Return an argparse type: a number from low to high, both included."""

    def number(text: str):
        if not low <= kind(text) <= high:  # so that nan fails, too
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return kind(text)

    number.__name__ = kind.__name__  # argparse puts this name into its message
    return number


def site_name(text: str) -> str:
    """Check a site's name, which is the name of a folder and of a host, too."""
    if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", text) or text == "server":
        raise argparse.ArgumentTypeError(f"{text!r} is no site's name: use small letters, digits and -, but not server")
    return text


def gpu_groups(text: str) -> list[str]:
    """Return the groups of a list of GPUs: 0,1 is two groups of one GPU, [0,1] one group of two."""
    groups = re.findall(r"[0-9]+|\[[0-9]+(?:,[0-9]+)*\]", text)
    if not groups or ",".join(groups) != text:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of GPUs: write 0 or 0,1 or [0,1]")
    return groups


def client_script(text: str) -> Path:
    """Find a client script as given, or beside job.py, and see that it can be sent to the sites."""
    found = [path for path in (Path(text), HERE / text) if path.suffix == ".py" and os.path.isfile(path)]
    if not found:
        raise argparse.ArgumentTypeError(f"there is no Python file {text!r}")
    script = found[0].resolve()
    try:
        ast.parse(script.read_bytes(), script.name)
    except (SyntaxError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not valid Python: {error}") from error
    loaded = getattr(sys.modules.get(script.stem), "__file__", None)
    if script.stem in RESERVED or loaded not in (None, str(script)):  # loaded: job.py imported such a module
        raise argparse.ArgumentTypeError(f"{text!r} has the name of a module that the job needs: rename the script")
    for module in MODULES:  # a job holds one module of each name
        beside = script.with_name(module)
        if beside.exists() and not beside.samefile(HERE / module):
            raise argparse.ArgumentTypeError(
                f"{text!r} has another {module} beside it: move it, or run that folder's job.py"
            )
    return script


def evaluates(script: Path) -> bool:
    """Tell whether a client script answers the server's validate tasks: whether it calls is_evaluate."""
    nodes = ast.walk(ast.parse(script.read_bytes()))
    calls = [ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)]
    return any(call.split(".")[-1] == "is_evaluate" for call in calls)


def checkpoint(text: str) -> Path:
    """Check that a file holds weights of the model; no code in it is run."""
    file = Path(os.path.realpath(os.path.expanduser(text)))
    if not os.path.isfile(file) or file.suffix == ".py":  # the job holds it by its own name, beside the scripts
        raise argparse.ArgumentTypeError(f"there is no checkpoint file {text!r}")
    try:
        model = create_model()
    except (Exception, SystemExit) as error:
        raise argparse.ArgumentTypeError(f"create_model failed with {describe(error)}") from error
    try:
        weights = torch.load(file, map_location="cpu", weights_only=True)
        weights = weights.get("model", weights)  # where NVFlare puts them
        if any(getattr(tensor, "requires_grad", False) for tensor in weights.values()):
            raise TypeError("NVFlare can't load parameters")  # a state_dict holds plain tensors
    except Exception as error:  # torch's own text may advise to run the code in the file
        advice = "write one with torch.save(model.state_dict(), FILE)"
        raise argparse.ArgumentTypeError(f"{text!r} is no file of weights: {advice}") from error
    for entry in ("state_dict", "model_state_dict"):  # where tutorials put the weights
        if entry in weights:
            advice = f"write them alone, with torch.save(torch.load({text!r})[{entry!r}], FILE)"
            raise argparse.ArgumentTypeError(f"{text!r} has its weights in an entry: {advice}")
    finite = {name: tensor.isfinite() for name, tensor in model.state_dict().items()}  # -inf in a mask may stay
    try:
        model.load_state_dict(weights)
    except Exception as error:
        name = type(model).__name__
        raise argparse.ArgumentTypeError(f"{text!r} holds no weights of {name}: {one_line(str(error))}") from error
    if any((finite[name] & ~tensor.isfinite()).any() for name, tensor in model.state_dict().items()):
        raise argparse.ArgumentTypeError(f"{text!r} holds weights that are not finite")
    return file


def folder(text: str) -> Path:
    """Return the path of a folder that can be written to, or that can be made."""
    path = Path(text).expanduser().resolve()
    existing = next(parent for parent in (path, *path.parents) if os.path.lexists(parent))
    if not text or not existing.is_dir() or not os.access(existing, os.W_OK):
        raise argparse.ArgumentTypeError(f"can't write to {text!r}: choose another folder")
    return path
