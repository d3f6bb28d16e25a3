"""Stopping is clean: real runs, stopped by each signal in each phase."""

import signal
import time

import psutil
import pytest

from conftest import REPO, finish, running, start_job, wait_until
from stages import MANY_ROUNDS, SMALL, in_training, log_has


def stop(process, number, workspace):
    process.send_signal(number)
    start = time.monotonic()
    run = finish(process, workspace)
    assert time.monotonic() - start < 50  # NVFlare waits for longer
    assert run.status == 128 + number
    assert running(workspace.parent) == []
    assert "Traceback" not in run.output + run.errors
    return run


SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.mark.parametrize("number", SIGNALS)
def test_stopped_before_the_run_begins(workspace, number):
    job = start_job(workspace, *SMALL)
    wait_until(lambda: any("libtorch" in file.path for file in psutil.Process(job.pid).memory_maps()), job)
    job.send_signal(number)  # while it imports PyTorch
    run = finish(job, workspace)
    assert (run.status, run.output, run.errors) == (-number, "", "")
    assert running(workspace.parent) == [] and not workspace.exists()


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("seconds", [0, 0.3, 1.5])
def test_stopped_at_the_start(workspace, number, seconds):
    job = start_job(workspace, *SMALL)
    wait_until(lambda: "Training on" in job.stdout.readline(), job)
    time.sleep(seconds)
    stop(job, number, workspace)


@pytest.mark.parametrize("number", SIGNALS)
def test_stopped_in_training(workspace, number):
    job = start_job(workspace, *MANY_ROUNDS)
    wait_until(lambda: in_training(workspace, round=1), job)
    run = stop(job, number, workspace)
    assert run.errors.splitlines()[-1] == f"job.py: stopped; the rounds before are in {run.folder}"
    assert run.weights() and (run.results / "metrics" / "round_metrics.jsonl").read_text().count("\n") >= 1


@pytest.mark.parametrize("number", SIGNALS)
def test_stopped_in_the_final_evaluation(workspace, number):
    job = start_job(workspace, *SMALL, "--train_script", str(REPO / "client_with_eval.py"))
    wait_until(lambda: log_has(workspace, "Beginning model validation"), job)
    run = stop(job, number, workspace)
    assert run.errors.splitlines()[-1] == f"job.py: stopped; the rounds before are in {run.folder}"
