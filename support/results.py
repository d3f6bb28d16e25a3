"""What did NVFlare leave of a run, and is it complete?"""

import argparse
import json
import math
import pickle
from pathlib import Path
from statistics import mean

import torch

from model import KEY_METRIC
from support.failure import read_lost_sites, stop_cond
from support.text import JobFailed

FINAL_MODEL, BEST_MODEL = "FL_global_model.pt", "best_FL_global_model.pt"  # NVFlare's names


def read_results(args: argparse.Namespace, folder: Path) -> dict:
    """Read what a job left in a folder, in which app_server, tb_events and so on are.

    Returns:
        completed: how many rounds were completed; fewer than asked for if NVFlare's stop_cond was met.
        final_round: which round made the final model.
        rounds: of each round, the metrics that the sites reported: {site: {name: value}}.
        models: the same of each model that was evaluated at the end, by its name.
        key_metric: {"name": ..., "mode": ...}, that of model.py.
        best_model: the better global model, by the mean of key_metric over the sites that have a number; None if none
            has. {"name": ..., the metric's name: the mean, "round": the number of rounds that made it}.
        lost_sites: of each site that was ever lost: [[what happened, at what stage, why], ...].
        paths: of the global models' files, of TensorBoard's, and of the results' folder.

    Raises:
        JobFailed: a round or an evaluation is missing, which NVFlare 2.9.0's simulator may not report.
    """
    reports, models, lost = read_rounds(folder, args), read_evaluation(folder), read_lost_sites(args.run_folder)
    final_round = load_final_model(folder)["meta_props"]["current_round"] + 1
    has_stop_cond, stopped = stop_cond(args.run_folder)
    # With a stop_cond, the final model is the best one, maybe of an earlier round, and so the reports are counted.
    rounds = len(reports) if has_stop_cond else final_round - args.first_round + 1
    if rounds < args.num_rounds and not stopped:
        raise JobFailed(f"{rounds} of {args.num_rounds} rounds were completed")
    if args.evaluates:
        sites = {site for reported in reports for site in reported} - set(lost)
        for model in [FINAL_MODEL, *(sites if args.cross_site_eval else [])]:
            if (count := len(models.get(model, {}))) < args.min_sites:
                raise JobFailed(f"the model {model} was evaluated on {count} of {args.min_sites} sites")
    name, mode = KEY_METRIC
    global_models = []
    # NVFlare names the round that tested the model, counted from 0. So many rounds had made it.
    best_round = read_json(folder / "metrics" / "metrics_summary.json").get("best_round")
    for model, round in ((FINAL_MODEL, final_round), (BEST_MODEL, best_round)):
        values = [metrics[name] for metrics in models.get(model, {}).values() if name in metrics]
        if values:
            global_models.append({"name": model, name: mean(values), "round": round})
    better = max if mode == "max" else min
    best = better(global_models, key=lambda model: model[name], default=None)  # of equals, the final one
    files = [folder / "app_server" / name for name in (FINAL_MODEL, BEST_MODEL)]
    return {
        "completed": rounds,
        "final_round": final_round,
        "rounds": reports,
        "models": models,
        "key_metric": {"name": name, "mode": mode},
        "best_model": best,
        "lost_sites": lost,
        "paths": {
            "models": [str(file) for file in files if file.exists()],
            "tensorboard": str(folder / "tb_events"),
            "results": str(folder),
        },
    }


def load_final_model(folder: Path) -> dict:
    """Load what NVFlare saved of the final global model; no code in it is run."""
    file = folder / "app_server" / FINAL_MODEL
    try:
        return torch.load(file, weights_only=True)
    except FileNotFoundError:
        raise JobFailed("no round was completed") from None
    except pickle.UnpicklingError:
        raise JobFailed(f"{file.name} holds more than weights, and was not loaded") from None


def read_json(file: Path) -> dict:
    return json.loads(file.read_text()) if file.exists() else {}


def read_rounds(folder: Path, args: argparse.Namespace) -> list[dict]:
    """Read the metrics that the sites reported in each round."""
    file = folder / "metrics" / "round_metrics.jsonl"  # missing if the clients report no metrics
    rounds = []
    for line in file.read_text().splitlines() if file.exists() else []:
        record = json.loads(line)
        rounds += [{}] * (record["round"] + 1 - args.first_round - len(rounds))  # NVFlare skips a round without metrics
        reported = {site["name"]: {m["name"]: m["value"] for m in site["metrics"]} for site in record["sites"]}
        rounds.append({site: numbers(reported[site]) for site in reported})
    return rounds


def read_evaluation(folder: Path) -> dict[str, dict]:
    """Read the metrics of each model that was evaluated at the end."""
    models = {}
    for site, metrics_by_model in read_json(folder / "cross_site_val" / "cross_val_results.json").items():
        for model, metrics in metrics_by_model.items():
            if metrics:
                models.setdefault(model.removeprefix("SRV_"), {})[site] = numbers(metrics)  # SRV_: one of the server's
    return models


def numbers(metrics: dict) -> dict[str, float]:
    """Return those metrics that are finite numbers: a script may report others."""
    return {name: value for name, value in metrics.items() if isinstance(value, (int, float)) and math.isfinite(value)}
