"""How is it shown? The data at the start; at the end what came of the run, for people, as JSON and in TensorBoard."""

import argparse
import json
import os
import shlex
import sys
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from support.results import BEST_MODEL, FINAL_MODEL

FORMATS = {"train_loss": "{:.4f}", "accuracy": "{:.2f} %"}  # of the metrics in the tables


def show_data(args: argparse.Namespace, name: str, warning: str, load_data, class_counts) -> dict:
    """Print what each site trains on, class by class, and return it. In a provisioned federation, only sites know it.

    Args:
        name, warning: what prepare_data of data.py returns.
        load_data, class_counts: those of data.py.
    """
    if warning:
        print(f"\n{'!' * 100}\nWARNING: {warning}\n{'!' * 100}\n", file=sys.stderr)
    data = {"name": name, "warning": warning, "sites": {}}
    if args.export:
        return data
    print(f"Training on {name}.", flush=True)
    if args.env == "prod":
        return data
    for site in args.sites:
        train_set, test_set = load_data(args, site)
        sizes = {"train_size": len(train_set), "test_size": len(test_set)}
        data["sites"][site] = {**sizes, "class_counts": class_counts(args, train_set)}
    rows = {site: described["class_counts"] for site, described in data["sites"].items()}
    if all(row == rows["site-1"] for row in rows.values()):
        rows = {"each site": rows["site-1"]}
    print(f"\n{'Training images':<17}{'all':>7}" + "".join(f"{name:>7}" for name in next(iter(rows.values()))))
    for site, counts in rows.items():
        print(f"  {site:<15}" + "".join(f"{count:>7}" for count in (sum(counts.values()), *counts.values())))
    print(flush=True)
    return data


def sum_up(args: argparse.Namespace, data: dict, results: dict) -> None:
    """Print a run's summary, add the final model to TensorBoard, and write --json: see show_data and read_results."""
    models, tb_events = results["models"], results["paths"]["tensorboard"]
    for site, metrics in models.get(FINAL_MODEL, {}).items():
        # NVFlare 2.9.0 tells no client which model it validates, so no client can add this point.
        with SummaryWriter(os.path.join(tb_events, site)) as writer:
            for name, value in metrics.items():
                writer.add_scalar(name, value, global_step=args.num_rounds)
    report = {
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "data": data,
        **results,
        "tensorboard_command": f"tensorboard --logdir {shlex.quote(tb_events)}",
    }
    report = json.loads(json.dumps(report), parse_constant=lambda constant: None)  # NaN and infinity become None
    print_summary(report)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        unfinished = args.json.with_name(f"{os.getpid()}.unfinished")  # so that nobody ever sees a part of it
        try:
            unfinished.write_text(json.dumps(report, indent=2) + "\n")
            unfinished.replace(args.json)
        except OSError as error:
            raise OSError(f"can't write {args.json}: {error.strerror}") from error
        finally:
            unfinished.unlink(missing_ok=True)


def print_summary(summary: dict) -> None:
    """Print the data, the metrics of all rounds and sites, and where the models and the curves are."""
    settings, models = summary["settings"], summary["models"]
    sites = {site for row in (*summary["rounds"], *models.values()) for site in row} or settings["sites"]
    sites = sorted(sites, key=lambda site: (len(site), site))
    print(f"\nDone: {settings['num_rounds']} rounds on {len(sites)} sites.")
    print(f"Data: {describe(summary['data'])}.")
    if summary["data"]["warning"]:
        print(f"      WARNING: {summary['data']['warning'].partition('. ')[0]}; the reason stands above.")

    rows = {f"round {i}": metrics for i, metrics in enumerate(summary["rounds"])}
    if FINAL_MODEL in models:
        rows["final"] = models[FINAL_MODEL]
    evaluated = any("accuracy" in metrics for by_site in rows.values() for metrics in by_site.values())
    what = ", and accuracy of the global model before the round" if evaluated else ""
    print(f"\nMean training loss in the round{what}:")
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
        metric = summary["key_metric"]
        score = FORMATS.get(metric, metric + " {:.4f}").format(best[metric])
        print(f"The best is {best['name']}: {score} on average over the sites.")
    print(f"\nTensorBoard:\n  {summary['tensorboard_command']}")


def describe(data: dict) -> str:
    """Return what the sites trained and tested on, in words."""
    if not data["sites"]:
        return f"{data['name']}, each site's own"
    sizes = []
    for part in ("train_size", "test_size"):
        least, most = (limit(site[part] for site in data["sites"].values()) for limit in (min, max))
        sizes.append(str(most) if least == most else f"{least} to {most}")
    return f"{data['name']}, {sizes[0]} training images a site, {sizes[1]} test images"


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
