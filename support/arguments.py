"""Is the command line right? Whatever is wrong with it is said in one line, before anything is made."""

import argparse
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from support.failure import describe
from support.places import JOB_NAME, checkpoint, client_script, data_folder, json_file, workspace_folder

GPU_GROUP = r"(?:[0-9]+|\[[0-9]+(?:,[0-9]+)*\])"  # of SimEnv: 0,1 is two groups of a GPU, [0,1] one group of two
RANGES = {"n_clients": (1, 100), "lr": (1e-9, 100), "seed": (0, 2**32 - 1)}  # both ends included
RANGES |= dict.fromkeys(
    ["num_rounds", "num_threads", "clients_per_round", "min_sites", "epochs", "batch_size"], (1, 1_000_000)
)


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message):
        if message.startswith("unrecognized arguments"):
            message += " (those of a client script go into --train_args)"
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def command_line(args: argparse.Namespace, names: list[str], add_flags: Callable) -> str:
    """Return a client script's: the flags of these names, those that a function adds to a parser, and --train_args."""
    parser = argparse.ArgumentParser(add_help=False)
    for name in names:
        parser.add_argument(f"--{name}")
    add_flags(parser)
    words = []
    for action in parser._actions:  # argparse has no public list of them
        value = vars(args)[action.dest]
        if action.nargs == 0 and value != action.default:  # as with store_true
            words.append(action.option_strings[0 if value else -1])
        elif action.nargs != 0 and value is not None:
            words += [action.option_strings[0], *map(str, value if isinstance(value, list) else [value])]
    return f"{shlex.join(words)} {args.train_args}"


def check(args: argparse.Namespace, parser: OneLineParser, check_data_flags: Callable, create_model: Callable) -> None:
    """Check and complete job.py's arguments; on a mistake exit with 2 and one line that says what is wrong.

    Args:
        check_data_flags: data.py's.
        create_model: model.py's, for what --initial_ckpt should hold weights of.
    """
    # NVFlare 2.9.0 takes these two flags out of sys.argv when it is imported, and obeys them in recipe.execute.
    args.export = "--export" in sys.orig_argv
    try:
        for name, (low, high) in RANGES.items():
            if (value := vars(args)[name]) is not None and not low <= value <= high:  # so that nan fails, too
                raise ValueError(f"argument --{name}: {value} is not from {low} to {high}")
        args.sites = [f"site-{i + 1}" for i in range(args.n_clients)]
        args.clients_per_round = args.clients_per_round or args.n_clients
        args.min_sites = args.min_sites or args.n_clients
        find_places(args, create_model)
        for mistaken, message in mistakes(args):
            if mistaken:
                raise ValueError(message)
        check_data_flags(args)
    except ValueError as error:
        parser.error(str(error))
    except Exception as error:  # of a mistake in a model.py or data.py
        parser.error(describe(error))
    args.num_threads = args.num_threads or args.n_clients


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
    n_clients = args.n_clients
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    return [
        ("num_threads" in given and args.env != "sim", "--num_threads is for --env sim"),
        ("gpu" in given and args.env != "sim", "--gpu is for --env sim"),
        ("num_threads" in given and args.export, "--num_threads is for a run, and says nothing to --export"),
        ("gpu" in given and args.export, "--gpu is for a run, and says nothing to --export"),
        ("json" in given and args.export, "--json is for a run, and says nothing to --export"),
        (args.export and args.env != "sim", f"--export and --env {args.env} are two ways to use a job: choose one"),
        ((args.env == "prod") != ("startup_kit" in given), "--env prod and --startup_kit go together"),
        *(
            (
                name in given and vars(args)[name] > n_clients,
                f"--{name} {vars(args)[name]} is more than --n_clients {n_clients}",
            )
            for name in ("num_threads", "clients_per_round", "min_sites")
        ),
        (
            args.env == "sim" and not args.export and args.min_sites < n_clients,
            "--min_sites is for --env poc or prod: NVFlare's simulator waits for a lost site for ever",
        ),
        (
            args.clients_per_round <= n_clients - args.min_sites,
            "a round could draw only sites that are lost: raise --clients_per_round or --min_sites",
        ),
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


def find_places(args: argparse.Namespace, create_model: Callable) -> None:
    """Check the files and folders one by one, and make their paths absolute."""
    kinds = {
        "train_script": client_script,
        "train_args": shell_words,
        "initial_ckpt": lambda text: checkpoint(text, create_model),
        "workspace": workspace_folder,
        "json": json_file,
    }
    if args.env != "prod" and not args.export:  # where it is on the sites
        kinds["data_root"] = lambda text: data_folder(text, args.sites)
    for name, kind in kinds.items():
        if (text := getattr(args, name, None)) is not None:
            try:
                setattr(args, name, kind(str(text)))
            except ValueError as error:
                raise ValueError(f"argument --{name}: {error}") from error
    args.train_script, args.evaluates = args.train_script
    args.startup_kit = args.startup_kit and args.startup_kit.absolute()
    args.run_folder = args.workspace / JOB_NAME


def shell_words(text: str) -> str:
    """Check that NVFlare, which splits flags as a shell does, can split these."""
    shlex.split(text)
    return text
