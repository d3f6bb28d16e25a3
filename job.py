"""Federated averaging of SimpleNetwork: the recipe, where it runs, and what came of it."""

import argparse
import copy
import json
import os
import re
import shlex
import statistics
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
from nvflare.recipe.utils import add_cross_site_evaluation, add_final_global_evaluation
from torch.utils.tensorboard import SummaryWriter

from data import DATA_ROOT, DECODED_FILE, SIZES, DataError, choose_dataset
from model import SimpleNetwork

HERE = Path(__file__).resolve().parent
FINAL_MODEL, BEST_MODEL = "FL_global_model.pt", "best_FL_global_model.pt"  # NVFlare's names
FORMATS = {"train_loss": "{:.4f}", "accuracy": "{:.2f} %"}  # of the metrics in the tables


def main():
    args = parse_args(ARGV)
    run_folder = args.workspace / guard.JOB_NAME
    try:
        if args.export:
            make_recipe(args, "cifar10" if args.dataset == "auto" else args.dataset).export(str(args.export_dir))
            print(f"The job is in {args.export_dir / guard.JOB_NAME}")
        else:
            with guard.only_run(run_folder):
                simulate(args, run_folder)
    except (guard.Busy, DataError, OSError) as error:
        sys.exit(f"job.py: error: {guard.one_line(error)}")


def simulate(args: argparse.Namespace, run_folder: Path) -> None:
    """Run a federation on this machine and sum it up."""
    dataset = choose_dataset(args.dataset, str(args.data_root))
    kept = guard.keep_earlier_results(run_folder)
    if args.initial_ckpt and run_folder in args.initial_ckpt.parents:
        args.initial_ckpt = kept / args.initial_ckpt.relative_to(run_folder)
    print(f"Training on {dataset}. NVFlare's logs: {run_folder}/*/log.txt", flush=True)

    recipe = make_recipe(args, dataset)
    os.environ.pop("NVFLARE_SIMULATOR_WORKSPACE_ROOT", None)  # would override --workspace
    # Left alone, each client process takes all cores, and the clients spin against each other.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // args.num_threads)))
    env = SimEnv(
        num_clients=args.n_clients,
        num_threads=args.num_threads,
        gpu_config=args.gpu,
        log_config=quiet_console(run_folder),
        workspace_root=str(args.workspace),
    )
    results = run_folder / "server" / "simulate_job"
    try:
        recipe.execute(env)
        check_complete(args, results)
    except RuntimeError as error:
        sys.exit(f"job.py: error: {guard.reason_of_failure(run_folder, error)}")
    add_final_points(args, results)
    print_summary(args, dataset, results)


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
        train_args=" ".join(f"--{name} {shlex.quote(str(v))}" for name, v in client_flags.items() if v is not None),
        # A client that dies in a process of its own ends the job; in NVFlare 2.9.0's own process it hangs it.
        launch_external_process=True,
        command="python3 -u" if args.export else f"{shlex.quote(sys.executable)} -u",
        key_metric="accuracy" if evaluates(script) else "",  # the server keeps the best global model by it
    )
    # NVFlare 2.9.0 starts custom/<script's name>, but copies a script to its path below an entry of sys.path.
    sys.path.insert(0, str(script.parent))
    if not (script.parent / "data.py").exists():
        recipe.add_client_file(str(HERE / "data.py"))
    add_experiment_tracking(recipe, "tensorboard")
    if args.cross_site_eval:
        add_cross_site_evaluation(recipe)
    elif evaluates(script):
        add_final_global_evaluation(recipe)
    if not args.export:
        recipe.add_server_config({"server": {"task_request_interval": 0.2}})  # clients ask each 0.2 s, not 2 s
    return recipe


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


# ---- What came of it ----


def check_complete(args: argparse.Namespace, results: Path) -> None:
    """Raise RuntimeError if a round or the final evaluation is missing, of which NVFlare 2.9.0 may say nothing."""
    file = results / "app_server" / FINAL_MODEL
    rounds = torch.load(file, weights_only=True)["meta_props"]["current_round"] + 1 if file.exists() else 0
    if rounds < args.num_rounds:
        raise RuntimeError(f"{rounds} of {args.num_rounds} rounds were completed")
    if evaluates(args.train_script):
        _, models = read_results(results)
        expected = [FINAL_MODEL] + [f"site-{i + 1}" for i in range(args.n_clients) if args.cross_site_eval]
        for model in expected:
            if (sites := len(models.get(model, {}))) < args.n_clients:
                raise RuntimeError(f"the model {model} was evaluated on {sites} of {args.n_clients} sites")


def add_final_points(args: argparse.Namespace, results: Path) -> None:
    """Add the final model's metrics to TensorBoard: NVFlare 2.9.0 tells no client which model it validates."""
    _, models = read_results(results)
    for site, metrics in models.get(FINAL_MODEL, {}).items():
        with SummaryWriter(results / "tb_events" / site) as writer:
            for name, value in metrics.items():
                writer.add_scalar(name, value, global_step=args.num_rounds)


def print_summary(args: argparse.Namespace, dataset: str, results: Path) -> None:
    """Print the data, the metrics of all rounds and sites, and where the models and the curves are."""
    rounds, models = read_results(results)
    sites = [f"site-{i + 1}" for i in range(args.n_clients)]
    train_size, test_size = args.train_size or SIZES[dataset][0], args.test_size or SIZES[dataset][1]
    print(f"\nDone: {args.num_rounds} rounds on {args.n_clients} sites.")
    print(f"Data: {dataset}, {train_size} training images a site, {test_size} test images.")
    if args.dataset == "auto" and dataset == "synthetic":
        print("      WARNING: SYNTHETIC images, since CIFAR-10 can't be had; the reason stands above.")

    final = {"final": models[FINAL_MODEL]} if FINAL_MODEL in models else {}
    evaluated = any("accuracy" in metrics for by_site in rounds for metrics in by_site.values())
    what = ", and accuracy of the global model at the start of the round" if evaluated else ""
    print(f"\nMean training loss{what}:")
    print_table({f"round {i}": metrics for i, metrics in enumerate(rounds)} | final, sites)
    if args.cross_site_eval:
        print("\nAccuracy of each model (row) on each site's test images (column):")
        print_table({name: models[name] for name in (FINAL_MODEL, BEST_MODEL, *sites) if name in models}, sites)

    print("\nGlobal models:")
    accuracy = {}
    for file in (FINAL_MODEL, BEST_MODEL):
        if (results / "app_server" / file).exists():
            print(f"  {results / 'app_server' / file}")
        if on_sites := [metrics["accuracy"] for metrics in models.get(file, {}).values() if "accuracy" in metrics]:
            accuracy[file] = statistics.mean(on_sites)
    if accuracy:
        best = max(accuracy, key=accuracy.get)
        print(f"The best is {best}: {accuracy[best]:.2f} % on average over the sites.")

    print(f"\nTensorBoard:\n  tensorboard --logdir {shlex.quote(str(results / 'tb_events'))}")


def read_results(results: Path) -> tuple[list[dict], dict[str, dict]]:
    """Read the metrics {site: {name: value}} of each round, and of each model that was evaluated at the end."""
    rounds, models = [], {}
    round_metrics = results / "metrics" / "round_metrics.jsonl"  # missing if the clients report no metrics
    for line in round_metrics.read_text().splitlines() if round_metrics.exists() else []:
        sites = json.loads(line)["sites"]
        rounds.append({site["name"]: {m["name"]: m["value"] for m in site["metrics"]} for site in sites})
    validation = json.loads((results / "cross_site_val" / "cross_val_results.json").read_text())
    for site, metrics_by_model in validation.items():
        for model, metrics in metrics_by_model.items():
            models.setdefault(model.removeprefix("SRV_"), {})[site] = metrics  # SRV_: a model of the server's
    return rounds, models


def print_table(rows: dict[str, dict], sites: list[str]) -> None:
    """Print the training loss and the accuracy of each row on each site, six sites side by side."""
    for first in range(0, len(sites), 6):
        block = sites[first : first + 6]
        print(" " * 25 + "".join(f"{site:>18}" for site in block))
        for name, metrics in rows.items():
            print(f"  {name:<23}" + "".join(f"{show(metrics.get(site, {})):>18}" for site in block))


def show(metrics: dict) -> str:
    parts = [form.format(metrics[name]) for name, form in FORMATS.items() if name in metrics]
    return "  ".join(parts) or "-"


# ---- The command line ----


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Parse and check the command line; on a mistake say in one line what is wrong, and exit with 2."""
    many = guard.number(int, 1, 1_000_000)
    parser = guard.OneLineParser(prog="job.py", description="Federated averaging of SimpleNetwork.", allow_abbrev=False)

    def flag(name, metavar, type, default, help):
        default_note = "" if default is None else " (default: %(default)s)"
        parser.add_argument(name, metavar=metavar, type=type, default=default, help=help + default_note)

    flag("--n_clients", "N", guard.number(int, 1, 100), 2, "clients site-1 ... site-N")
    flag("--num_rounds", "N", many, 2, "federated rounds")
    flag("--num_threads", "N", many, None, "clients that train at the same time (default: all)")
    flag("--train_script", "F", guard.client_script, "client.py", "client script; client_with_eval.py adds evaluation")
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
    flag("--data_root", "DIR", data_folder, DATA_ROOT, "where CIFAR-10 lies or is downloaded to")
    flag("--train_size", "N", guard.number(int, 1, 50_000), None, "use only so many training images (default: all)")
    flag("--test_size", "N", guard.number(int, 1, 10_000), None, "use only so many test images (default: all)")
    flag("--seed", "N", guard.number(int, 0, 2**32 - 1), 0, "initial weights, shuffling, synthetic data")
    flag("--initial_ckpt", "FILE", guard.checkpoint, None, "start from saved weights")
    flag("--gpu", "SPEC", guard.gpu_groups, None, "GPUs that the clients use, such as 0 or 0,1 (default: the first)")
    flag("--workspace", "DIR", guard.workspace_folder, guard.WORKSPACE, "where a simulation keeps its results")
    parser.add_argument("--export", action="store_true", help="write the job folder instead of running it")
    flag("--export-dir", "DIR", guard.export_folder, None, "where --export writes it (default: ./fl_job)")
    args = parser.parse_args(argv)

    run_folder = args.workspace / guard.JOB_NAME
    args.num_threads = args.num_threads or args.n_clients
    if args.num_threads > args.n_clients:
        parser.error(f"--num_threads {args.num_threads} is more than --n_clients {args.n_clients}")
    if args.gpu and len(re.findall(r"\[.*?\]|\d+", args.gpu)) > args.n_clients:
        parser.error(f"--gpu {args.gpu} has more groups than --n_clients {args.n_clients}")
    if args.cross_site_eval and not evaluates(args.train_script):
        parser.error("--cross_site_eval needs a script that evaluates, such as client_with_eval.py")
    if run_folder in (*args.train_script.parents, args.data_root, *args.data_root.parents):
        parser.error(f"--train_script and --data_root can't be in {run_folder}, which makes room for the new run")
    if args.export_dir and not args.export:
        parser.error("--export-dir needs --export")
    if args.export and not args.export_dir:
        try:
            args.export_dir = guard.export_folder(DEFAULT_EXPORT_DIR)
        except argparse.ArgumentTypeError as error:
            parser.error(f"--export: {error}")
    for path in (sys.executable, tempfile.gettempdir()):
        if not args.export and not guard.plain(path):
            parser.error(f"NVFlare's simulator can't take blanks, quotes, # or \\ in {path!r}, which it needs")
    return args


def data_folder(text: str) -> Path:
    """Check that CIFAR-10 is ready in a folder, or can be put there."""
    return Path(text).resolve() if os.path.isfile(os.path.join(text, DECODED_FILE)) else guard.writable_folder(text)


if __name__ == "__main__":
    main()
