"""Measure job.py, in time and memory: python measurements/benchmark_job.py [cost] [clients] [rounds] [growth]

cost:    (a) bare:  as many plain PyTorch processes at once as there are clients, without NVFlare, one thread each,
                    which take the same steps on the same images;
         (b) floor: the same job with a client that sends back the model that it received;
         (c) job:   python job.py.
         (c - b) / a is the cost of a client's step beside a bare one, the processes' start included.
clients: the memory of a whole run with 2, 4, 8 and 16 clients at its peak, and what each further client adds; the
         time from a client's start to its first step, and the same if each client reads the images' files by itself.
rounds:  the time that a further round of a short job takes.
growth:  the memory of each process over 50 rounds of a short job, and its growth a round after the fifth.

Memory is the proportional set size (PSS): of what processes share, each counts its part. Runs in which it is read
are not timed, since reading it costs time.
"""

import argparse
import contextlib
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch

REPO = Path(__file__).resolve().parent.parent

BARE = """
import sys
from argparse import Namespace
import torch
from data import load_data, make_loader
from model import create_model, criterion

dataset, data_root, epochs, seed = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
sizes = {"train_size": None, "test_size": None}
train_set, _ = load_data(Namespace(dataset=dataset, data_root=data_root, split="same", seed=0, **sizes), "site-1")
train_loader = make_loader(train_set, 16, shuffle_by=(seed,))
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
model = create_model().to(device)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
for _ in range(epochs):
    for images, labels in train_loader:
        images, labels = images.to(device), labels.to(device)
        optimizer.zero_grad()
        criterion(model(images), labels).backward()
        optimizer.step()
"""


def cost(job: list[str], args: argparse.Namespace) -> None:
    bare = [[sys.executable, "-c", BARE, args.dataset, args.data_root, "4", str(i)] for i in range(args.n_clients)]
    job = [*job, f"--n_clients={args.n_clients}"]
    rows = []
    for _ in range(args.repeats):
        a = run(bare, OMP_NUM_THREADS="1")
        b = run([[*job, "--train_script=measurements/echo_client.py"]])
        c = run([job])
        rows.append((a, b, c, (c - b) / a))
        print("a {:.1f} s   b {:.1f} s   c {:.1f} s   (c - b) / a {:.3f}".format(*rows[-1]), flush=True)
    if args.repeats > 1:
        medians = [statistics.median(column) for column in zip(*rows)]
        print("medians: a {:.1f} s   b {:.1f} s   c {:.1f} s   (c - b) / a {:.3f}".format(*medians))
    print(f"peak memory of the job {peak_memory(job) / 1000:.2f} GB", flush=True)


def clients(job: list[str], args: argparse.Namespace) -> None:
    job = [*job, "--num_rounds=1", "--epochs=1"]
    peaks = {n: peak_memory([*job, f"--n_clients={n}"]) for n in (2, 4, 8, 16)}
    for (n, peak), (more, higher) in zip(peaks.items(), list(peaks.items())[1:]):
        print(f"{n:>2} clients {peak:.0f} MB, {more:>2} clients {higher:.0f} MB: ", end="")
        print(f"{(higher - peak) / (more - n):.0f} MB for each further client", flush=True)
    if args.dataset == "cifar10":
        timed = [*job, "--train_script=measurements/timed_client.py", "--train_size=1000"]
        shared, own = [], []
        for _ in range(args.repeats):
            shared += first_steps(timed)
            own += first_steps(timed, OWN_COPY="1")
        print(
            f"start to first step: {statistics.median(shared):.2f} s, {statistics.median(own):.2f} s if each client ",
            end="",
        )
        print(f"reads the images' files; ratio {statistics.median(shared) / statistics.median(own):.2f}", flush=True)


def rounds(job: list[str], args: argparse.Namespace) -> None:
    job = [*job, "--train_size=64", "--epochs=1"]
    for _ in range(args.repeats):
        few, many = (run([[*job, f"--num_rounds={n}"]]) for n in (1, 21))
        print(f"1 round {few:.1f} s, 21 rounds {many:.1f} s: {(many - few) / 20:.2f} s a further round", flush=True)


def growth(job: list[str], args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as workspace:
        job = [*job, "--train_size=64", "--epochs=1", "--num_rounds=50", f"--workspace={workspace}"]
        process = subprocess.Popen(job, cwd=REPO, stdout=subprocess.DEVNULL)
        metrics = Path(workspace, "hello-pt", "server", "simulate_job", "metrics", "round_metrics.jsonl")
        curves, rounds = {}, 0  # MB of each process after each round
        while process.poll() is None:
            time.sleep(0.05)
            done = metrics.read_text().count("\n") if metrics.exists() else 0
            if rounds < done < 50:  # after the last round, processes that end give back what others shared with them
                rounds = done
                for member, megabytes in memory(process.pid).items():
                    curves.setdefault(member, {})[rounds] = megabytes
    shown = [5, 10, 20, 30, 40, 49]
    print(f"{'MB after round':<24}" + "".join(f"{i:>8}" for i in shown) + "   a round")
    for member, curve in curves.items():
        if curve.keys() >= set(shown):  # not a helper that lived for some rounds
            cells = "".join(f"{curve[i]:>8.1f}" for i in shown)
            print(f"{member[1]:<24}{cells}{(curve[49] - curve[5]) / 44:>+10.3f}", flush=True)


def name(process: psutil.Process) -> str:
    command = " ".join(process.cmdline())
    for pattern in (r"custom/(\w+\.py)", r"simulator_worker.*?(site-\d+)", r"(simulator\w*)", r"(\w+\.py)"):
        if found := re.search(pattern, command):
            return found[1]
    return process.name()


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


def first_steps(command: list[str], **env: str) -> list[float]:
    """Run a job of timed clients; return the seconds from each client's start to its first step."""
    env["CLIENT"] = str(REPO / "client.py")
    output = subprocess.run(
        command, cwd=REPO, env={**os.environ, **env}, stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    return [float(seconds) for seconds in re.findall(r"first step (\S+) s", output)]


def peak_memory(command: list[str]) -> float:
    """Run a command; return the peak PSS in MB of it and all that it started, looked at every half second."""
    process = subprocess.Popen(command, cwd=REPO, stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(memory(process.pid).values()))
        time.sleep(0.5)
    return peak


def memory(pid: int) -> dict[tuple[int, str], float]:
    """Return the PSS in MB of a process and of all that it started, by id and name."""
    found = {}
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        for process in [parent, *parent.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                found[process.pid, name(process)] = process.memory_full_info().pss / 1e6
    return found


def main() -> None:
    measurements = {"cost": cost, "clients": clients, "rounds": rounds, "growth": growth}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", metavar="MEASUREMENT", help="cost, clients, rounds or growth (default: all)")
    parser.add_argument("--n_clients", type=int, default=2, help="of the cost (default: %(default)s)")
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--data_root", default="/tmp/nvflare/data")
    parser.add_argument("--repeats", type=int, default=1, help="measure times so often")
    args = parser.parse_args()
    if unknown := set(args.what) - measurements.keys():
        parser.error(f"there is no measurement {' '.join(sorted(unknown))}")

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} cores"
    print(f"Measured on: {device}", flush=True)
    with tempfile.TemporaryDirectory() as workspace:
        job = [sys.executable, "job.py", f"--dataset={args.dataset}", f"--data_root={args.data_root}"]
        job += [f"--workspace={workspace}"]
        for what in args.what or measurements:
            measurements[what](job, args)


if __name__ == "__main__":
    main()
