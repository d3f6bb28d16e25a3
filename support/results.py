"""What did NVFlare leave? Read once, checked once."""

import argparse
import json
import math
import pickle
import statistics
from pathlib import Path

import torch

from support.failure import JobFailed

FINAL_MODEL, BEST_MODEL = "FL_global_model.pt", "best_FL_global_model.pt"  # NVFlare's names
BETTER = {"max": max, "min": min}


def read_results(args: argparse.Namespace, folder: str, key_metric: tuple[str, str]) -> dict:
    """Read what a job left in a folder, in which app_server, tb_events and so on are.

    Args:
        key_metric: the name of the metric that the best model is chosen by, and "max" or "min".

    Returns:
        rounds: of each round, the metrics that the sites reported: {site: {name: value}}.
        models: the same of each model that was evaluated at the end, by its name.
        key_metric: {"name": ..., "mode": ...}, as given.
        best_model: the better one of the global models, by the mean of key_metric over the sites; None if unknown.
        lost_sites: of each site that was, for a round or for good, what happened: ["was lost in round 1/2", ...].
        diverged: whether the final model holds numbers that are not finite.
        paths: of the global models' files, of TensorBoard's, and of all.

    Raises:
        JobFailed: a round or an evaluation is missing, of which NVFlare 2.9.0's simulator may say nothing.
    """
    folder = Path(folder)
    files = [folder / "app_server" / name for name in (FINAL_MODEL, BEST_MODEL)]
    final = load_final_model(folder)
    if (rounds := completed_rounds(final)) < args.num_rounds:
        raise JobFailed(f"{rounds} of {args.num_rounds} rounds were completed")
    reports, models, lost = read_rounds(folder), read_evaluation(folder), read_lost_sites(folder)
    if args.evaluates:
        sites = {site for reported in reports for site in reported} - set(lost)
        for model in [FINAL_MODEL, *(sites if args.cross_site_eval else [])]:
            if (count := len(models.get(model, {}))) < args.min_sites:
                raise JobFailed(f"the model {model} was evaluated on {count} of {args.min_sites} sites")
    name, mode = key_metric
    scores = {}
    for model in (FINAL_MODEL, BEST_MODEL):
        values = [metrics.get(name, math.nan) for metrics in models.get(model, {}).values()]
        if values and all(map(math.isfinite, values)):
            scores[model] = statistics.mean(values)
    best = BETTER[mode](scores, key=scores.get, default=None)
    return {
        "rounds": reports,
        "models": models,
        "key_metric": {"name": name, "mode": mode},
        "best_model": best and {"name": best, name: scores[best]},
        "lost_sites": lost,
        "diverged": not all(torch.as_tensor(weight).isfinite().all() for weight in final["model"].values()),
        "paths": {
            "models": [str(file) for file in files if file.exists()],
            "tensorboard": str(folder / "tb_events"),
            "results": str(folder),
        },
    }


def completed_rounds(final: dict) -> int:
    """Return how many rounds made the final global model, as load_final_model returns it."""
    return final["meta_props"]["current_round"] + 1 if final else 0


def load_final_model(folder: Path) -> dict:
    """Load what NVFlare saved of the final global model, or {} if there is none; no code in it is run."""
    file = folder / "app_server" / FINAL_MODEL
    if not file.exists():
        return {}
    try:
        return torch.load(file, weights_only=True)
    except pickle.UnpicklingError:
        raise JobFailed(f"{file.name} holds more than weights, and was not loaded") from None


def read_rounds(folder: Path) -> list[dict]:
    """Read the metrics that the sites reported in each round."""
    file = folder / "metrics" / "round_metrics.jsonl"  # missing if the clients report no metrics
    rounds = []
    for line in file.read_text().splitlines() if file.exists() else []:
        record = json.loads(line)
        rounds += [{}] * (record["round"] - len(rounds))  # NVFlare skips a round without metrics
        reported = {site["name"]: {m["name"]: m["value"] for m in site["metrics"]} for site in record["sites"]}
        rounds.append({site: numbers(metrics) for site, metrics in reported.items()})
    return rounds


def read_lost_sites(folder: Path) -> dict[str, list[str]]:
    """Read which sites were lost; support/server.py writes it."""
    file = folder / "lost_sites.json"
    return json.loads(file.read_text()) if file.exists() else {}


def read_evaluation(folder: Path) -> dict[str, dict]:
    """Read the metrics of each model that was evaluated at the end."""
    file = folder / "cross_site_val" / "cross_val_results.json"
    models = {}
    for site, metrics_by_model in json.loads(file.read_text()).items() if file.exists() else []:
        for model, metrics in metrics_by_model.items():
            name = model.removeprefix("SRV_")  # a model of the server's
            models.setdefault(name, {})[site] = numbers(metrics)
    return models


def numbers(metrics: dict) -> dict[str, float]:
    """Return those metrics that are numbers: a script may report others."""
    return {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
