"""A run is never lost and never hangs: real runs, killed and started on top of each other."""

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import (
    REPO,
    changed_client,
    copy_repo,
    end_all,
    finish,
    run_job,
    running,
    slowed,
    start_job,
    succeed,
    wait_for,
    wait_until,
)
from model import create_model
from reference import distance, fedavg, images_of_sites
from stages import ENDLESS, MANY_ROUNDS, MODEL, SMALL, contents, in_training, trainer

# ---- Earlier results stay ----


def test_next_runs_keep_what_earlier_ones_left_the_failed_ones_too(workspace):
    first = succeed(workspace, *SMALL)
    results = contents(first.folder)
    assert Path(MODEL) in results

    faulty = workspace.parent / "faulty.py"
    faulty.write_text("raise RuntimeError('at once')")
    failed = run_job(workspace, *SMALL, "--train_script", str(faulty))
    assert failed.status == 1
    at_once = rf"site-[12] failed: RuntimeError: at once \(faulty\.py:1\) \(see {failed.folder}/site-[12]/log\.txt\)"
    assert re.fullmatch(rf"job\.py: error: {at_once}(; {at_once})?\n", failed.errors)

    checkpoint = failed.folder / "site-1" / "weights.pt"  # in the folder of a run that failed
    torch.save(create_model(seed=5).state_dict(), checkpoint)
    left = contents(failed.folder)
    foreign = workspace.parent / "foreign"  # on PYTHONPATH, and the same where job.py is started
    foreign.mkdir()
    for module in ("model.py", "data.py", "foreign/model.py", "foreign/data.py"):
        (workspace.parent / module).write_text("raise RuntimeError('taken instead of ours')")
    flags = ["--seed", "1", "--initial_ckpt", str(checkpoint)]
    third = succeed(workspace, *SMALL, *flags, PYTHONPATH=str(foreign))
    kept = sorted(workspace.glob("hello-pt-*"))
    assert [contents(folder) for folder in kept] == [results, left]
    for folder, run in zip(kept, (failed, third)):
        assert re.fullmatch(r"hello-pt-\d{4}-\d\d-\d\d-\d{6}", folder.name)
        assert run.output.count(f"\nThe results of the run before are kept in {folder}\n") == 1
    train_sets = images_of_sites([range(32)] * 2, seed=1, size=32)
    expected = fedavg(train_sets, rounds=1, seed=1, weights=create_model(seed=5).state_dict())
    assert distance(third.weights(), expected) < 1e-6  # trained further

    events = {file.relative_to(workspace).parts[0] for file in workspace.rglob("events.out.tfevents.*")}
    assert events == {"hello-pt", kept[0].name}  # what `tensorboard --logdir WORKSPACE` shows


# ---- Each site starts under its own name ----


def test_sites_that_start_at_the_same_moment_keep_their_names(workspace):
    python = slowed(workspace.parent, ("copy.deepcopy", "do_one_task", "2"))  # between NVFlare's naming and sending
    run = succeed(workspace, *SMALL, "--n_clients", "3", PYTHONPATH=python)
    sites = {"site-1", "site-2", "site-3"}
    assert {folder.name for folder in (run.results / "tb_events").iterdir()} == sites
    for site in sites:
        names = re.findall(r"identity=(site-\d)", (run.folder / site / "log.txt").read_text())
        assert set(names) == {site}


def test_sites_that_start_at_the_same_moment_keep_their_ports(workspace):
    # A site's port is looked for while another site's process starts, which for a moment has all that this process has.
    looked_for = ("socket.socket.listen", "get_open_ports", "2 * random.random()")
    python = slowed(workspace.parent, looked_for, ("os.setsid", "_execute_child", "0.7 * (os.getpid() % 2)"))
    run = finish(start_job(workspace, *SMALL, "--n_clients", "4", PYTHONPATH=python), workspace)
    assert (run.status, run.errors) == (0, "")


# ---- One run at a time ----


def test_second_run_in_a_workspace_is_refused_and_one_elsewhere_is_not(workspace):
    end = workspace.parent / "end"
    line = "            train_loss = train("
    script = changed_client(workspace.parent, "client.py", line, " " * 12 + wait_for(end, indent=12))
    first = start_job(workspace, *SMALL, "--train_script", str(script))
    wait_until(lambda: in_training(workspace), first)
    refused = run_job(workspace, *SMALL)
    assert refused.status == 1 and refused.output == ""
    assert refused.errors == (
        f"job.py: error: another job.py is at work in {workspace / 'hello-pt'}: "
        "wait for its end, or choose another --workspace\n"
    )
    succeed(workspace.with_name("elsewhere"), *SMALL)
    assert first.poll() is None  # so none of them has waited for it
    end.touch()
    assert finish(first, workspace).status == 0


def test_simulation_of_a_killed_job_is_not_disturbed_and_a_crash_needs_no_cleaning(workspace):
    killed = start_job(workspace, *ENDLESS)
    wait_until(lambda: in_training(workspace), killed)
    killed.kill()
    killed.wait()  # its output stays open: the simulation writes to it
    refused = run_job(workspace, *SMALL)
    assert (refused.status, refused.output) == (1, "")
    (number,) = re.findall(
        r"job\.py: error: process (\d+) \(left by a killed job\.py\) is at work in .*\n", refused.errors
    )
    assert int(number) in [process.pid for process in running(workspace / "hello-pt")]
    assert trainer(workspace, "site-1").is_running()

    end_all(workspace.parent)
    succeed(workspace, *SMALL)


# ---- GPUs: without any, NVFlare takes their numbers all the same ----


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="NOT TESTED: NVFlare refuses a second GPU here")
def test_sites_that_share_gpus_take_turns_and_end_well(tmp_path):
    run = run_job(tmp_path / "workspace", *SMALL, "--n_clients", "3", "--gpu", "0,1")
    assert (run.status, run.errors) == (0, "")
    assert run.report()["settings"]["num_threads"] == 2
    assert torch.cuda.is_available() or "\nWARNING: PyTorch finds no GPU here: the sites train on the CPU" in run.output


def test_what_the_simulator_refuses_is_the_reason(workspace):
    unchecked = "import support.arguments; support.arguments.mistakes = lambda args: []"
    run = finish(start_job(workspace, *SMALL, "--gpu", "0,1,2", before=unchecked), workspace)
    assert run.status == 1
    reason = r"server failed: The number of clients \(2\) must be larger than or equal to the number of GPU groups.*"
    assert re.fullmatch(rf"job\.py: error: {reason} \(see {run.folder}/server/log\.txt\)\n", run.errors)


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
    assert (run.status, run.errors) == (1, full(small_disk))
    assert "Traceback" not in run.output and "Logging error" not in run.output and "Done:" not in run.output
    assert running(small_disk) == []


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
def test_closed_pipe_is_one_clear_error_and_the_model_stays(workspace, lines):
    """Who reads the output leaves after some lines, as `| head -1` does: before the run, or in it."""
    job = start_job(workspace, *SMALL)
    for _ in range(lines):
        job.stdout.readline()
    job.stdout.close()
    errors = job.stderr.read()
    assert job.wait() == 1
    assert errors == "job.py: error: can't write to standard output: Broken pipe\n"
    assert running(workspace.parent) == []
    assert (workspace / "hello-pt" / MODEL).exists() == (lines == 12)


def test_full_device_as_output_is_one_clear_error(workspace):
    command = [sys.executable, REPO / "job.py", "--dataset", "synthetic", "--workspace", workspace, *SMALL]
    with open("/dev/full", "w") as full_device:
        run = subprocess.run(command, stdout=full_device, stderr=subprocess.PIPE, text=True)
    assert run.returncode == 1
    assert run.stderr == "job.py: error: can't write to standard output: No space left on device\n"


# ---- Odd environments ----


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
    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    assert "Gr\\xf6\\xdfe/hello-pt" in run.stdout
    assert (tmp_path / "Größe" / "hello-pt" / MODEL).is_file()
