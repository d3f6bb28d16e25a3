"""What came of a run: read from the files that NVFlare leaves, printed for people, and as JSON for scripts."""

import argparse
import json
import math
import pickle
import shlex
import statistics
from pathlib import Path

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter

from data import CLASSES, load_data, partition

FINAL_MODEL, BEST_MODEL = "FL_global_model.pt", "best_FL_global_model.pt"  # NVFlare's names
FORMATS = {"train_loss": "{:.4f}", "accuracy": "{:.2f} %"}  # of the metrics in the tables


def describe_data(args: argparse.Namespace, dataset: str) -> dict:
    """Return what the sites train and test on. In a provisioned federation, only they know more."""
    if args.env == "prod":
        return {"dataset": dataset, "is_substitute": False}
    train_set, test_set = load_data(dataset, str(args.data_root), args.train_size, args.test_size, args.seed)
    labels = train_set.tensors[1].numpy()
    if args.split == "same":
        shards = [slice(None)] * args.n_clients
    else:
        shards = partition(labels, args.n_clients, args.split, args.alpha, args.seed)
    return {
        "dataset": dataset,
        "is_substitute": args.dataset == "auto" and dataset == "synthetic",
        "train_size": len(train_set),
        "test_size": len(test_set),
        "classes": CLASSES[dataset],
        "class_counts": {
            site: np.bincount(labels[shard], minlength=10).tolist() for site, shard in zip(args.sites, shards)
        },
    }


def check_complete(args: argparse.Namespace, results: Path, evaluates: bool) -> None:
    """Raise RuntimeError if a round or an evaluation is missing, of which NVFlare 2.9.0's simulator may say nothing."""
    file = results / "app_server" / FINAL_MODEL
    try:
        rounds = torch.load(file, weights_only=True)["meta_props"]["current_round"] + 1 if file.exists() else 0
    except pickle.UnpicklingError:
        raise RuntimeError(f"{FINAL_MODEL} holds more than weights, and was not loaded") from None
    if rounds < args.num_rounds:
        raise RuntimeError(f"{rounds} of {args.num_rounds} rounds were completed")
    if evaluates:
        models = read_evaluation(results)
        sites = args.sites if args.env != "prod" else {site for by_site in models.values() for site in by_site}
        for model in [FINAL_MODEL, *(sites if args.cross_site_eval else [])]:
            if (count := len(models.get(model, {}))) < args.n_clients:
                raise RuntimeError(f"the model {model} was evaluated on {count} of {args.n_clients} sites")


def add_final_points(results: Path, num_rounds: int) -> None:
    """Add the final model's metrics to TensorBoard: NVFlare 2.9.0 tells no client which model it validates."""
    for site, metrics in read_evaluation(results).get(FINAL_MODEL, {}).items():
        with SummaryWriter(results / "tb_events" / site) as writer:
            for name, value in metrics.items():
                writer.add_scalar(name, value, global_step=num_rounds)


def summarize(args: argparse.Namespace, data: dict, results: Path) -> dict:
    """Return everything there is to say of a run, as JSON has it: numbers that are not finite are None.

    Args:
        args: job.py's arguments.
        data: see describe_data.
        results: the folder app_server, tb_events and so on are in.
    """
    models = read_evaluation(results)
    accuracy = {
        file: statistics.mean(metrics["accuracy"] for metrics in models[file].values())
        for file in (FINAL_MODEL, BEST_MODEL)
        if file in models and all(math.isfinite(m.get("accuracy", math.nan)) for m in models[file].values())
    }
    best = max(accuracy, key=accuracy.get, default=None)
    weights = torch.load(results / "app_server" / FINAL_MODEL, weights_only=True)["model"]
    summary = {
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "data": data,
        "rounds": read_rounds(results),
        "models": models,
        "diverged": not all(torch.as_tensor(weight).isfinite().all() for weight in weights.values()),
        "best_model": best and {"name": best, "accuracy": accuracy[best]},
        "paths": {
            "models": [str(f) for name in (FINAL_MODEL, BEST_MODEL) if (f := results / "app_server" / name).exists()],
            "tensorboard": str(results / "tb_events"),
            "results": str(results),
        },
        "tensorboard_command": f"tensorboard --logdir {shlex.quote(str(results / 'tb_events'))}",
    }
    return json.loads(json.dumps(summary), parse_constant=lambda constant: None)


def print_summary(summary: dict) -> None:
    """Print the data, the metrics of all rounds and sites, and where the models and the curves are."""
    settings, data, models = summary["settings"], summary["data"], summary["models"]
    sites = {site for row in (*summary["rounds"], *models.values()) for site in row} or settings["sites"]
    sites = sorted(sites, key=lambda site: (len(site), site))
    print(f"\nDone: {settings['num_rounds']} rounds on {len(sites)} sites.")
    if settings["env"] == "prod":
        print(f"Data: {data['dataset']}, each site's own.")
    else:
        share = " a site" if settings["split"] == "same" else f" in all ({describe_split(settings)})"
        print(f"Data: {data['dataset']}, {data['train_size']} training images{share}, {data['test_size']} test images.")
    if data["is_substitute"]:
        print("      WARNING: SYNTHETIC images, since CIFAR-10 can't be had; the reason stands above.")

    rows = {f"round {i}": metrics for i, metrics in enumerate(summary["rounds"])}
    if FINAL_MODEL in models:
        rows["final"] = models[FINAL_MODEL]
    evaluated = any("accuracy" in metrics for by_site in rows.values() for metrics in by_site.values())
    what = ", and accuracy of the global model at the start of the round" if evaluated else ""
    print(f"\nMean training loss{what}:")
    print_table(sites, {name: {site: show(metrics) for site, metrics in row.items()} for name, row in rows.items()})
    if settings["cross_site_eval"]:
        print("\nAccuracy of each model (row) on each site's test images (column), * the best of the column:")
        print_table(
            sites, mark_best({name: models[name] for name in (FINAL_MODEL, BEST_MODEL, *sites) if name in models})
        )

    print("\nGlobal models:")
    for file in summary["paths"]["models"]:
        print(f"  {file}")
    if summary["diverged"]:
        print("WARNING: the final model's weights are not finite numbers: training diverged. Try a smaller --lr.")
    if best := summary["best_model"]:
        print(f"The best is {best['name']}: {best['accuracy']:.2f} % on average over the sites.")
    print(f"\nTensorBoard:\n  {summary['tensorboard_command']}")


def print_class_counts(args: argparse.Namespace, data: dict) -> None:
    """Print how many training images of each class each site has, as far as that is known here."""
    if "class_counts" not in data:
        return
    print(f"\n{'Training images':<17}{'all':>7}" + "".join(f"{name:>7}" for name in data["classes"]))
    rows = {"each site": data["class_counts"]["site-1"]} if args.split == "same" else data["class_counts"]
    for site, counts in rows.items():
        print(f"  {site:<15}" + "".join(f"{count:>7}" for count in (sum(counts), *counts)))
    print(flush=True)


def describe_split(settings: dict) -> str:
    return f"{settings['split']} split" + (f" of alpha {settings['alpha']:g}" if settings["alpha"] else "")


def read_rounds(results: Path) -> list[dict]:
    """Read the metrics {site: {name: value}} that the sites reported in each round."""
    file = results / "metrics" / "round_metrics.jsonl"  # missing if the clients report no metrics
    rounds = []
    for line in file.read_text().splitlines() if file.exists() else []:
        record = json.loads(line)
        rounds += [{}] * (record["round"] - len(rounds))  # NVFlare skips a round without metrics
        reported = {site["name"]: {m["name"]: m["value"] for m in site["metrics"]} for site in record["sites"]}
        rounds.append({site: numbers(metrics) for site, metrics in reported.items()})
    return rounds


def read_evaluation(results: Path) -> dict[str, dict]:
    """Read the metrics {site: {name: value}} of each model that was evaluated at the end."""
    models = {}
    validation = json.loads((results / "cross_site_val" / "cross_val_results.json").read_text())
    for site, metrics_by_model in validation.items():
        for model, metrics in metrics_by_model.items():
            name = model.removeprefix("SRV_")  # a model of the server's
            models.setdefault(name, {})[site] = numbers(metrics)
    return models


def numbers(metrics: dict) -> dict[str, float]:
    """Return those metrics that are numbers: a script may report others."""
    return {name: value for name, value in metrics.items() if isinstance(value, (int, float))}


def mark_best(models: dict[str, dict]) -> dict[str, dict]:
    """Return each model's accuracy on each site as text, with a star at the best models of a site."""
    best = {}
    for row in models.values():
        for site, metrics in row.items():
            best[site] = max(best.get(site, 0), metrics.get("accuracy") or 0)
    return {
        model: {site: show(m) + ("*" if m.get("accuracy") == best[site] else " ") for site, m in row.items()}
        for model, row in models.items()
    }


def show(metrics: dict) -> str:
    return "  ".join(form.format(metrics[name]) for name, form in FORMATS.items() if metrics.get(name) is not None)


def print_table(sites: list[str], rows: dict[str, dict]) -> None:
    """Print the text of each row and site, six sites side by side."""
    for first in range(0, len(sites), 6):
        block = sites[first : first + 6]
        print(" " * 25 + "".join(f"{site:>19}" for site in block))
        for name, row in rows.items():
            print(f"  {name:<23}" + "".join(f"{row.get(site) or '-':>19}" for site in block))
