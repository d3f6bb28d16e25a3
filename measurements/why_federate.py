"""Is a federation worth it? Measure it, and draw it: python -m measurements.why_federate

Five sites share CIFAR-10 out among themselves (iid, dirichlet 0.5 and dirichlet 0.1), and train for ten rounds of one
local epoch, each case with three seeds, which decide the shares, the initial weights and the order of the images:

alone:        each site keeps its model for itself. It takes the very steps that it takes in the federation; what lacks
              is the average between two rounds.
fedavg:       python job.py.
fedprox:      the same with a proximal term in the sites' loss (for the skewed shares).
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
from pathlib import Path

import torch
from torch.utils.data import Subset

from client import train
from data import add_data_flags, load_data, make_loader, partition
from model import create_model

REPO = Path(__file__).resolve().parent.parent
SITES, ROUNDS, SEEDS = 5, 10, 3
BATCH_SIZE, LR, MU = 16, 0.01, 0.1
CASES = {
    "iid": ["--split=iid"],
    "dirichlet 0.5": ["--split=dirichlet", "--alpha=0.5"],
    "dirichlet 0.1": ["--split=dirichlet", "--alpha=0.1"],
}
NAMES = {
    "alone": "each site alone",
    "fedavg": "FedAvg",
    "fedprox": f"FedProx, µ = {MU:g}",
    "pooled": "pooled, steps of one site",
    "pooled, all": "pooled, steps of all sites",
}


class NoWriter:
    def add_scalar(self, *args, **kwargs):
        pass


def data_of(site: str, seed: int, flags: list[str], data_root: str):
    """Return the training and the test set of a site."""
    parser = argparse.ArgumentParser()
    add_data_flags(parser)
    args = parser.parse_args(["--dataset=cifar10", f"--data_root={data_root}", *flags])
    args.seed, args.n_clients = seed, SITES
    return load_data(args, site)


def labels_of(train_set) -> torch.Tensor:
    if isinstance(train_set, Subset):
        return train_set.dataset.targets[train_set.indices]
    return train_set.targets


@torch.no_grad()
def accuracies(model, test_set) -> list[float]:
    """Return the accuracy in percent on the test images of each class."""
    model.eval()
    logits = torch.cat([model(images) for images, _ in make_loader(test_set, 500)])
    labels = test_set.targets
    hits = logits.argmax(dim=1) == labels
    return [round(100 * hits[labels == label].float().mean().item(), 2) for label in range(10)]


def train_without_averages(job: dict) -> dict:
    """Train one site alone, or with all images in one place, as client.py would; return the result of each round."""
    torch.set_num_threads(1)
    what, seed = job["what"], job["seed"]
    if what == "alone":
        train_set, test_set = data_of(job["site"], seed, CASES[job["case"]], job["data_root"])
        shares = [train_set]
        job["classes"] = labels_of(train_set).bincount(minlength=10).tolist()
    else:
        train_set, test_set = data_of("site-1", seed, ["--split=same"], job["data_root"])
        shares = [train_set]
        if what == "pooled":
            fifths = partition(labels_of(train_set).numpy(), SITES, "iid", None, seed)
            shares = [Subset(train_set, fifth.tolist()) for fifth in fifths]
    model, steps, results = create_model(seed), 0, []
    for i in range(ROUNDS):
        loader = make_loader(shares[i % len(shares)], BATCH_SIZE, shuffle_by=(seed, job.get("site", "site-1"), i))
        train(model, loader, 1, LR, torch.device("cpu"), NoWriter(), 0)
        steps += len(loader)
        results.append(accuracies(model, test_set))
    return {**job, "steps": steps, "accuracies": results}


def federate(job: dict) -> dict:
    """Run job.py; return the result of the global model after each round."""
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder, "models")
        models.mkdir()
        command = [sys.executable, REPO / "job.py", f"--workspace={folder}", f"--json={folder}/report.json"]
        command += [f"--train_script={REPO}/measurements/measured_client.py", "--dataset=cifar10"]
        command += [f"--data_root={job['data_root']}", f"--seed={job['seed']}", f"--n_clients={SITES}"]
        command += [f"--num_rounds={ROUNDS}", "--epochs=1", f"--batch_size={BATCH_SIZE}", f"--lr={LR}"]
        env = {**os.environ, "CLIENT": str(REPO / "client.py"), "MODELS": str(models)}
        if job["what"] == "fedprox":
            env["FEDPROX_MU"] = str(MU)
        subprocess.run([*command, *CASES[job["case"]]], env=env, stdout=subprocess.DEVNULL, check=True)
        (final,) = json.loads(Path(folder, "report.json").read_text())["paths"]["models"]
        weights = [torch.load(models / f"{i}.pt", weights_only=True) for i in range(1, ROUNDS)]
        weights.append(torch.load(final, weights_only=True)["model"])
    _, test_set = data_of("site-1", 0, [], job["data_root"])
    model, results = create_model(), []
    for global_weights in weights:
        model.load_state_dict({name: torch.as_tensor(weight) for name, weight in global_weights.items()})
        results.append(accuracies(model, test_set))
    return {**job, "accuracies": results}


def jobs() -> list[dict]:
    """Return what is to be measured, in such an order that each seed is complete before the next one."""
    found = []
    for seed in range(SEEDS):
        found += [{"what": "fedavg", "case": case, "seed": seed} for case in CASES]
        for case in CASES:
            found += [{"what": "alone", "case": case, "seed": seed, "site": f"site-{i + 1}"} for i in range(SITES)]
        found += [{"what": what, "seed": seed} for what in ("pooled", "pooled, all")]
    return found + [{"what": "fedprox", "case": c, "seed": s} for s in range(SEEDS) for c in CASES if c != "iid"]


def measure(file: Path, data_root: str) -> None:
    """Measure what isn't in the file yet, and append it."""
    keys = ("what", "case", "seed", "site")
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {tuple(result.get(key) for key in keys) for result in done}
    left = [job for job in jobs() if tuple(job.get(key) for key in keys) not in done]

    def keep(result):
        del result["data_root"]
        with file.open("a") as results:
            results.write(json.dumps(result) + "\n")
        print(len(jobs()) - len(file.read_text().splitlines()), "to go", flush=True)

    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        for seed in range(SEEDS):
            plain = [job for job in left if job["seed"] == seed and job["what"] not in ("fedavg", "fedprox")]
            for job in left:
                if job["seed"] == seed and job["what"] == "fedavg":
                    keep(federate({**job, "data_root": data_root}))
            for result in pool.imap_unordered(train_without_averages, [{**j, "data_root": data_root} for j in plain]):
                keep(result)
    for job in left:
        if job["what"] == "fedprox":
            keep(federate({**job, "data_root": data_root}))


def mean(values) -> float:
    return statistics.mean(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_root", default="/tmp/nvflare/data")
    parser.add_argument("--results", type=Path, default=REPO / "measurements" / "why_federate.jsonl")
    args = parser.parse_args()
    measure(args.results, args.data_root)


if __name__ == "__main__":
    main()
