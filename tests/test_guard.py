"""A run is never lost and never hangs: real runs, killed, stopped and started on top of each other."""

import argparse
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch

import guard
import summary
from conftest import REPO, finish, run_job, running, start_job, wait_until
from guard import processes_of
from model import SimpleNetwork

MODEL = "server/simulate_job/app_server/FL_global_model.pt"
SMALL = ["--train_size", "32", "--test_size", "20", "--num_rounds", "1"]
MANY_ROUNDS = ["--epochs", "10", "--num_rounds", "100000"]
ENDLESS = ["--train_size", "1000", "--epochs", "100000"]


@pytest.fixture
def workspace(tmp_path):
    yield tmp_path / "workspace"
    for process in processes_of(tmp_path / "workspace" / "hello-pt"):  # after a failed test
        process.kill()


def log_has(workspace, text, site="server"):
    log = workspace / "hello-pt" / site / "log.txt"
    return log.exists() and text in log.read_text()


def in_training(workspace, round=0):
    """Tell whether every client trains in a round, by what it has sent to TensorBoard."""
    started = log_has(workspace, f"Round {round} started.")
    return started and all(log_has(workspace, "waiting for result", site) for site in ("site-1", "site-2"))


def trainer(workspace, site):
    return next(process for process in running(workspace / "hello-pt", "custom/") if f"/{site}/" in process.cwd() + "/")


# ---- Earlier results stay ----


def test_second_run_keeps_the_first_runs_results_but_nothing_of_a_run_without_any(workspace):
    first = run_job(workspace, *SMALL)
    assert first.status == 0, first.errors
    model = (workspace / "hello-pt" / MODEL).read_bytes()

    faulty = workspace.parent / "faulty.py"
    faulty.write_text("raise RuntimeError('at once')")
    failed = run_job(workspace, *SMALL, "--train_script", str(faulty))
    assert failed.status == 1
    assert "site-" in failed.errors and "RuntimeError: at once" in failed.errors
    (kept,) = workspace.glob("hello-pt-*")
    assert f"The results of the run before are kept in {kept}" in failed.output
    assert (kept / MODEL).read_bytes() == model

    third = run_job(workspace, *SMALL, "--seed", "1")
    assert third.status == 0, third.errors
    assert list(workspace.glob("hello-pt-*")) == [kept]
    events = {file.relative_to(workspace).parts[0] for file in workspace.rglob("events.out.tfevents.*")}
    assert events == {"hello-pt", kept.name}  # what `tensorboard --logdir WORKSPACE` shows


def test_checkpoint_in_a_run_without_a_result_is_not_lost(workspace):
    checkpoint = workspace / "hello-pt" / "site-1" / "best_local_model.pt"
    checkpoint.parent.mkdir(parents=True)
    torch.save(SimpleNetwork().state_dict(), checkpoint)
    run = run_job(workspace, *SMALL, "--initial_ckpt", str(checkpoint))
    assert run.status == 0, run.errors
    assert list(workspace.glob("hello-pt-*/site-1/best_local_model.pt"))


# ---- One run at a time ----


def test_second_run_in_a_workspace_is_refused_and_one_elsewhere_is_not(workspace):
    first = start_job(workspace, *SMALL, "--num_rounds", "2", "--epochs", "300")
    wait_until(lambda: in_training(workspace), first)
    asked = time.monotonic()
    refused = run_job(workspace, *SMALL)
    assert time.monotonic() - asked < 5
    assert refused.status == 1 and refused.output == ""
    assert refused.errors == (
        f"job.py: error: process {first.pid} (job.py) is at work in {workspace / 'hello-pt'}: "
        "wait for its end, or choose another --workspace\n"
    )
    elsewhere = run_job(workspace.with_name("elsewhere"), *SMALL)
    assert elsewhere.status == 0, elsewhere.errors
    assert finish(first, workspace).status == 0


def test_simulation_of_a_killed_job_is_not_disturbed_and_a_crash_needs_no_cleaning(workspace):
    killed = start_job(workspace, *ENDLESS)
    wait_until(lambda: in_training(workspace), killed)
    killed.kill()
    killed.wait()  # its output stays open: the simulation writes to it
    refused = run_job(workspace, *SMALL)
    assert refused.status == 1 and "(the simulation of a killed job.py) is at work" in refused.errors
    assert trainer(workspace, "site-1").is_running()

    while processes := processes_of(workspace / "hello-pt"):
        for process in processes:
            process.kill()
        psutil.wait_procs(processes, timeout=5)
    after = run_job(workspace, *SMALL)
    assert after.status == 0, after.errors


# ---- A client that dies ends the run ----


@pytest.mark.parametrize(
    "victim, round",
    [("the trainer of site-2", 0), ("the trainer of site-2", 1), ("NVFlare's process of site-2", 0), ("the server", 0)],
)
def test_killed_process_ends_the_run(workspace, victim, round):
    rounds = ["--epochs", "100000"] if round == 0 else MANY_ROUNDS
    job = start_job(workspace, "--train_size", "1000", *rounds)
    wait_until(lambda: in_training(workspace, round), job)
    if victim == "the server":
        newest = max(running(workspace / "hello-pt", "simulator.simulator "), key=psutil.Process.num_threads)
        newest.kill()
    elif victim == "the trainer of site-2":
        trainer(workspace, "site-2").kill()
    else:
        next(iter(running(workspace / "hello-pt", "simulator_worker", "--client site-2"))).kill()
    start = time.monotonic()
    run = finish(job, workspace)
    assert run.status == 1 and time.monotonic() - start < 30
    site = "server" if victim == "the server" else "site-2"
    last = run.errors.splitlines()[-1]
    assert last.startswith(f"job.py: error: {site} failed: ")
    assert last.endswith(f"(see {workspace / 'hello-pt' / site / 'log.txt'})")
    assert Path(last.rpartition("(see ")[2].removesuffix(")")).is_file()
    assert processes_of(workspace / "hello-pt") == []
    assert (workspace / "hello-pt" / MODEL).exists() == (round > 0)


# ---- Stopping is clean ----


def stop(process, number, workspace):
    process.send_signal(number)
    start = time.monotonic()
    run = finish(process, workspace)
    assert time.monotonic() - start < 15
    assert run.status == 128 + number
    assert processes_of(workspace / "hello-pt") == []
    assert "Traceback" not in run.output + run.errors
    return run


SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("seconds", [0.8, 1.6])
def test_stopped_at_the_start(workspace, number, seconds):
    job = start_job(workspace, *SMALL)
    time.sleep(seconds)
    stop(job, number, workspace)


@pytest.mark.parametrize("number", SIGNALS)
def test_stopped_in_training(workspace, number):
    job = start_job(workspace, "--train_size", "1000", *MANY_ROUNDS)
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


# ---- A model is weights and nothing else ----


class Hostile:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_code_in_a_model_that_comes_back_is_not_run(tmp_path):
    model, ran = tmp_path / "app_server" / "FL_global_model.pt", tmp_path / "ran"
    model.parent.mkdir()
    torch.save({"model": Hostile(ran)}, model)
    with pytest.raises(RuntimeError, match="holds more than weights, and was not loaded"):
        summary.check_complete(argparse.Namespace(num_rounds=1), tmp_path, evaluates=False)
    assert not ran.exists()
    torch.load(model, weights_only=False)
    assert ran.exists()  # so it would have been run


# ---- Odd places ----


@pytest.fixture
def small_disk(workspace):
    """Mount a file system of 300 KB as the workspace."""
    workspace.mkdir()
    if subprocess.call(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", workspace]):
        pytest.skip("only root can mount a small disk")
    yield workspace
    subprocess.check_call(["umount", workspace])


def test_full_disk_is_one_clear_error(small_disk):
    run = run_job(small_disk, *SMALL)
    assert (run.status, run.output) == (1, "")
    assert re.fullmatch(r"job\.py: error: the disk of .* is full: make room, .*\n", run.errors)


def test_read_only_workspace_is_refused(small_disk):
    subprocess.check_call(["mount", "-o", "remount,ro", small_disk])
    run = run_job(small_disk, *SMALL)
    assert (run.status, run.output) == (2, "")
    assert run.errors == (
        f"job.py: error: argument --workspace: can't write to '{small_disk}': choose another folder\n"
    )


def test_workspace_of_another_user_is_refused(workspace):
    workspace.mkdir(mode=0o755)
    owner, other = os.getuid(), 65534
    if owner != 0:
        pytest.skip("only root can become another user")
    for user, refused in ((owner, False), (other, True)):
        child = os.fork()
        if child == 0:
            os.setuid(user)
            try:
                guard.workspace_folder(str(workspace))
                os._exit(0)
            except argparse.ArgumentTypeError:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (2 if refused else 0)
