"""Small runs: what a site does wrong in them, how far they are, by NVFlare's logs, and what they leave."""

import json
from pathlib import Path

import psutil
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from conftest import Run, changed_client, running

MODEL = "server/simulate_job/app_server/FL_global_model.pt"
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # the bits of a sum depend on the number of threads
SMALL = ["--train_size", "32", "--test_size", "20", "--num_rounds", "1"]
MANY_ROUNDS = ["--train_size", "200", "--epochs", "20", "--num_rounds", "100000"]
ENDLESS = ["--train_size", "1000", "--epochs", "100000"]
EVALUATION = "the sites evaluate the models"  # a line of job.py


def faulty_client(folder: Path, site: str, line: str, fault: str, script: str = "client.py") -> Path:
    """Write a copy of a client script in which a site does something wrong in front of a line."""
    indent = " " * (len(line) - len(line.lstrip()))
    new = ["import os", f'if "/{site}/" in os.getcwd():', f"    {fault}"]
    return changed_client(folder, script, line, "\n".join(indent + of_new for of_new in new))


def log_has(workspace: Path, text: str, site: str = "server") -> bool:
    log = workspace / "hello-pt" / site / "log.txt"
    return log.exists() and text in log.read_text()


def in_training(workspace: Path, round: int = 0) -> bool:
    """Tell whether every client trains in a round, by what it has sent to TensorBoard."""
    started = log_has(workspace, f"Round {round} started.")
    return started and all(log_has(workspace, "waiting for result", site) for site in ("site-1", "site-2"))


def trainer(workspace: Path, site: str) -> psutil.Process:
    return next(process for process in running(workspace / "hello-pt", "custom/") if f"/{site}/" in process.cwd() + "/")


def contents(folder: Path) -> dict[Path, bytes]:
    """Return what every file of a folder holds, by its path there."""
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def scalars(run: Run, site: str) -> dict[str, dict[int, float]]:
    """Return {tag: {step: value}} of a site's TensorBoard events."""
    events = EventAccumulator(str(run.results / "tb_events" / site))
    events.Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def sizes(run: Run) -> dict[str, tuple[int, int]]:
    """Return how many samples each site trains and tests on."""
    return {site: (data["train_size"], data["test_size"]) for site, data in run.report()["data"]["sites"].items()}


def cross_site_results(run: Run) -> dict:
    return json.loads((run.results / "cross_site_val" / "cross_val_results.json").read_text())


def progress(output: str) -> list[str]:
    """Return the lines of a run between where NVFlare's logs are named and the summary."""
    lines = output.splitlines()
    (start,) = (i for i, line in enumerate(lines) if line.startswith("NVFlare's logs: "))
    return lines[start + 1 : lines.index("Done: 2 rounds on 2 sites.") - 1]
