"""Federated averaging of SimpleNetwork: the recipe, where it runs, and what came of it."""

import argparse
import copy
import json
import os
import re
import shlex
import sys
import tempfile
import warnings
from pathlib import Path

import guard

guard.exit_on_signals()  # before the slow imports
ARGV = sys.argv[1:]  # NVFlare takes --export and --export-dir out of sys.argv when it is imported, and warns of it
guard.refuse_second_run(ARGV)
warnings.filterwarnings("ignore", message="NVFlare reserves '--export'")

import torch
from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.fuel.utils.log_utils import concise_log_dict
from nvflare.recipe import SimEnv, add_experiment_tracking
from nvflare.recipe.spec import DEFAULT_EXPORT_DIR
from nvflare.recipe.utils import add_cross_site_evaluation, add_final_global_evaluation, set_per_site_config

import summary
from data import DATA_ROOT, DECODED_FILE, SPLITS, DataError, choose_dataset, expand_variables
from deploy import deploy, user_of
from model import SimpleNetwork

HERE = Path(__file__).resolve().parent


def main():
    args = parse_args(ARGV)
    run_folder = args.workspace / guard.JOB_NAME
    try:
        if args.export:
            make_recipe(args, "cifar10" if args.dataset == "auto" else args.dataset).export(str(args.export_dir))
            print(f"The job is in {args.export_dir / guard.JOB_NAME}")
        else:
            if args.env == "prod":
                user_of(args.startup_kit)
            with guard.only_run(run_folder):
                run(args, run_folder)
    except (guard.Busy, DataError, OSError) as error:
        sys.exit(f"job.py: error: {guard.one_line(error)}")


def run(args: argparse.Namespace, run_folder: Path) -> None:
    """Run a federation and sum it up."""
    if args.env == "prod":
        dataset = "cifar10" if args.dataset == "auto" else args.dataset
    else:
        dataset = choose_dataset(args.dataset, str(args.data_root))
    data = summary.describe_data(args, dataset)
    args.initial_ckpt = guard.keep_earlier_results(run_folder, args.initial_ckpt)
    print(f"Training on {dataset}.")
    summary.print_class_counts(args, data)

    recipe = make_recipe(args, dataset)
    # Left alone, each client process takes all cores, and the clients spin against each other.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // args.num_threads)))
    try:
        results = simulate(args, recipe, run_folder) if args.env == "sim" else deploy(args, recipe, run_folder)
        summary.check_complete(args, results, evaluates(args.train_script))
    except RuntimeError as error:
        sys.exit(f"job.py: error: {guard.reason_of_failure(run_folder, error)}")
    summary.add_final_points(results, args.num_rounds)
    report = summary.summarize(args, data, results)
    summary.print_summary(report)
    if args.json:
        guard.write_whole(args.json, json.dumps(report, indent=2) + "\n")


def simulate(args: argparse.Namespace, recipe: FedAvgRecipe, run_folder: Path) -> Path:
    """Run a job in NVFlare's simulator; return the folder of its results."""
    print(f"NVFlare's logs: {run_folder}/*/log.txt", flush=True)
    os.environ.pop("NVFLARE_SIMULATOR_WORKSPACE_ROOT", None)  # would override --workspace
    env = SimEnv(
        clients=args.sites,
        num_threads=args.num_threads,
        gpu_config=args.gpu,
        log_config=quiet_console(run_folder),
        workspace_root=str(args.workspace),
    )
    recipe.execute(env)
    return run_folder / "server" / "simulate_job"


def make_recipe(args: argparse.Namespace, dataset: str) -> FedAvgRecipe:
    """FedAvg (McMahan et al. 2017, arXiv:1602.05629) of SimpleNetwork with the client script on every site."""
    script = args.train_script
    client_flags = {
        "epochs": args.epochs,
        "batch_size": args.batch_size,
        "lr": args.lr,
        "dataset": dataset,
        "data_root": args.data_root,
        "train_size": args.train_size,
        "test_size": args.test_size,
        "seed": args.seed,
    }
    recipe = FedAvgRecipe(
        name=guard.JOB_NAME,
        model=SimpleNetwork(args.seed),
        initial_ckpt=args.initial_ckpt and os.path.relpath(args.initial_ckpt),  # relative: it goes into the job
        min_clients=args.n_clients,
        num_rounds=args.num_rounds,
        train_script=str(script),
        train_args=command_line(client_flags),
        # A client that dies in a process of its own ends the job; in NVFlare 2.9.0's own process it hangs it.
        launch_external_process=True,
        command="python3 -u" if args.export or args.env == "prod" else f"{shlex.quote(sys.executable)} -u",
        key_metric="accuracy" if evaluates(script) else "",  # the server keeps the best global model by it
    )
    if args.split != "same":
        client_flags |= {"split": args.split, "alpha": args.alpha, "num_shards": args.n_clients}
        shards = {site: command_line(client_flags | {"shard": i}) for i, site in enumerate(args.sites, start=1)}
        set_per_site_config(recipe, {site: {"train_args": flags} for site, flags in shards.items()})
    # NVFlare 2.9.0 starts custom/<script's name>, but copies a script to its path below an entry of sys.path.
    sys.path.insert(0, str(script.parent))
    for module in ("data.py", "model.py"):
        if not (script.parent / module).exists():
            recipe.add_client_file(str(HERE / module))
    add_experiment_tracking(recipe, "tensorboard")
    if args.cross_site_eval:
        add_cross_site_evaluation(recipe)
    elif evaluates(script):
        add_final_global_evaluation(recipe)
    if args.env == "sim" and not args.export:
        recipe.add_server_config({"server": {"task_request_interval": 0.2}})  # clients ask each 0.2 s, not 2 s
    return recipe


def command_line(flags: dict[str, object]) -> str:
    return " ".join(f"--{name} {shlex.quote(str(value))}" for name, value in flags.items() if value is not None)


def evaluates(script: Path) -> bool:
    """Tell whether a client script answers the server's validate tasks: whether it calls is_evaluate."""
    return re.search(rb"\bis_evaluate\(", script.read_bytes()) is not None


def quiet_console(run_folder: Path) -> str:
    """Make NVFlare show only the rounds and what clients print; its log files keep everything."""
    config = copy.deepcopy(concise_log_dict)
    config["filters"]["ConciseFilter"] = {
        "()": "nvflare.fuel.utils.log_utils.LoggerNameFilter",
        "logger_names": ["FedAvg", "CrossSiteModelEval", "ExternalProcessBackend"],
        "allow_all_error_logs": False,
    }
    file = run_folder / "local" / "log_config.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(config, indent=2))
    return str(file)


# ---- The command line ----


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Parse and check the command line; on a mistake say in one line what is wrong, and exit with 2."""
    many = guard.number(int, 1, 1_000_000)
    parser = guard.OneLineParser(prog="job.py", description="Federated averaging of SimpleNetwork.", allow_abbrev=False)

    def flag(name, metavar, type, default, help):
        default_note = "" if default is None else " (default: %(default)s)"
        parser.add_argument(name, metavar=metavar, type=type, default=default, help=help + default_note)

    def checked(name, type, text):
        try:
            return type(text)
        except (argparse.ArgumentTypeError, DataError) as error:
            parser.error(f"{name}: {error}")

    flag("--n_clients", "N", guard.number(int, 1, 100), 2, "clients site-1 ... site-N")
    flag("--num_rounds", "N", many, 2, "federated rounds")
    flag("--num_threads", "N", many, None, "clients that train at the same time (default: all)")
    parser.add_argument(
        "--train_script",
        metavar="F",
        type=guard.client_script,
        default=str(HERE / "client.py"),
        help="client script; client_with_eval.py adds evaluation (default: client.py beside job.py)",
    )
    parser.add_argument(
        "--cross_site_eval",
        action="store_true",
        help="evaluate every site's model on every site's data after training; needs a script that evaluates",
    )
    flag("--epochs", "N", many, 2, "local epochs a round")
    flag("--batch_size", "N", many, 16, "images a step")
    flag("--lr", "X", guard.number(float, 1e-9, 100), 0.01, "learning rate of SGD")
    parser.add_argument(
        "--dataset",
        choices=["auto", "cifar10", "synthetic"],
        default="auto",
        help="auto is cifar10 if it can be had, otherwise synthetic images (default: %(default)s)",
    )
    flag("--data_root", "DIR", str, DATA_ROOT, "where CIFAR-10 lies or is downloaded to")
    flag("--train_size", "N", guard.number(int, 1, 50_000), None, "use only so many training images (default: all)")
    flag("--test_size", "N", guard.number(int, 1, 10_000), None, "use only so many test images (default: all)")
    parser.add_argument(
        "--split",
        choices=SPLITS,
        default="same",
        help="each site's training images: all of them, or a share of its own, at random or of skewed classes "
        "(default: %(default)s)",
    )
    flag("--alpha", "X", guard.number(float, 1e-6, 1e6), None, "skew of dirichlet, small is strong (default: 0.5)")
    flag("--seed", "N", guard.number(int, 0, 2**32 - 1), 0, "initial weights, shuffling, synthetic data, split")
    flag("--initial_ckpt", "FILE", guard.checkpoint, None, "start from saved weights")
    flag("--gpu", "SPEC", guard.gpu_groups, None, "GPUs that the clients use, such as 0 or 0,1 (default: the first)")
    parser.add_argument(
        "--env",
        choices=["sim", "poc", "prod"],
        default="sim",
        help="simulator; server and clients of their own on this machine; or a provisioned federation "
        "(default: %(default)s)",
    )
    flag("--startup_kit", "DIR", Path, None, "your admin startup kit for --env prod")
    flag("--workspace", "DIR", guard.workspace_folder, guard.WORKSPACE, "where the results are kept")
    flag("--json", "FILE", guard.json_file, None, "write all that the summary says as a JSON document, too")
    parser.add_argument("--export", action="store_true", help="write the job folder instead of running it")
    flag("--export-dir", "DIR", guard.export_folder, None, "where --export writes it (default: ./fl_job)")
    args = parser.parse_args(argv)

    run_folder = args.workspace / guard.JOB_NAME
    for name in ("num_threads", "gpu"):
        if vars(args)[name] and args.env != "sim":
            parser.error(f"--{name} is for --env sim")
    if args.export and (misplaced := [name for name in ("gpu", "json", "num_threads") if vars(args)[name]]):
        parser.error(f"--{misplaced[0]} is for a run, and says nothing to --export")
    if args.export and args.env != "sim":
        parser.error(f"--export and --env {args.env} are two ways to use a job: choose one")
    if (args.env == "prod") != (args.startup_kit is not None):
        parser.error("--env prod and --startup_kit go together")
    if args.env == "prod" or args.export:  # a path on the sites
        if not re.match(r"[/~$]", args.data_root):
            parser.error(
                f"--data_root {args.data_root!r} is on the sites: it begins with / or ~ or a $VARIABLE of theirs"
            )
    else:
        args.data_root = checked("argument --data_root", data_folder, args.data_root)
    args.sites = [f"site-{i + 1}" for i in range(args.n_clients)]
    args.num_threads = args.num_threads or args.n_clients
    if args.num_threads > args.n_clients:
        parser.error(f"--num_threads {args.num_threads} is more than --n_clients {args.n_clients}")
    if args.alpha and args.split != "dirichlet":
        parser.error("--alpha needs --split dirichlet")
    if args.split == "dirichlet":
        args.alpha = args.alpha or 0.5
    if args.split != "same" and args.train_size and args.train_size < args.n_clients:
        parser.error(f"--split {args.split} needs an image a site: --train_size {args.train_size} is too few")
    if args.gpu and len(re.findall(guard.GPU_GROUP, args.gpu)) > args.n_clients:
        parser.error(f"--gpu {args.gpu} has more groups than --n_clients {args.n_clients}")
    if args.cross_site_eval and not evaluates(args.train_script):
        parser.error("--cross_site_eval needs a script that evaluates, such as client_with_eval.py")
    if run_folder in (*args.train_script.parents, Path(args.data_root), *Path(args.data_root).parents):
        parser.error(f"--train_script and --data_root can't be in {run_folder}, which makes room for the new run")
    if args.json and run_folder in (args.json, *args.json.parents):
        parser.error(f"--json can't be in {run_folder}, which makes room for the new run")
    if args.json in (run_folder.with_suffix(".lock"), *run_folder.parents):
        parser.error(f"--json can't be {args.json}, which is job.py's own")
    if args.export_dir and not args.export:
        parser.error("--export-dir needs --export")
    if args.export and not args.export_dir:
        args.export_dir = checked("--export", guard.export_folder, DEFAULT_EXPORT_DIR)
    for path in (sys.executable, tempfile.gettempdir()):
        if not args.export and not guard.plain(path):
            parser.error(f"NVFlare's simulator can't take blanks, quotes, # or \\ in {path!r}, which it needs")
    return args


def data_folder(text: str) -> Path:
    """Check that CIFAR-10 is ready in a folder, or can be put there."""
    text = expand_variables(text)
    return Path(text).resolve() if os.path.isfile(os.path.join(text, DECODED_FILE)) else guard.writable_folder(text)


if __name__ == "__main__":
    try:
        main()
    except SystemExit as end:
        if not isinstance(end.code, int):
            raise
        # NVFlare 2.9.0's threads for a connection that a signal interrupted would keep this process alive.
        sys.stdout.flush()
        os._exit(end.code)
