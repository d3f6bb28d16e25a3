"""How is it shown? What came of the run, for people, as JSON and in TensorBoard."""

import argparse
import json
import math
import os
import shlex
from collections.abc import Callable
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from support.results import BEST_MODEL, BETTER, FINAL_MODEL

COLUMNS = 12  # of a table, side by side


def sum_up(args: argparse.Namespace, data: dict, results: dict) -> None:
    """Print a run's summary, complete TensorBoard's points, and write --json: see show_data and read_results."""
    complete_tensorboard(results, args.num_rounds)
    report = {
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "data": data,
        **results,
        "tensorboard_command": f"tensorboard --logdir {shlex.quote(results['paths']['tensorboard'])}",
    }
    print_summary(report)
    if args.json:
        report = json.loads(json.dumps(report), parse_constant=lambda constant: None)  # NaN and infinity become None
        args.json.parent.mkdir(parents=True, exist_ok=True)
        unfinished = args.json.with_name(f"{os.getpid()}.unfinished")  # so that nobody ever sees a part of it
        try:
            unfinished.write_text(json.dumps(report, indent=2) + "\n")
            unfinished.replace(args.json)
        except OSError as error:
            raise OSError(f"can't write {args.json}: {error.strerror}") from error
        finally:
            unfinished.unlink(missing_ok=True)


def complete_tensorboard(results: dict, num_rounds: int) -> None:
    """Add the points of the final model, and those of metrics for which the script wrote none itself.

    NVFlare 2.9.0 tells no client which model it validates, so no client can add the final model's.
    """
    final = results["models"].get(FINAL_MODEL, {})
    for site in {site for row in (*results["rounds"], final) for site in row}:
        folder = os.path.join(results["paths"]["tensorboard"], site)
        events = EventAccumulator(folder)
        written = set(events.Reload().Tags()["scalars"]) if os.path.isdir(folder) else set()
        with SummaryWriter(folder) as writer:
            for i, row in enumerate(results["rounds"]):
                for name, value in row.get(site, {}).items():
                    if name not in written:
                        writer.add_scalar(name, value, global_step=i)
            for name, value in final.get(site, {}).items():
                writer.add_scalar(name, value, global_step=num_rounds)


def print_summary(summary: dict) -> None:
    """Print the data, the metrics of all rounds and sites, and where the models and the curves are."""
    settings, models = summary["settings"], summary["models"]
    rows = {f"round {i}": metrics for i, metrics in enumerate(summary["rounds"], start=1)}
    if FINAL_MODEL in models:
        rows["final"] = models[FINAL_MODEL]
    sites = {site for row in (*rows.values(), *models.values()) for site in row} or settings["sites"]
    sites = sorted(sites, key=lambda site: (len(site), site))
    all_sites = max(len(sites), settings["n_clients"])  # some may never have been drawn, or were lost at once
    print(f"\nDone: {count(settings['num_rounds'], 'round')} on {count(all_sites, 'site')}.")
    print(f"Data: {describe(summary['data'])}.")
    if summary["data"]["warning"]:
        print(f"      WARNING: {summary['data']['warning'].partition('. ')[0]}; the reason stands above.")

    for site, events in summary["lost_sites"].items():
        print(f"Lost: {site} {', '.join(events)}.")

    evaluated = " (they evaluate the global model before they train it)" if settings["evaluates"] else ""
    print(f"\nWhat the sites reported in each round{evaluated}:")
    for metric in dict.fromkeys(name for row in rows.values() for metrics in row.values() for name in metrics):
        print_table(metric, table(rows, sites, metric), order=sites)
    name, mode = summary["key_metric"]["name"], summary["key_metric"]["mode"]
    if settings["cross_site_eval"]:
        print("\nEach model (row) on each site's test data (column), * the best of the column:")
        rows = {model: models[model] for model in (FINAL_MODEL, BEST_MODEL, *sites) if model in models}
        print_table(name, mark_best(table(rows, sites, name), BETTER[mode]), order=sites)

    print("\nGlobal models:")
    for file in summary["paths"]["models"]:
        print(f"  {file}")
    if summary["diverged"]:
        print("WARNING: the final model's weights are not finite numbers: training diverged. Try a smaller --lr.")
    if best := summary["best_model"]:
        print(f"The best is {best['name']}: {name} {show(best[name])} on average over the sites.")
    elif settings["evaluates"]:
        print(f"WARNING: not all sites reported {name} as a finite number, and so no model is called the best.")
    print(f"\nTensorBoard:\n  {summary['tensorboard_command']}")
    if not settings["evaluates"]:
        print("\nHow good is the model?\n  python job.py --train_script client_with_eval.py")


def count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def describe(data: dict) -> str:
    """Return what the sites trained and tested on, in words."""
    if not data["sites"]:
        return f"{data['name']}, each site's own"
    sizes = []
    for part in ("train_size", "test_size"):
        least, most = (limit(site[part] for site in data["sites"].values()) for limit in (min, max))
        sizes.append(str(most) if least == most else f"{least} to {most}")
    return f"{data['name']}, {sizes[0]} training samples a site, {sizes[1]} test samples"


def table(rows: dict[str, dict], sites: list[str], metric: str) -> dict[str, dict]:
    """Return a metric of each row and site; rows and sites without it are left out."""
    found = {}
    for name, row in rows.items():
        if values := {site: row[site][metric] for site in sites if metric in row.get(site, {})}:
            found[name] = values
    return found


def mark_best(rows: dict[str, dict], best_of: Callable) -> dict[str, dict]:
    """Return numbers as text, with a star at the best of each column, for which best_of is max or min."""
    best = {}
    for row in rows.values():
        for site, value in row.items():
            if math.isfinite(value):
                best[site] = best_of(best.get(site, value), value)
    return {
        name: {site: show(value) + ("*" if value == best.get(site) else " ") for site, value in row.items()}
        for name, row in rows.items()
    }


def show(cell: float | str) -> str:
    return f"{cell:#.4g}" if isinstance(cell, float) else str(cell)


def print_table(title: str, rows: dict[str, dict], order: list[str] = ()) -> None:
    """Print numbers or texts in rows and columns, twelve columns side by side.

    Args:
        order: of the columns; if it says nothing of them, that of the rows.
    """
    texts = {name: {column: show(cell) for column, cell in row.items()} for name, row in rows.items()}
    columns = list(dict.fromkeys(column for row in texts.values() for column in row))
    columns.sort(key=[*order, *columns].index)
    widths = {name: max([len(name), *(len(row.get(name, "-")) for row in texts.values())]) + 2 for name in columns}
    indent = max([14, *(len(name) + 2 for name in (title, *texts))])
    for first in range(0, len(columns), COLUMNS):
        block = columns[first : first + COLUMNS]
        print(f"  {title:<{indent}}" + "".join(f"{column:>{widths[column]}}" for column in block))
        for name, row in texts.items():
            cells = "".join(f"{row.get(column, '-'):>{widths[column]}}" for column in block)
            print(f"    {name:<{indent - 2}}{cells}")
