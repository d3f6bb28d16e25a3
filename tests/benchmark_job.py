"""Measure what federation adds to the training itself, in time and memory: python tests/benchmark_job.py

(a) bare:  as many plain PyTorch processes at once as there are clients, without NVFlare, one thread each,
           which take the same steps on the same images;
(b) floor: the same job with a client that sends back the model that it received;
(c) job:   python job.py.

(c - b) / a is the cost of a client's step beside a bare one, the processes' start included. Memory is
the proportional set size (PSS) of all processes of the job together, at its peak; it has a run of its
own, since looking at it costs time.
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

REPO = Path(__file__).resolve().parent.parent

BARE = """
import sys
import torch
from torch.nn import functional as F
from data import load_data, make_loader
from model import SimpleNetwork

dataset, data_root, epochs, seed = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
train_set, _ = load_data(dataset, data_root)
train_loader = make_loader(train_set, 16, torch.Generator().manual_seed(seed))
model = SimpleNetwork()
optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
for _ in range(epochs):
    for images, labels in train_loader:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
"""


def run(commands: list[list[str]], **env: str) -> float:
    """Run commands side by side; return the seconds until all have ended."""
    start = time.perf_counter()
    processes = [
        subprocess.Popen(command, cwd=REPO, env={**os.environ, **env}, stdout=subprocess.DEVNULL)
        for command in commands
    ]
    if any([process.wait() for process in processes]):
        sys.exit(f"failed: {commands}")
    return time.perf_counter() - start


def peak_pss(command: list[str]) -> float:
    """Run a command; return the peak PSS in GB of it and all that it started, looked at every half second."""
    process = subprocess.Popen(command, cwd=REPO, stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, pss(psutil.Process(process.pid)))
        time.sleep(0.5)
    return peak / 1e9


def pss(parent: psutil.Process) -> int:
    """Return the proportional set size in bytes of a process and all that it started."""
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in [parent, *parent.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                total += process.memory_full_info().pss
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n_clients", type=int, default=2)
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--data_root", default="/tmp/nvflare/data")
    parser.add_argument("--repeats", type=int, default=1, help="measure so often, and print the medians too")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as workspace:
        job = [sys.executable, "job.py", f"--n_clients={args.n_clients}", f"--dataset={args.dataset}"]
        job += [f"--data_root={args.data_root}", f"--workspace={workspace}"]
        bare = [[sys.executable, "-c", BARE, args.dataset, args.data_root, "4", str(i)] for i in range(args.n_clients)]
        rows = []
        for _ in range(args.repeats):
            a = run(bare, OMP_NUM_THREADS="1")
            b = run([[*job, "--train_script=tests/echo_client.py"]])
            c = run([job])
            rows.append((a, b, c, (c - b) / a))
            print("a {:.1f} s   b {:.1f} s   c {:.1f} s   (c - b) / a {:.3f}".format(*rows[-1]), flush=True)
        if args.repeats > 1:
            medians = [statistics.median(column) for column in zip(*rows)]
            print("medians: a {:.1f} s   b {:.1f} s   c {:.1f} s   (c - b) / a {:.3f}".format(*medians))
        print(f"peak PSS of the job {peak_pss(job):.2f} GB")


if __name__ == "__main__":
    main()
