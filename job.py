"""Federated averaging of SimpleNetwork: the recipe, where it runs, and what came of it."""

import argparse
import copy
import json
import os
import re
import shlex
import statistics
import sys
import warnings
from pathlib import Path

warnings.filterwarnings("ignore", message="NVFlare reserves '--export'")  # --help tells about them

import torch
from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.fuel.utils.log_utils import concise_log_dict
from nvflare.recipe import SimEnv, add_experiment_tracking
from nvflare.recipe.sim_env import WORKSPACE_ROOT
from nvflare.recipe.utils import add_cross_site_evaluation, add_final_global_evaluation
from torch.utils.tensorboard import SummaryWriter

from data import DATA_ROOT, DECODED_FILE, SIZES, DataError, choose_dataset
from model import SimpleNetwork

HERE = Path(__file__).resolve().parent
JOB_NAME = "hello-pt"
FINAL_MODEL, BEST_MODEL = "FL_global_model.pt", "best_FL_global_model.pt"  # NVFlare's names
FORMATS = {"train_loss": "{:.4f}", "accuracy": "{:.2f} %"}  # of the metrics in the tables
GPU_GROUP = r"(?:\d+|\[\d+(?:,\d+)*\])"
EXPORTING = "--export" in sys.orig_argv  # NVFlare takes the flag out of sys.argv when it is imported


def main():
    args = parse_args()
    run_folder = args.workspace / JOB_NAME
    if EXPORTING:
        dataset = "cifar10" if args.dataset == "auto" else args.dataset
    else:
        try:
            dataset = choose_dataset(args.dataset, args.data_root)
        except DataError as error:
            sys.exit(f"job.py: error: {error}")
        print(f"Training on {dataset}. NVFlare's logs: {run_folder}/*/log.txt", flush=True)

    recipe = make_recipe(args, dataset)
    env = SimEnv(
        num_clients=args.n_clients,
        num_threads=args.num_threads,
        gpu_config=args.gpu,
        log_config=None if EXPORTING else quiet_console(run_folder),
        workspace_root=str(args.workspace),
    )
    # Left alone, each client process takes all cores, and the clients spin against each other.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // args.num_threads)))
    try:
        recipe.execute(env)
    except RuntimeError as error:
        sys.exit(f"job.py: error: {reason_of_failure(run_folder) or error}")
    print_summary(args, dataset, run_folder / "server" / "simulate_job")


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
        name=JOB_NAME,
        model=SimpleNetwork(args.seed),
        initial_ckpt=args.initial_ckpt and os.path.relpath(args.initial_ckpt),  # relative: it goes into the job
        min_clients=args.n_clients,
        num_rounds=args.num_rounds,
        train_script=str(script),
        train_args=" ".join(f"--{name} {shlex.quote(str(v))}" for name, v in client_flags.items() if v is not None),
        # A client that dies in a process of its own ends the job; in NVFlare 2.9.0's own process it hangs it.
        launch_external_process=True,
        command="python3 -u" if EXPORTING else f"{shlex.quote(sys.executable)} -u",
        key_metric="accuracy" if evaluates(script) else "",  # the server keeps the best global model by it
    )
    # NVFlare 2.9.0 runs a script as custom/<name>, but copies it to its path below an entry of sys.path.
    sys.path.insert(0, str(script.parent))
    if not (script.parent / "data.py").exists():
        recipe.add_client_file(str(HERE / "data.py"))
    add_experiment_tracking(recipe, "tensorboard")
    if args.cross_site_eval:
        add_cross_site_evaluation(recipe)
    elif evaluates(script):
        add_final_global_evaluation(recipe)
    if not EXPORTING:
        recipe.add_server_config({"server": {"task_request_interval": 0.2}})  # seconds; a real federation keeps 2
    return recipe


def evaluates(script: Path) -> bool:
    """Tell whether a client script answers the server's validate tasks."""
    return "is_evaluate" in script.read_text()


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


def reason_of_failure(run_folder: Path) -> str | None:
    """Name the site that failed first, the exception and the log; None if no site logged an error."""
    logs = [log for log in run_folder.glob("*/error_log.txt") if log.stat().st_size]
    if not logs:
        return None
    first = min(logs, key=Path.read_text)  # every log begins with a time
    reason = first.read_text().splitlines()[0].rpartition(" - ")[2]
    log = first.with_name("log.txt")
    output = re.findall(r" - ExternalProcessBackend - INFO - (.*)", log.read_text())
    for i, line in enumerate(output):
        if line.startswith("Traceback"):  # the last one counts: it was raised while the others were handled
            reason = next((text for text in output[i + 1 :] if not text.startswith(" ")), reason)
    return f"{first.parent.name} failed: {reason} (see {log})"


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
    print("\nMean training loss" + (", and accuracy of the global model at the start of the round:" if final else ":"))
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

    for site, metrics in final.get("final", {}).items():
        with SummaryWriter(results / "tb_events" / site) as writer:
            for name, value in metrics.items():
                writer.add_scalar(name, value, global_step=args.num_rounds)
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


def number(kind, low, high):
    """Return an argparse type that takes a number of this kind from low to high."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high:  # so that nan fails, too
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return value

    parse.__name__ = kind.__name__
    return parse


def client_script(text: str) -> Path:
    """Find a client script as given, or beside job.py, and see that it compiles."""
    for path in (Path(text), HERE / text):
        if path.suffix == ".py" and path.is_file():
            try:
                compile(path.read_bytes(), path, "exec")
            except (SyntaxError, ValueError) as error:
                raise argparse.ArgumentTypeError(f"{path} is not valid Python: {error}") from error
            return path.resolve()
    raise argparse.ArgumentTypeError(f"there is no Python file {text!r}")


def checkpoint(text: str) -> Path:
    """Check that a file holds weights of SimpleNetwork; no code in it is run."""
    try:
        weights = torch.load(text, map_location="cpu", weights_only=True)
        SimpleNetwork().load_state_dict(weights.get("model", weights))
    except Exception as error:  # whatever a file may raise that isn't a checkpoint
        reason = str(error).partition("\n")[0]
        raise argparse.ArgumentTypeError(f"{text!r} holds no weights of SimpleNetwork: {reason}") from error
    return Path(text)


def writable_folder(text: str) -> Path:
    """Check that a folder can be written, or made where it is missing."""
    folder = Path(text).expanduser().absolute()
    existing = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not text or not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"can't write to {text!r}: choose another folder")
    return folder


def data_folder(text: str) -> Path:
    """Check that CIFAR-10 is ready in a folder, or can be put there."""
    return Path(text).absolute() if os.path.isfile(os.path.join(text, DECODED_FILE)) else writable_folder(text)


def workspace_folder(text: str) -> Path:
    """Check that a simulation can use a folder, and that nobody's files are lost by it."""
    folder = writable_folder(text)
    if len(str(folder).split()) > 1:  # NVFlare 2.9.0 splits its simulator's command line there
        raise argparse.ArgumentTypeError(f"NVFlare's simulator takes no white space in {str(folder)!r}")
    run = folder / JOB_NAME  # which NVFlare 2.9.0's simulator deletes when it starts
    if run.exists() and not (run / "server").is_dir() and any(path.name != "local" for path in run.iterdir()):
        raise argparse.ArgumentTypeError(f"{run} is not a simulation's folder and would be lost: move it")
    return folder


def gpu_groups(text: str) -> str:
    """Check SimEnv's GPU configuration: 0,1 is two groups of one GPU, [0,1] is one group of two."""
    if not re.fullmatch(f"{GPU_GROUP}(,{GPU_GROUP})*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list such as 0 or 0,1 or [0,1],[2,3]")
    return text


def parse_args() -> argparse.Namespace:
    """Parse and check the command line; on a mistake say in one line what is wrong, and exit with 2."""
    many = number(int, 1, 1_000_000)
    parser = argparse.ArgumentParser(
        prog="job.py",
        usage=argparse.SUPPRESS,  # so that an error is one line
        description="Train SimpleNetwork by federated averaging: python job.py [flags]",
        allow_abbrev=False,
    )

    def flag(name, metavar, type, default, help):
        default_note = "" if default is None else " (default: %(default)s)"
        parser.add_argument(name, metavar=metavar, type=type, default=default, help=help + default_note)

    flag("--n_clients", "N", number(int, 1, 100), 2, "clients site-1 ... site-N")
    flag("--num_rounds", "N", many, 2, "federated rounds")
    flag("--num_threads", "N", many, None, "clients that train at the same time (default: all)")
    flag("--train_script", "F", client_script, "client.py", "client script; client_with_eval.py adds evaluation")
    parser.add_argument(
        "--cross_site_eval",
        action="store_true",
        help="evaluate every site's model on every site's data after training; needs a script that evaluates",
    )
    flag("--epochs", "N", many, 2, "local epochs a round")
    flag("--batch_size", "N", many, 16, "images a step")
    flag("--lr", "X", number(float, 1e-9, 100), 0.01, "learning rate of SGD")
    parser.add_argument(
        "--dataset",
        choices=["auto", "cifar10", "synthetic"],
        default="auto",
        help="auto is cifar10 if it can be had, otherwise synthetic images (default: %(default)s)",
    )
    flag("--data_root", "DIR", data_folder, DATA_ROOT, "where CIFAR-10 lies or is downloaded to")
    flag("--train_size", "N", number(int, 1, 50_000), None, "use only so many training images (default: all)")
    flag("--test_size", "N", number(int, 1, 10_000), None, "use only so many test images (default: all)")
    flag("--seed", "N", number(int, 0, 2**32 - 1), 0, "initial weights, shuffling, synthetic data")
    flag("--initial_ckpt", "FILE", checkpoint, None, "start from saved weights")
    flag("--gpu", "SPEC", gpu_groups, None, "GPUs that the clients use, such as 0 or 0,1 (default: the first)")
    flag("--workspace", "DIR", workspace_folder, WORKSPACE_ROOT, "where a simulation keeps its results")
    parser.add_argument("--export", action="store_true", help="write the job folder instead of running it")
    parser.add_argument("--export-dir", metavar="DIR", help="where --export writes it (default: ./fl_job)")
    args = parser.parse_args()

    args.num_threads = args.num_threads or args.n_clients
    if args.num_threads > args.n_clients:
        parser.error(f"--num_threads {args.num_threads} is more than --n_clients {args.n_clients}")
    if args.gpu and len(re.findall(GPU_GROUP, args.gpu)) > args.n_clients:
        parser.error(f"--gpu {args.gpu} has more groups than --n_clients {args.n_clients}")
    if args.cross_site_eval and not evaluates(args.train_script):
        parser.error("--cross_site_eval needs a script that evaluates, such as client_with_eval.py")
    if not EXPORTING and any(argument.startswith("--export-dir") for argument in sys.orig_argv):
        parser.error("--export-dir needs --export")
    return args


if __name__ == "__main__":
    main()
