"""A run is never lost and never hangs: real runs, killed and started on top of each other."""

import contextlib
import os
import re
import shlex
import subprocess
import sys
import time

import pytest
import torch

from conftest import REPO, copy_repo, end_all, finish, run_job, running, start_job, wait_until
from model import create_model
from reference import distance, fedavg, images_of_sites
from stages import ENDLESS, MANY_ROUNDS, MODEL, SMALL, in_training, trainer

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

    (workspace / "hello-pt" / "site-1" / "notes.txt").write_text("in the folder of the run that failed")
    checkpoint = workspace / "hello-pt" / "site-1" / "weights.pt"
    torch.save(create_model(seed=5).state_dict(), checkpoint)
    foreign = workspace.parent / "foreign"  # on PYTHONPATH, and the same where job.py is started
    foreign.mkdir()
    for module in ("model.py", "data.py", "foreign/model.py", "foreign/data.py"):
        (workspace.parent / module).write_text("raise RuntimeError('taken instead of ours')")
    flags = ["--seed", "1", "--initial_ckpt", str(checkpoint)]
    third = run_job(workspace, *SMALL, *flags, PYTHONPATH=str(foreign))
    assert third.status == 0, third.errors
    assert len(list(workspace.glob("hello-pt-*/site-1/weights.pt"))) == 1
    assert len(list(workspace.glob("hello-pt-*/site-1/notes.txt"))) == 1
    train_sets = images_of_sites([range(32)] * 2, seed=1, size=32)
    expected = fedavg(train_sets, rounds=1, seed=1, weights=create_model(seed=5).state_dict())
    assert distance(third.weights(), expected) < 1e-6  # trained further

    events = {file.relative_to(workspace).parts[0] for file in workspace.rglob("events.out.tfevents.*")}
    assert events == {"hello-pt", kept.name}  # what `tensorboard --logdir WORKSPACE` shows


# ---- One run at a time ----


def test_second_run_in_a_workspace_is_refused_and_one_elsewhere_is_not(workspace):
    first = start_job(workspace, *SMALL, "--num_rounds", "2", "--epochs", "900")
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
def small_disk(workspace, request):
    """Mount a file system of 300 KB, or of another size, as the workspace."""
    workspace.mkdir()
    if subprocess.call(["mount", "-t", "tmpfs", "-o", f"size={getattr(request, 'param', '300k')}", "tmpfs", workspace]):
        pytest.skip("only root can mount a small disk")
    yield workspace
    end_all(workspace)
    subprocess.check_call(["umount", workspace])


def test_full_disk_is_one_clear_error(small_disk):
    run = run_job(small_disk, *SMALL)
    assert (run.status, run.output) == (1, "")
    assert run.errors == full(small_disk)


def full(disk):
    return f"job.py: error: the disk of {disk} is full: make room, or choose another --workspace\n"


@pytest.mark.parametrize("small_disk", ["20m"], indirect=True)
def test_disk_that_fills_up_during_a_run_is_one_clear_error_and_the_rounds_before_stay(small_disk):
    job = start_job(small_disk, *MANY_ROUNDS)
    wait_until(lambda: in_training(small_disk, round=1), job)
    with contextlib.suppress(OSError), open(small_disk / "thesis", "wb", buffering=0) as thesis:
        while True:
            thesis.write(bytes(4096))
    run = finish(job, small_disk)
    assert (run.status, run.errors) == (1, full(small_disk))
    assert "Traceback" not in run.output and "Logging error" not in run.output
    assert running(small_disk) == []
    assert run.weights() and list(run.folder.rglob("*.tmp")) == []


def test_limit_on_the_size_of_files_is_one_clear_error(workspace):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"
    run = finish(start_job(workspace, *SMALL, before=limit), workspace)
    assert run.status == 1 and "Traceback" not in run.output
    assert re.fullmatch(r"job\.py: error: server failed: OSError: \[Errno 27\] File too large \(see .*\)\n", run.errors)
    assert list(run.folder.rglob("*.tmp")) == []


def test_read_only_workspace_is_refused(small_disk):
    subprocess.check_call(["mount", "-o", "remount,ro", small_disk])
    run = run_job(small_disk, *SMALL)
    assert (run.status, run.output) == (2, "")
    assert run.errors == (
        f"job.py: error: argument --workspace: can't write to '{small_disk}': choose another folder\n"
    )


@pytest.mark.parametrize("lines", [0, 1, 12])
def test_closed_pipe_ends_the_run_and_names_standard_output(workspace, lines):
    """Who reads the output leaves after some lines, as `| head -1` does: before the run, or in it."""
    job = start_job(workspace, *ENDLESS)
    for _ in range(lines):
        job.stdout.readline()
    job.stdout.close()
    errors = job.stderr.read()
    assert job.wait() == 1
    assert errors == "job.py: error: can't write to standard output: Broken pipe\n"
    assert running(workspace.parent) == []


def test_full_device_as_output_is_one_clear_error(workspace):
    command = [sys.executable, REPO / "job.py", "--dataset", "synthetic", "--workspace", workspace, *SMALL]
    with open("/dev/full", "w") as full_device:
        run = subprocess.run(command, stdout=full_device, stderr=subprocess.PIPE, text=True)
    assert run.returncode == 1
    assert run.stderr == "job.py: error: can't write to standard output: No space left on device\n"


# ---- Odd environments ----


def test_run_that_nobody_sees_or_answers(workspace):
    """All three standard streams are closed."""
    command = [sys.executable, REPO / "job.py", "--dataset", "synthetic", "--workspace", workspace, *SMALL]
    shell = f"exec {shlex.join(map(str, command))} <&- >&- 2>&-"
    assert subprocess.call(["bash", "-c", shell], cwd=workspace.parent) == 0
    assert (workspace / "hello-pt" / MODEL).is_file()


@pytest.fixture
def read_only_copy(tmp_path):
    """The program in a folder that can't be written, and whose name is a link's."""
    repo = copy_repo(tmp_path / "copy")
    link = tmp_path / "link"
    link.symlink_to(repo)
    if subprocess.call(["mount", "--bind", "-o", "ro", repo, repo]):
        pytest.skip("only root can mount a folder as read-only")
    yield link
    subprocess.check_call(["umount", repo])


def test_run_in_an_odd_environment(read_only_copy, tmp_path):
    """A read-only copy, run by a Python that leaves out assertions, with hardly an environment."""
    (tmp_path / "Größe").mkdir()
    command = [
        sys.executable,
        "-O",
        read_only_copy / "job.py",
        "--dataset",
        "synthetic",
        "--workspace",
        "Größe",
        *SMALL,
    ]
    env = {"PATH": os.environ["PATH"], "TMPDIR": "/no/such/folder", "PYTHONIOENCODING": "ascii"}
    refused = subprocess.run(
        [*command, "--json", read_only_copy / "report.json"], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert (refused.returncode, refused.stdout) == (2, "")
    assert re.fullmatch(r"job\.py: error: argument --json: can't write to .*: choose another folder\n", refused.stderr)

    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    assert "Gr\\xf6\\xdfe/hello-pt" in run.stdout
    assert (tmp_path / "Größe" / "hello-pt" / MODEL).is_file()
