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
LIMITED = ["num_threads", "clients_per_round", "min_sites"]  # at most all sites, which is the default
COMPLETED = {"command", "export", "evaluates", "run_folder", "earlier_run"}  # in args, and so no flags of data.py


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def add_data_flags(self) -> None:
        """Add the flags of data.py, the last ones, so that what is wrong with them shows here."""
        try:
            add_data_flags(self)
        except Exception as error:  # a flag with the name of one of job.py's, say
            self.error(f"{describe(error)}: change add_data_flags")

    def parse_args(self, argv=None):
        words = sys.argv[1:] if argv is None else argv
        return super().parse_args(words, argparse.Namespace(command=shlex.join(["python", "job.py", *words])))

    def error(self, message):
        if message.startswith("unrecognized arguments"):
            message += " (those of a client script go into --train_args)"
        self.exit(2, f"{self.prog}: error: {one_line(message, most=1_000)}\n")


def complete(args: argparse.Namespace, parser: OneLineParser) -> argparse.Namespace:
    """Check what flags mean together, and add what follows from them; exit with 2 and one line on a mistake.

    Adds the sites' names and number, whether the script evaluates and the job is exported, the run's folder, and the
    name that an earlier run's folder will get.
    """
    try:
        if args.sites and args.n_clients not in (None, len(args.sites)):
            raise ValueError("--sites gives the number of sites: leave --n_clients out")
        args.sites = args.sites or [f"site-{i + 1}" for i in range(args.n_clients or 2)]
        args.n_clients = len(args.sites)
        args.export = "--export" in sys.orig_argv  # NVFlare 2.9.0 takes it out of sys.argv, and obeys it in execute
        args.evaluates = types.evaluates(args.train_script)
        args.startup_kit = args.startup_kit and args.startup_kit.absolute()
        args.run_folder = args.workspace / JOB_NAME
        for mistaken, message in mistakes(args):
            if mistaken:
                raise ValueError(message)
        script_flags(args, {})  # for its errors
        for name in LIMITED:
            setattr(args, name, getattr(args, name) or args.n_clients)
        if (groups := types.gpu_groups(args.gpu)) > 1:
            args.num_threads = groups  # NVFlare 2.9.0 trains one site on each group at a time
        moment = args.run_folder.lstat().st_mtime if args.run_folder.exists() else time.time()
        args.earlier_run = args.workspace / time.strftime(f"{JOB_NAME}-%Y-%m-%d-%H%M%S", time.localtime(moment))
        if args.initial_ckpt:
            if args.run_folder in args.initial_ckpt.parents and not args.export:  # the run will rename that folder
                args.initial_ckpt = args.earlier_run / args.initial_ckpt.relative_to(args.run_folder)
            # NVFlare 2.9.0 sends a checkpoint along if its path is relative, here to the folder that a run works in.
            args.initial_ckpt = os.path.relpath(args.initial_ckpt, os.getcwd() if args.export else HERE)
    except Exception as error:  # one of ours, or of a mistake in a data.py
        parser.error(str(error) if isinstance(error, ValueError) else describe(error))
    return args


def mistakes(args: argparse.Namespace) -> list[tuple[object, str]]:
    """Return the possible conflicts of flags: whether there is one, and what is said of it."""
    run_folder, n_clients = args.run_folder, args.n_clients
    simulated, on_sites = args.env == "sim" and not args.export, args.env == "prod" or args.export
    spare = n_clients - (args.min_sites or n_clients)  # how many sites the job may lose
    too_many = [name for name in LIMITED if (getattr(args, name) or 0) > n_clients]
    data_root = getattr(args, "data_root", None)  # data of your own may do without
    data_root = "/" if data_root is None else str(data_root)
    export_dir = any(word.startswith("--export-dir") for word in sys.orig_argv)
    places = [sys.executable, tempfile.gettempdir(), str(args.workspace)]
    unfit = [place for place in places if re.search(r"""[\s'"#\\]""", place)]  # which NVFlare 2.9.0 splits as a shell
    kit = args.startup_kit and args.startup_kit / "startup" / "fed_admin.json"
    foreign = os.path.lexists(run_folder) and not (run_folder / "server").is_dir()
    return [
        (foreign and not args.export, f"{run_folder} is no earlier run: move it, or choose another --workspace"),
        (export_dir and not args.export, "--export-dir is where --export writes to: give both"),
        (args.first_round > 1 and not args.initial_ckpt, "--first_round needs a model to go on from: --initial_ckpt"),
        (len(set(args.sites)) < n_clients, "--sites has a name twice"),
        (too_many, f"--{' and --'.join(too_many)} can't be more than the {n_clients} sites"),
        ((args.num_threads or args.gpu) and not simulated, "--num_threads and --gpu are for a run with --env sim"),
        (types.gpu_groups(args.gpu) > n_clients, f"--gpu {args.gpu} has more groups than there are sites"),
        (args.enable_log_streaming and not on_sites, "--enable_log_streaming is for --env prod and --export"),
        (args.export and args.env != "sim", f"--export and --env {args.env} are two ways to use a job: choose one"),
        ((args.env == "prod") != (args.startup_kit is not None), "--env prod and --startup_kit go together"),
        (simulated and spare, "--min_sites is for --env poc or prod: a simulation ends when it loses a site"),
        ((args.clients_per_round or n_clients) <= spare, "a round could draw only lost sites: see --min_sites"),
        (args.cross_site_eval and not args.evaluates, "--cross_site_eval needs a script that calls is_evaluate"),
        (on_sites and data_root[:1] not in ("/", "~", "$"), "--data_root is on the sites: begin it with /, ~ or $"),
        (unfit and not on_sites, f"NVFlare can't take blanks, quotes, # or \\ in {' and '.join(unfit)}"),
        (kit and not kit.is_file(), f"{args.startup_kit} is not an admin's startup kit: no startup/fed_admin.json"),
    ]


def script_flags(args: argparse.Namespace, data: dict) -> str:
    """Return the flags of a client script: --epochs and so on, --sites, those of data.py, and --train_args.

    Those of data.py are the words of the command line, and what prepare_data has settled.

    Args:
        data: what prepare_data returned, whose "flags" say what it has settled.

    Raises:
        ValueError: data.py has a flag that it can't have, or NVFlare would replace a part of a value.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_data_flags(parser)
    options = {}
    for action in parser._actions:  # argparse has no public list of them
        if action.dest in COMPLETED or not action.option_strings:
            raise ValueError(f"{action.dest} can't be a flag of data.py: rename it in add_data_flags, with -- in front")
        options[action.dest] = action.option_strings[0]
    words = []
    given = shlex.split(args.command)[2:]
    _, others = parser.parse_known_args(given)
    for word in given:  # parsed values would lose how they were given; others has job.py's words, in their order
        if others and word == others[0]:
            others.pop(0)
        else:
            words.append(word)
    for name, value in data.get("flags", {}).items():
        if name not in options or not isinstance(value, (str, int, float)) or isinstance(value, bool):
            raise ValueError(f"prepare_data can't settle {name}={value!r}: it is no flag with a text or number")
        words.append(f"{options[name]}={value}")
    if re.search("[{}]", f"{words}{args.train_args}".replace("{site}", "")):
        raise ValueError("a script's flags can't hold braces, but for {site}")  # NVFlare 2.9.0 replaces {name} in them
    train_flags = [f"--{name}={getattr(args, name)}" for name in TRAIN_FLAGS]
    return shlex.join([*train_flags, "--sites", *args.sites, *words, *args.train_args])
