"""What does it cost to grow? Measure it, fit lines to it, draw it: python -m measurements.scale

Jobs of six rounds, whose sites send back the model that they receive, without training: in the simulator and in
NVFlare's proof of concept (provisioned, with mutual TLS, on one machine), for models of three sizes. Of each job:

start:   seconds until the second round begins, less a round.
round:   seconds, the median from the second round on.
server:  MB, the highest resident set of its processes so far, when the third round begins.
all:     MB, the proportional set size (PSS) of all processes of the job, at the same time.
down:    bytes that the server sends to a site in a round, as NVFlare logs them; up: those that a site sends.

Each result is appended to a file as soon as it is there, and what is in the file isn't measured again. Then a line
a + b * sites is fitted to each series by least squares, with its largest residual. Needs matplotlib.
"""

import argparse
import contextlib
import itertools
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from datetime import datetime
from pathlib import Path

import numpy as np
import psutil

from support.failure import parse_log
from support.process import processes_of

REPO = Path(__file__).resolve().parent.parent
MOST = {"sim": 100, "poc": 8}  # sites
SIMPLE_NETWORK = 62_006  # parameters
COLOURS = ["#0072b2", "#d55e00", "#000000"]
ROUNDS = 6
MODEL = """
import torch
from torch import nn

KEY_METRIC = ("accuracy", "max")


def create_model(seed=0):
    return nn.ParameterDict({str(i): torch.zeros(%d // 10) for i in range(10)})
"""


def measure(env: str, sites: int, parameters: int) -> dict:
    """Run a job of this many sites, and return what it took: see above."""
    with tempfile.TemporaryDirectory() as folder:
        repo, run_folder = Path(folder, "repo"), Path(folder, "hello-pt")
        shutil.copytree(REPO, repo, ignore=shutil.ignore_patterns(".*", "docs", "tests", "__pycache__"))
        if parameters != SIMPLE_NETWORK:
            (repo / "model.py").write_text(MODEL % parameters)
        command = [sys.executable, repo / "job.py", f"--workspace={folder}", f"--env={env}", f"--n_clients={sites}"]
        command += [f"--num_rounds={ROUNDS}", "--dataset=synthetic", "--train_size=100", "--test_size=100"]
        command += [f"--train_script={repo}/measurements/echo_client.py"]
        began, memory = datetime.now(), None
        job = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        for line in job.stdout:
            if line.startswith(f"round {ROUNDS // 2}/{ROUNDS}  begins"):
                memory = memory_of(run_folder)
        if job.wait():
            sys.exit(f"failed: {command}")
        results = next(run_folder.glob("server/**/app_server")).parent
        log = parse_log(((results if env == "poc" else run_folder / "server") / "log.json").read_text())
    begins = [moment(record) for record in log if record["message"].endswith("  begins")]
    rounds = [(later - earlier).total_seconds() for earlier, later in itertools.pairwise(begins[1:])]
    each = statistics.median(rounds)
    return {
        "env": env,
        "sites": sites,
        "parameters": parameters,
        "start": round((begins[1] - began).total_seconds() - each, 2),
        "round": round(each, 2),
        **memory,
        "down": round(volume(log, "[server] download tx") / sites / ROUNDS),
        "up": round(volume(log, "[client] download ref") / sites / ROUNDS),
    }


def moment(record: dict) -> datetime:
    return datetime.strptime(record["asctime"], "%Y-%m-%d %H:%M:%S,%f")


def volume(log: list[dict], what: str) -> int:
    """Return the bytes of all records of a server's log that begin so."""
    messages = (record["message"] for record in log if record["message"].startswith(what))
    return sum(int(re.search(r"\(([\d,]+) bytes\)", message)[1].replace(",", "")) for message in messages)


def memory_of(run_folder: Path) -> dict[str, float]:
    """Return the server's highest resident set so far and the PSS of all processes of a run, both in MB."""
    server = everything = 0
    for process in processes_of(run_folder):
        with contextlib.suppress(psutil.Error, OSError):
            everything += process.memory_full_info().pss / 1e6
            if not re.search(r"simulator_worker|/site-\d", " ".join([*process.cmdline(), process.cwd()])):
                peak = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
                server += int(peak[1]) * 1024 / 1e6
    return {"server": round(server), "all": round(everything)}


# ---- What it says ----


def fit(results: list[dict], quantity: str) -> tuple[float, float, float]:
    """Return a, b and the largest residual of a + b * sites."""
    sites, values = (np.array([result[name] for result in results], float) for name in ("sites", quantity))
    b, a = np.polyfit(sites, values, 1)
    return a, b, abs(values - a - b * sites).max()


def series(results: list[dict]) -> dict[tuple[str, int], list[dict]]:
    """Return the results of each environment and size of a model, by the number of sites."""
    found = {}
    for result in sorted(results, key=lambda r: (r["parameters"], r["env"], r["sites"])):
        found.setdefault((result["env"], result["parameters"]), []).append(result)
    return found


def print_tables(results: list[dict]) -> None:
    columns = ["start", "round", "server", "all", "down", "up"]
    print("\n| parameters | env | sites | " + " | ".join(columns) + " |\n|" + " --- |" * (len(columns) + 3))
    for (env, parameters), rows in series(results).items():
        for row in rows:
            cells = " | ".join(f"{row[name]:,}".replace(",", " ") for name in columns)
            print(f"| {parameters:,} | {env} | {row['sites']} | {cells} |".replace(",", " "))
    print("\n| parameters | env | " + " | ".join(columns[:4]) + " |\n|" + " --- |" * 6)
    for (env, parameters), rows in series(results).items():
        lines = (fit(rows, name) for name in columns[:4])
        cells = " | ".join(f"{a:.3g} + {b:.3g} n (± {residual:.2g})" for a, b, residual in lines)
        print(f"| {parameters:,} | {env} | {cells} |".replace(",", " "))


def draw(results: list[dict], file: Path) -> None:
    import matplotlib.pyplot as plt

    sizes = sorted({result["parameters"] for result in results})
    figure, panels = plt.subplots(1, 3, figsize=(9, 3.4), layout="constrained")
    names = {"start": "seconds to start", "round": "seconds a round", "all": "MB in all"}
    for panel, (quantity, name) in zip(panels, names.items()):
        for (env, parameters), rows in series(results).items():
            colour = COLOURS[sizes.index(parameters)]
            a, b, _ = fit(rows, quantity)
            sites = [row["sites"] for row in rows]
            panel.plot(sites, [a + b * n for n in sites], color=colour, linestyle="-" if env == "sim" else ":")
            panel.plot(sites, [row[quantity] for row in rows], "o" if env == "sim" else "x", color=colour)
        panel.set(title=name, xlabel="sites", ylim=(0, None))
        panel.grid(alpha=0.3)
    key = [plt.Line2D([], [], color=colour) for colour in COLOURS[: len(sizes)]]
    key += [plt.Line2D([], [], color="#999999", marker=m, linestyle=s) for m, s in (("o", "-"), ("x", ":"))]
    labels = [*(f"{parameters:,} parameters".replace(",", " ") for parameters in sizes), "simulation", "poc"]
    figure.legend(key, labels, loc="outside lower center", ncols=5, fontsize=9)
    figure.savefig(file, dpi=120, format="png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, nargs="+", default=[2, 4, 8, 16], help="in poc 8 at most")
    parser.add_argument("--parameters", type=int, nargs="+", default=[62_006, 1_000_000, 25_000_000])
    parser.add_argument("--results", type=Path, default=REPO / "measurements" / "scale.jsonl")
    parser.add_argument("--plot", type=Path, default=REPO / "docs" / "scale.png", help="where to draw it")
    args = parser.parse_args()

    results = [json.loads(line) for line in args.results.read_text().splitlines()] if args.results.exists() else []
    for parameters, env, sites in itertools.product(args.parameters, ("sim", "poc"), args.sites):
        case = {"env": env, "sites": sites, "parameters": parameters}
        if sites > MOST[env] or any(case.items() <= result.items() for result in results):
            continue
        results.append(measure(**case))
        with args.results.open("a") as file:
            file.write(json.dumps(results[-1]) + "\n")
        print(json.dumps(results[-1]), flush=True)
    print_tables(results)
    draw(results, args.plot)


if __name__ == "__main__":
    main()
