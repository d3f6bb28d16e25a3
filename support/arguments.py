"""Is the command line right? Whatever is wrong with it is said in one line, before anything is made."""

import argparse
import os
import re
import shlex
import sys
import tempfile
import time

from data import add_data_flags
from support import flag_types as types
from support.text import HERE, JOB_NAME, describe, one_line

TRAIN_FLAGS = ["epochs", "batch_size", "lr", "seed"]  # of every client script, beside --sites
LIMITED = ["num_threads", "clients_per_round", "min_sites"]  # each is at most, and by default, the number of sites


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message):
        if message.startswith("unrecognized arguments"):
            message += " (those of a client script go into --train_args)"
        self.exit(2, f"{self.prog}: error: {one_line(message, most=1_000)}\n")


def parse(parser: OneLineParser, argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line with the flags of data.py, too; on a mistake, exit with status 2 and one line.

    Completes sites, n_clients and other flags. Adds:
        command: the command line, as one would type it again.
        data_words: the words of it that are data.py's flags, for the client script.
        export: whether --export was given.
        evaluates: whether the client script evaluates models.
        run_folder: WORKSPACE/hello-pt.
        earlier_run: the path that an earlier run's folder will get.
    """
    words = sys.argv[1:] if argv is None else argv
    try:
        # So far, parser knows job.py's own flags alone, and --help would show no others.
        _, data_words = parser.parse_known_args([word for word in words if word not in ("-h", "--help")])
        add_data_flags(parser)
        args = parser.parse_args(words)
        if taken := {"command", "data_words", "export", "evaluates", "run_folder", "earlier_run"} & vars(args).keys():
            raise ValueError(f"{taken.pop()} can't be a flag of data.py: rename it in add_data_flags")
        args.data_words = data_words
        args.command = shlex.join(["python", "job.py", *words])
        complete(args)
    except Exception as error:  # one of ours, or one that a faulty data.py raised
        parser.error(str(error) if isinstance(error, ValueError) else describe(error))
    return args


def complete(args: argparse.Namespace) -> None:
    """Check what flags mean together, and add what follows from them. Raises ValueError on a mistake."""
    args.sites = args.sites or [f"site-{i + 1}" for i in range(args.n_clients or 2)]
    args.n_clients = len(args.sites)
    args.export = "--export" in sys.orig_argv  # NVFlare 2.9.0 takes it out of sys.argv, and obeys it in execute
    args.evaluates = types.evaluates(args.train_script)
    args.startup_kit = args.startup_kit and args.startup_kit.expanduser().absolute()
    args.run_folder = args.workspace / JOB_NAME
    for mistaken, message in mistakes(args):
        if mistaken:
            raise ValueError(message)
    script_flags(args, {})  # for its error
    for name in LIMITED:
        setattr(args, name, getattr(args, name) or args.n_clients)
    if len(args.gpu) > 1:
        args.num_threads = len(args.gpu)  # NVFlare 2.9.0 trains one site on each group of GPUs at a time
    moment = args.run_folder.lstat().st_mtime if args.run_folder.exists() else time.time()
    args.earlier_run = args.workspace / time.strftime(f"{JOB_NAME}-%Y-%m-%d-%H%M%S", time.localtime(moment))
    if args.initial_ckpt:
        if args.run_folder in args.initial_ckpt.parents and not args.export:  # run.begin will have renamed it
            args.initial_ckpt = args.earlier_run / args.initial_ckpt.relative_to(args.run_folder)
        # NVFlare 2.9.0 sends a checkpoint along only if its path is relative. A run works in HERE.
        args.initial_ckpt = os.path.relpath(args.initial_ckpt, os.getcwd() if args.export else HERE)


def mistakes(args: argparse.Namespace) -> list[tuple[object, str]]:
    """Return, for each mistake that flags allow, whether it was made, and its message."""
    run_folder, n_clients = args.run_folder, args.n_clients
    simulated = args.env == "sim" and not args.export
    on_sites = args.env == "prod" or args.export
    spare = n_clients - (args.min_sites or n_clients)  # how many sites the job may lose
    too_many = [name for name in LIMITED if (getattr(args, name) or 0) > n_clients]
    export_dir = any(word.startswith("--export-dir") for word in sys.orig_argv)
    places = [sys.executable, tempfile.gettempdir(), str(args.workspace)]
    unfit = [place for place in places if re.search(r"""[\s'"#\\]""", place)]  # NVFlare 2.9.0 splits them as a shell
    kit = args.startup_kit and args.startup_kit / "startup" / "fed_admin.json"
    foreign = os.path.lexists(run_folder) and not (run_folder / "server").is_dir()
    return [
        (foreign and not args.export, f"{run_folder} is no earlier run: move it, or choose another --workspace"),
        (export_dir and not args.export, "--export-dir is where --export writes to: give both"),
        (args.first_round > 1 and not args.initial_ckpt, "--first_round needs a model to go on from: --initial_ckpt"),
        (len(set(args.sites)) < n_clients, "--sites has a name twice"),
        (too_many, f"--{' and --'.join(too_many)} can't be more than the {n_clients} sites"),
        ((args.num_threads or args.gpu) and not simulated, "--num_threads and --gpu are for a run with --env sim"),
        (len(args.gpu) > 1 and args.num_threads, "--gpu with several groups trains a site on each: no --num_threads"),
        (len(args.gpu) > n_clients, f"--gpu {','.join(args.gpu)} has more groups than there are sites"),
        (args.enable_log_streaming and not on_sites, "--enable_log_streaming is for --env prod and --export"),
        (args.export and args.env != "sim", f"--export and --env {args.env} are two ways to use a job: choose one"),
        ((args.env == "prod") != (args.startup_kit is not None), "--env prod and --startup_kit go together"),
        (simulated and spare, "--min_sites is for --env poc or prod: a simulation ends when it loses a site"),
        # Each round needs a site that can't be among the lost ones.
        ((args.clients_per_round or n_clients) <= spare, "a round could draw lost sites alone: see --min_sites"),
        (args.cross_site_eval and not args.evaluates, "--cross_site_eval needs a script that calls is_evaluate"),
        (unfit and not on_sites, f"NVFlare can't take blanks, quotes, # or \\ in {' and '.join(unfit)}"),
        (kit and not kit.is_file(), f"{args.startup_kit} is not an admin's startup kit: no startup/fed_admin.json"),
    ]


def script_flags(args: argparse.Namespace, data: dict) -> str:
    """Return a client script's flags: --sites, --epochs and so on, data.py's as they were typed, and --train_args.

    The "flags" that prepare_data returned in `data` come after the typed ones: of two, the last wins.
    Raises ValueError if NVFlare would replace a part of a value.
    """
    of_training = [f"--{name}={getattr(args, name)}" for name in TRAIN_FLAGS]
    settled = [f"--{name}={value}" for name, value in data.get("flags", {}).items()]
    words = ["--sites", *args.sites, *of_training, *args.data_words, *settled, *args.train_args]
    if re.search("[{}]", str(words).replace("{site}", "")):
        raise ValueError("a script's flags can't hold braces, but for {site}")  # NVFlare 2.9.0 replaces {name} in them
    return shlex.join(words)
