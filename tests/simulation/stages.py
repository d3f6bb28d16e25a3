"""Small runs, and how far they are, by NVFlare's logs."""

from pathlib import Path

import psutil

from conftest import running

MODEL = "server/simulate_job/app_server/FL_global_model.pt"
SMALL = ["--train_size", "32", "--test_size", "20", "--num_rounds", "1"]
MANY_ROUNDS = ["--train_size", "200", "--epochs", "20", "--num_rounds", "100000"]
ENDLESS = ["--train_size", "1000", "--epochs", "100000"]


def log_has(workspace: Path, text: str, site: str = "server") -> bool:
    log = workspace / "hello-pt" / site / "log.txt"
    return log.exists() and text in log.read_text()


def in_training(workspace: Path, round: int = 0) -> bool:
    """Tell whether every client trains in a round, by what it has sent to TensorBoard."""
    started = log_has(workspace, f"Round {round} started.")
    return started and all(log_has(workspace, "waiting for result", site) for site in ("site-1", "site-2"))


def trainer(workspace: Path, site: str) -> psutil.Process:
    return next(process for process in running(workspace / "hello-pt", "custom/") if f"/{site}/" in process.cwd() + "/")
