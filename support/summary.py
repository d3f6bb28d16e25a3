"""What is shown of a run? The table at its start, the summary at its end, and summary.json."""

import argparse
import json
import shlex
import sys

import torch
from torch.utils.data import Dataset, Subset
from torch.utils.tensorboard import SummaryWriter

from data import load_data
from support.results import BEST_MODEL, FINAL_MODEL
from support.tables import MOST_COLUMNS, print_table, show
from support.text import HERE, describe

MOST_CLASSES = 10_000  # with a larger label, nothing is counted
MOST_ROWS = 7  # of a table of rounds


def show_data(args: argparse.Namespace, data: dict) -> dict:
    """Print and return what the sites train on: the data's name, and how many samples of each class each site has.

    In prod, only the sites know the latter.

    Args:
        data: what prepare_data of data.py returns.
    """
    shown = {"name": data["name"], "warning": data.get("warning", ""), "sites": {}}
    if shown["warning"]:
        print(f"\n{'!' * 100}\nWARNING: {shown['warning']}\n{'!' * 100}\n", file=sys.stderr)
    print(f"Training on {data['name']}.", flush=True)
    if args.env != "prod":
        settled = argparse.Namespace(**{**vars(args), **data.get("flags", {})})
        shown["sites"] = {site: describe_site(settled, site) for site in args.sites}
        print_samples(shown["sites"])
    return shown


def describe_site(args: argparse.Namespace, site: str) -> dict:
    """Return how many samples a site trains and tests on, and how many of each class it trains on."""
    try:
        train_set, test_set = load_data(args, site)
        sizes = {"train_size": len(train_set), "test_size": len(test_set)}
    except Exception as error:  # of a data.py of the user's, say
        raise OSError(f"load_data for {site}: {describe(error)}") from error
    if 0 in sizes.values():
        raise OSError(f"{site} has no samples to {'train' if not sizes['train_size'] else 'test'} on")
    return {**sizes, "class_counts": class_counts(train_set)}


def print_samples(sites: dict[str, dict]) -> None:
    fits = all(len(samples["class_counts"]) <= MOST_COLUMNS - 2 for samples in sites.values())  # in one block
    rows = {
        site: {"test": samples["test_size"], "train": samples["train_size"]} | (samples["class_counts"] if fits else {})
        for site, samples in sites.items()
    }
    first, *others = rows.values()
    if all(row == first for row in others):
        rows = {"each site": first}
    print()
    print_table("Samples", rows, list(dict.fromkeys(name for row in rows.values() for name in row)))
    print(flush=True)


def class_counts(dataset: Dataset) -> dict[str, int]:
    """Count a data set's samples of each class; return {} if the labels are no class numbers.

    Labels and their names are the data set's `targets` and `classes`, as torchvision calls them.
    """
    indices = range(len(dataset))
    while isinstance(dataset, Subset):
        indices = [dataset.indices[i] for i in indices]
        dataset = dataset.dataset
    try:
        labels = torch.as_tensor(dataset.targets)[list(indices)]
        names = getattr(dataset, "classes", [])
        counts = labels.bincount(minlength=len(names)).tolist() if labels.max() < MOST_CLASSES else []
        return {str(names[i]) if i < len(names) else str(i): count for i, count in enumerate(counts)}
    except Exception:  # no targets, or something else than class numbers
        return {}


def sum_up(args: argparse.Namespace, data: dict, results: dict) -> None:
    """Print a run's summary, add the final model's points to TensorBoard, and write summary.json.

    Args:
        data: what show_data returned.
        results: what read_results returned.
    """
    for site, metrics in results["models"].get(FINAL_MODEL, {}).items():
        # NVFlare 2.9.0 tells no client which model it validates, so no client can write this point.
        with SummaryWriter(f"{results['paths']['tensorboard']}/{site}") as writer:
            for name, value in metrics.items():
                writer.add_scalar(name, value, global_step=results["final_round"])
    command = f"tensorboard --logdir {shlex.quote(results['paths']['tensorboard'])}"
    report = {"settings": vars(args), "data": data, **results, "tensorboard_command": command}
    (args.run_folder / "summary.json").write_text(json.dumps(report, indent=2, default=str) + "\n")
    print_summary(report)


def print_summary(report: dict) -> None:
    """Print the data, the sites' metrics by round, and where the models and the curves are."""
    settings, models = report["settings"], report["models"]
    rows = {f"round {settings['first_round'] + i}": metrics for i, metrics in enumerate(report["rounds"])}
    if FINAL_MODEL in models:
        rows["final"] = models[FINAL_MODEL]
    reported = {site for row in (*rows.values(), *models.values()) for site in row}
    others = sorted(reported.difference(settings["sites"]))  # of a federation whose sites have names of their own
    sites = [site for site in settings["sites"] if site in reported] + others
    all_sites = max(len(reported), settings["n_clients"])  # some may never have been drawn, or were lost at once
    rounds = count(report["completed"], "round")
    if report["completed"] < settings["num_rounds"]:
        rounds += f" of {settings['num_rounds']} (stop_cond or patience was met)"
    print(f"\nDone: {rounds} on {count(all_sites, 'site')}.")
    print(f"Data: {report['data']['name']}.")
    if report["data"]["warning"]:
        print(f"      WARNING: {report['data']['warning'].partition('. ')[0]}; the reason stands above.")
    for site, events in report["lost_sites"].items():
        print(f"Lost: {site} {', '.join(f'{what} in {place}' for what, place, _ in events)}.")

    evaluated = " (they evaluate the global model before they train it)" if settings["evaluates"] else ""
    print(f"\nWhat the sites reported in each round{evaluated}:")
    print_metrics(rows, sites, MOST_ROWS)
    if settings["cross_site_eval"]:
        print(
            "\nEach model (row) on each site's test data (column); a site's model is its local one of its last round:"
        )
        print_metrics({name: models[name] for name in (FINAL_MODEL, BEST_MODEL, *sites) if name in models}, sites)

    print("\nGlobal models:")
    for file in report["paths"]["models"]:
        print(f"  {file}")
    name = report["key_metric"]["name"]
    if best := report["best_model"]:
        model = f"{best['name']}, after round {best['round']}"
        print(f"The best is {model}: {name} {show(best[name])} on average over the sites that reported it.")
    elif settings["evaluates"]:
        print(f"WARNING: no site reported {name} as a finite number, and so no model is called the best.")
    print(f"\nTensorBoard:\n  {report['tensorboard_command']}")
    if settings["train_script"] == HERE / "client.py" and not settings["initial_ckpt"]:  # which the next run may rename
        command = f"{settings['command']} --train_script client_with_eval.py"
        print(f"\nHow good is the model? Train again, and test it:\n  {command}")


def print_metrics(rows: dict[str, dict], sites: list[str], most_rows: int | None = None) -> None:
    """Print a table for each metric: {name of the row: {site: {metric: value}}}."""
    for metric in dict.fromkeys(name for row in rows.values() for metrics in row.values() for name in metrics):
        table = {name: {site: row[site][metric] for site in row if metric in row[site]} for name, row in rows.items()}
        print_table(metric, {name: cells for name, cells in table.items() if cells}, sites, most_rows)


def count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
