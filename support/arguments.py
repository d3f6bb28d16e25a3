"""Is the command line right? Whatever is wrong with it is said in one line, before anything is made."""

import argparse
import ast
import contextlib
import json
import os
import re
import shlex
import sys
import tempfile
import tokenize
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from support.failure import one_line
from support.folder import is_free

HERE = Path(__file__).resolve().parent.parent
JOB_NAME = "hello-pt"
GPU_GROUP = r"(?:[0-9]+|\[[0-9]+(?:,[0-9]+)*\])"  # of SimEnv: 0,1 is two groups of a GPU, [0,1] one group of two
RESERVED = {"job", "data", "cifar10", "model", "support", *sys.stdlib_module_names}  # modules, and no script's name
RANGES = {"n_clients": (1, 100), "lr": (1e-9, 100), "seed": (0, 2**32 - 1)}  # both ends included
RANGES |= dict.fromkeys(["num_rounds", "num_threads", "epochs", "batch_size"], (1, 1_000_000))


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def command_line(args: argparse.Namespace, names: list[str], add_flags: Callable) -> str:
    """Return the flags of these names, and those that a function adds to a parser, with their values in args."""
    parser = argparse.ArgumentParser()
    add_flags(parser)
    flags = {name: vars(args)[name] for name in (*names, *vars(parser.parse_args([])))}
    return " ".join(f"--{name} {shlex.quote(str(value))}" for name, value in flags.items() if value is not None)


def check(args: argparse.Namespace, parser: OneLineParser, check_data_flags: Callable, make_model: Callable) -> None:
    """Check and complete job.py's arguments; on a mistake exit with 2 and one line that says what is wrong.

    Args:
        check_data_flags: data.py's.
        make_model: returns the network that --initial_ckpt should hold weights of.
    """
    # NVFlare 2.9.0 takes these two flags out of sys.argv when it is imported, and obeys them in recipe.execute.
    args.export = "--export" in sys.orig_argv
    try:
        for name, (low, high) in RANGES.items():
            if (value := vars(args)[name]) is not None and not low <= value <= high:  # so that nan fails, too
                raise ValueError(f"argument --{name}: {value} is not from {low} to {high}")
        find_places(args, make_model)
        for mistaken, message in mistakes(args):
            if mistaken:
                raise ValueError(message)
        check_data_flags(args)
    except ValueError as error:
        parser.error(str(error))
    args.num_threads = args.num_threads or args.n_clients
    args.sites = [f"site-{i + 1}" for i in range(args.n_clients)]


def mistakes(args: argparse.Namespace) -> list[tuple[object, str]]:
    """Return what can be wrong with flags together, each with whether it is and how that is said."""
    given = {name for name, value in vars(args).items() if value is not None}
    data_root = getattr(args, "data_root", "/")  # data of your own may do without
    on_sites = args.env == "prod" or args.export
    in_run_folder = f"can't be in {args.run_folder}, which makes room for the new run"
    own = (args.run_folder.with_suffix(".lock"), *args.run_folder.parents)
    simulator = (sys.executable, tempfile.gettempdir(), str(args.workspace))
    unfit = [path for path in simulator if not args.export and re.search(r"""[\s'"#\\]""", path)]  # split as by a shell
    groups, gpus = len(re.findall(GPU_GROUP, args.gpu or "")), f"{GPU_GROUP}(,{GPU_GROUP})*"
    n_clients, num_threads = args.n_clients, args.num_threads or 1
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    return [
        ("num_threads" in given and args.env != "sim", "--num_threads is for --env sim"),
        ("gpu" in given and args.env != "sim", "--gpu is for --env sim"),
        ("num_threads" in given and args.export, "--num_threads is for a run, and says nothing to --export"),
        ("gpu" in given and args.export, "--gpu is for a run, and says nothing to --export"),
        ("json" in given and args.export, "--json is for a run, and says nothing to --export"),
        (args.export and args.env != "sim", f"--export and --env {args.env} are two ways to use a job: choose one"),
        ((args.env == "prod") != ("startup_kit" in given), "--env prod and --startup_kit go together"),
        (num_threads > n_clients, f"--num_threads {num_threads} is more than --n_clients {n_clients}"),
        (
            "gpu" in given and not re.fullmatch(gpus, args.gpu),
            f"--gpu {args.gpu!r} is no list: write 0 or 0,1 or [0,1]",
        ),
        (groups > n_clients, f"--gpu {args.gpu} has more groups than --n_clients {n_clients}"),
        (args.cross_site_eval and not args.evaluates, "--cross_site_eval needs a script that calls is_evaluate"),
        (on_sites and data_root[:1] not in ("/", "~", "$"), "--data_root is on the sites: begin it with /, ~ or $"),
        (not on_sites and Path(data_root).is_relative_to(args.run_folder), f"--data_root {in_run_folder}"),
        (args.train_script.is_relative_to(args.run_folder), f"--train_script {in_run_folder}"),
        (args.json and args.json.is_relative_to(args.run_folder), f"--json {in_run_folder}"),
        (args.json in own, f"--json can't be {args.json}, which is job.py's own"),
        (
            not re.fullmatch(r"[1-9][0-9]{0,4}(,[1-9][0-9]{0,4})*", threads),
            f"OMP_NUM_THREADS={threads!r} in the environment is no number of threads",
        ),
        (unfit, f"NVFlare's simulator can't take blanks, quotes, # or \\ in {' and '.join(unfit)}"),
    ]


def find_places(args: argparse.Namespace, make_model: Callable[[], nn.Module]) -> None:
    """Check the files and folders one by one, and make their paths absolute."""
    kinds = {
        "train_script": client_script,
        "initial_ckpt": lambda text: checkpoint(text, make_model),
        "workspace": workspace_folder,
        "json": json_file,
    }
    if args.env != "prod" and not args.export:  # where it is on the sites
        kinds["data_root"] = data_folder
    for name, kind in kinds.items():
        if (text := getattr(args, name, None)) is not None:
            try:
                setattr(args, name, kind(str(text)))
            except ValueError as error:
                raise ValueError(f"argument --{name}: {error}") from error
    args.train_script, args.evaluates = args.train_script
    args.startup_kit = args.startup_kit and args.startup_kit.absolute()
    args.run_folder = args.workspace / JOB_NAME


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


def checkpoint(text: str, make_model: Callable[[], nn.Module]) -> Path:
    """Check that a file holds finite weights of a model; no code in it is run."""
    file = Path(os.path.realpath(text))
    if not file.is_file() or file.suffix == ".py":  # the job holds it under its name, beside the scripts
        raise ValueError(f"there is no checkpoint file {text!r}")
    model = make_model()
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
        finite = all(tensor.is_floating_point() for tensor in weights.values())
    except Exception as error:
        raise ValueError(f"{text!r} holds no weights of {type(model).__name__}: {one_line(str(error))}") from error
    if not finite or not all(
        tensor.isfinite().all() for tensor in model.state_dict().values()
    ):  # as the model has them
        raise ValueError(f"{text!r} holds weights that are not finite floating-point numbers")
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


def data_folder(text: str) -> str:
    folder = os.path.expandvars(text)
    if "$" in folder:
        raise ValueError(f"a variable in {text!r} is not set")
    return str(usable_folder(folder, writable=False))  # data that is there needs no writing


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
