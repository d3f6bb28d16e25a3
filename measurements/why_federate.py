"""Is a federation worth it? Measure it, and draw it: python -m measurements.why_federate

CIFAR-10 is divided among five sites (iid, dirichlet 0.5 and dirichlet 0.1). They train for ten rounds of one local
epoch, each case with three seeds, which decide the shares, the initial weights and the order of the images:

alone:        each site keeps its model for itself. It takes the very steps that it takes in the federation; only the
              average between two rounds is missing.
fedavg:       python job.py.
pooled:       all images in one place, and the steps of one site: the mean over the sites, a fifth of an epoch a round.
pooled, all:  all images in one place, and the steps of all sites together: an epoch a round.

All of them train with `train` of client.py, with a new optimizer each round, and are tested on all test images. Each
result is appended to a file as soon as it is there, and what is in the file isn't measured again. Needs matplotlib.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.data import Dataset, Subset

from client import train
from data import add_data_flags, load_data, make_loader, partition
from model import create_model

REPO = Path(__file__).resolve().parent.parent
SITES, BATCH_SIZE, LR = 5, 16, 0.01
CASES = {
    "iid": ["--split=iid"],
    "dirichlet 0.5": ["--split=dirichlet", "--alpha=0.5"],
    "dirichlet 0.1": ["--split=dirichlet", "--alpha=0.1"],
}
NAMES = {  # of what is measured, with its colour (Okabe and Ito's, told apart by the colour-blind, too)
    "pooled, all": ("pooled, steps of all sites", "#999999"),
    "pooled": ("pooled, steps of one site", "#000000"),
    "fedavg": ("FedAvg", "#0072b2"),
    "alone": ("each site alone", "#d55e00"),
}


class NoWriter:
    def add_scalar(self, *args, **kwargs):
        pass


def measurements(seeds: int) -> list[dict]:
    """Return what is to be measured, seed by seed."""
    wanted = []
    for seed in range(seeds):
        wanted += [{"what": "fedavg", "case": case, "seed": seed} for case in CASES]
        for case in CASES:
            wanted += [{"what": "alone", "case": case, "seed": seed, "site": f"site-{i + 1}"} for i in range(SITES)]
        wanted += [{"what": what, "seed": seed} for what in ("pooled", "pooled, all")]
    return wanted


def measure(wanted: list[dict], args: argparse.Namespace) -> Iterator[dict]:
    """Measure, and return each measurement with what came of it: the accuracies after each round."""
    federated = [measurement for measurement in wanted if measurement["what"] == "fedavg"]
    plain = [(measurement, args) for measurement in wanted if measurement not in federated]
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        yield from pool.imap_unordered(train_without_averages, plain)
    for measurement in federated:
        yield federate(measurement, args)


def federate(measurement: dict, args: argparse.Namespace) -> dict:
    """Run job.py, and test the global model of each round."""
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder, "models")
        models.mkdir()
        command = [sys.executable, REPO / "job.py", f"--workspace={folder}"]
        command += [f"--train_script={REPO}/measurements/measured_client.py", *data_flags(args, measurement["case"])]
        command += [f"--seed={measurement['seed']}", f"--n_clients={SITES}", f"--num_rounds={args.rounds}"]
        command += ["--epochs=1", f"--batch_size={BATCH_SIZE}", f"--lr={LR}"]
        env = {"CLIENT": str(REPO / "client.py"), "MODELS": str(models)}
        subprocess.run(command, env=os.environ | env, stdout=subprocess.DEVNULL, check=True)
        (final,) = json.loads(Path(folder, "hello-pt", "summary.json").read_text())["paths"]["models"]
        weights = [torch.load(models / f"{i}.pt", weights_only=True) for i in range(1, args.rounds)]
        weights.append(torch.load(final, weights_only=True)["model"])
    _, test_set = data_of("site-1", measurement["seed"], data_flags(args))
    model, results = create_model(), []
    for global_weights in weights:
        model.load_state_dict(global_weights)
        results.append(accuracies(model, test_set))
    return {**measurement, "accuracies": results}


def train_without_averages(measurement_and_args: tuple[dict, argparse.Namespace]) -> dict:
    """Train one site alone, or with all images in one place, as client.py would, and test the model of each round."""
    measurement, args = measurement_and_args
    torch.set_num_threads(1)
    seed, site = measurement["seed"], measurement.get("site", "site-1")
    train_set, test_set = data_of(site, seed, data_flags(args, measurement.get("case")))
    shares = [train_set]
    if measurement["what"] == "pooled":
        fifths = partition(labels_of(train_set).numpy(), SITES, "iid", None, seed)
        shares = [Subset(train_set, fifth.tolist()) for fifth in fifths]
    model, steps, results = create_model(seed), 0, []
    for i in range(args.rounds):
        loader = make_loader(shares[i % len(shares)], BATCH_SIZE, shuffle_by=(seed, site, i))
        train(model, loader, 1, LR, torch.device("cpu"), NoWriter(), 0, site)
        steps += len(loader)
        results.append(accuracies(model, test_set))
    classes = labels_of(train_set).bincount(minlength=10).tolist()
    return {**measurement, "steps": steps, "classes": classes, "accuracies": results}


def data_flags(args: argparse.Namespace, case: str | None = None) -> list[str]:
    """Return job.py's flags for the data of a case, or for all of it."""
    size = [f"--train_size={args.train_size}"] if args.train_size else []
    return [f"--dataset={args.dataset}", f"--data_root={args.data_root}", *size, *CASES.get(case, [])]


def data_of(site: str, seed: int, flags: list[str]) -> tuple[Dataset, Dataset]:
    """Return the training and the test set that a site has in job.py's run."""
    parser = argparse.ArgumentParser()
    add_data_flags(parser)
    args = parser.parse_args(flags)
    args.seed, args.sites = seed, [f"site-{i + 1}" for i in range(SITES)]
    return load_data(args, site)


def labels_of(train_set: Dataset) -> torch.Tensor:
    return train_set.dataset.targets[train_set.indices] if isinstance(train_set, Subset) else train_set.targets


@torch.no_grad()
def accuracies(model: torch.nn.Module, test_set: Dataset) -> list[float]:
    """Return the accuracy in percent on the test images of each class."""
    model.eval()
    logits = torch.cat([model(images) for images, _ in make_loader(test_set, 500)])
    hits = logits.argmax(dim=1) == test_set.targets
    return [round(100 * hits[test_set.targets == label].float().mean().item(), 2) for label in range(10)]


# ---- What it says ----


def curve(result: dict) -> list[float]:
    """Return the accuracy on all test images, of which each class has a tenth, after each round."""
    return [statistics.mean(by_class) for by_class in result["accuracies"]]


def select(results: list[dict], what: str, case: str) -> list[dict]:
    return [result for result in results if result["what"] == what and result.get("case", case) == case]


def show(values: list[float]) -> str:
    values = sorted(values)
    return f"{statistics.mean(values):.1f} ({values[0]:.1f} to {values[-1]:.1f})" if values else "-"


def print_tables(results: list[dict]) -> None:
    print("\n| accuracy after the last round, % | " + " | ".join(CASES) + " |\n| --- |" + " ---: |" * len(CASES))
    for what, (name, _) in NAMES.items():
        cells = [show([curve(result)[-1] for result in select(results, what, case)]) for case in CASES]
        print(f"| {name} | " + " | ".join(cells) + " |")

    print("\n| on a site's own mix of classes, % | " + " | ".join(CASES) + " |\n| --- |" + " ---: |" * len(CASES))
    for what in ("fedavg", "alone"):
        print(f"| {NAMES[what][0]} | " + " | ".join(show(own_mix(results, what, case)) for case in CASES) + " |")

    rounds = sorted({1, 2, 5, len(results[0]["accuracies"])} & {*range(1, len(results[0]["accuracies"]) + 1)})
    print("\n| FedAvg after round | " + " | ".join(map(str, rounds)) + " |\n| --- |" + " ---: |" * len(rounds))
    for case in CASES:
        curves = [curve(result) for result in select(results, "fedavg", case)]
        print(f"| {case} | " + " | ".join(f"{statistics.mean(c[i - 1] for c in curves):.1f}" for i in rounds) + " |")


def own_mix(results: list[dict], what: str, case: str) -> list[float]:
    """Return the accuracies of sites' own or of the global models, each class weighed by its part in a site's share."""
    scores = []
    for site in select(results, "alone", case):
        model = site if what == "alone" else next(r for r in select(results, what, case) if r["seed"] == site["seed"])
        parts = zip(site["classes"], model["accuracies"][-1])
        scores.append(sum(images * accuracy for images, accuracy in parts) / sum(site["classes"]))
    return scores


def draw(results: list[dict], file: Path) -> None:
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(CASES), figsize=(9, 3.4), sharey=True, layout="constrained")
    for panel, case in zip(panels, CASES):
        for what, (name, colour) in NAMES.items():
            if curves := [curve(result) for result in select(results, what, case)]:
                rounds = range(1, len(curves[0]) + 1)
                panel.plot(rounds, [statistics.mean(values) for values in zip(*curves)], color=colour, label=name)
                panel.fill_between(rounds, *(list(map(f, zip(*curves))) for f in (min, max)), color=colour, alpha=0.2)
        panel.set(title=case, xlabel="round", ylim=(0, None))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy on all test images, %")
    handles = {line.get_label(): line for panel in panels for line in panel.get_lines()}
    names = [name for name, _ in NAMES.values() if name in handles]
    figure.legend([handles[name] for name in names], names, loc="outside lower center", ncols=len(names), fontsize=9)
    figure.savefig(file, dpi=120, format="png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--data_root", default="/tmp/nvflare/data")
    parser.add_argument("--train_size", type=int, help="of all images (default: all)")
    parser.add_argument("--results", type=Path, default=REPO / "measurements" / "why_federate.jsonl")
    parser.add_argument("--plot", type=Path, default=REPO / "docs" / "why-federate.png", help="where to draw it")
    args = parser.parse_args()

    keys = ("what", "case", "seed", "site")
    results = [json.loads(line) for line in args.results.read_text().splitlines()] if args.results.exists() else []
    done = [[result.get(key) for key in keys] for result in results]
    wanted = [m for m in measurements(args.seeds) if [m.get(key) for key in keys] not in done]
    for result in measure(wanted, args):
        results.append(result)
        with args.results.open("a") as file:
            file.write(json.dumps(result) + "\n")
        print(f"{result['what']}, seed {result['seed']}: {curve(result)[-1]:.1f} %", flush=True)
    print_tables(results)
    draw(results, args.plot)


if __name__ == "__main__":
    main()
