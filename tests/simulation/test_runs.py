"""A run is never lost and never hangs: real runs, killed and started on top of each other."""

import re
import subprocess
import sys
import time

import pytest
import torch

from conftest import REPO, end_all, finish, run_job, start_job, wait_until
from model import create_model
from reference import distance, fedavg, images_of_sites
from stages import ENDLESS, MODEL, SMALL, in_training, trainer

# ---- Earlier results stay ----


def test_next_runs_keep_results_and_checkpoints_but_nothing_of_a_run_without_any(workspace):
    first = run_job(workspace, *SMALL)
    assert first.status == 0, first.errors
    model = (workspace / "hello-pt" / MODEL).read_bytes()

    faulty = workspace.parent / "faulty.py"
    faulty.write_text("raise RuntimeError('at once')")
    for i in range(2):
        failed = run_job(workspace, *SMALL, "--train_script", str(faulty))
        assert failed.status == 1
        assert "site-" in failed.errors and "RuntimeError: at once" in failed.errors
        (kept,) = workspace.glob("hello-pt-*")  # not the first failed run
        assert (f"The results of the run before are kept in {kept}" in failed.output) == (i == 0)
        assert (kept / MODEL).read_bytes() == model

    checkpoint = workspace / "hello-pt" / "site-1" / "weights.pt"  # in the folder of the run that failed
    torch.save(create_model(seed=5).state_dict(), checkpoint)
    third = run_job(workspace, *SMALL, "--seed", "1", "--initial_ckpt", str(checkpoint))
    assert third.status == 0, third.errors
    assert len(list(workspace.glob("hello-pt-*/site-1/weights.pt"))) == 1
    train_sets = images_of_sites([range(32)] * 2, seed=1, size=32)
    expected = fedavg(train_sets, rounds=1, seed=1, weights=create_model(seed=5).state_dict())
    assert distance(third.weights(), expected) < 1e-6  # trained further

    events = {file.relative_to(workspace).parts[0] for file in workspace.rglob("events.out.tfevents.*")}
    assert events == {"hello-pt", kept.name}  # what `tensorboard --logdir WORKSPACE` shows


# ---- One run at a time ----


def test_second_run_in_a_workspace_is_refused_and_one_elsewhere_is_not(workspace):
    first = start_job(workspace, *SMALL, "--num_rounds", "2", "--epochs", "300")
    wait_until(lambda: in_training(workspace), first)
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", "import job"], cwd=REPO, check=True)
    imported = time.monotonic()
    refused = run_job(workspace, *SMALL)
    assert time.monotonic() - imported < 2 * (imported - start) + 2  # so right after the imports, on a busy machine too
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

    end_all(workspace.parent)
    after = run_job(workspace, *SMALL)
    assert after.status == 0, after.errors


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
