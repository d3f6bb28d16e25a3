"""Train five sites on the same and on different images, and draw what it does: python measurements/compare_splits.py

Runs job.py with client_with_eval.py once for each split, with the same number of steps for all: a site that has all
training images passes over them once a round, one that has a fifth of them five times. Prints the accuracy of the
global model as a table in Markdown, and draws it over the rounds. Needs matplotlib.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt

REPO = Path(__file__).resolve().parent.parent
SITES = 5
SPLITS = {
    "same": ["--split=same", "--epochs=1"],
    "iid": ["--split=iid", f"--epochs={SITES}"],
    "dirichlet, alpha 0.5": ["--split=dirichlet", "--alpha=0.5", f"--epochs={SITES}"],
    "dirichlet, alpha 0.1": ["--split=dirichlet", "--alpha=0.1", f"--epochs={SITES}"],
}


def accuracies(flags: list[str]) -> list[float]:
    """Run job.py; return the global model's accuracy in percent, averaged over the sites, after 0, 1, ... rounds."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, str(REPO / "job.py"), "--train_script=client_with_eval.py", f"--n_clients={SITES}"]
        command += [f"--workspace={folder}", f"--json={report}", *flags]
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
        report = json.loads(report.read_text())
    models = [*report["rounds"], report["models"]["FL_global_model.pt"]]
    return [sum(metrics["accuracy"] for metrics in sites.values()) / len(sites) for sites in models]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_rounds", type=int, default=10)
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--data_root", default="/tmp/nvflare/data")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, default=REPO / "docs" / "splits.png", help="where to draw it")
    args = parser.parse_args()

    shared = [f"--{name}={getattr(args, name)}" for name in ("num_rounds", "dataset", "data_root", "seed")]
    shown = sorted({1, 2, args.num_rounds // 2, args.num_rounds})
    print("| split | " + " | ".join(f"after {i} round{'s' * (i > 1)}" for i in shown) + " |", flush=True)
    print("| --- |" + " ---: |" * len(shown))
    plt.figure(figsize=(7, 4), layout="constrained")
    for name, flags in SPLITS.items():
        accuracy = accuracies(shared + flags)
        print(f"| {name} | " + " | ".join(f"{accuracy[i]:.1f} %" for i in shown) + " |", flush=True)
        plt.plot(accuracy, marker="o", label=name)
    plt.xlabel("rounds")
    plt.ylabel("accuracy of the global model, %")
    plt.grid(alpha=0.3)
    plt.legend()
    plt.savefig(args.plot, dpi=120)


if __name__ == "__main__":
    main()
