"""A run that fails says which site failed and why: real runs, each of which depends on how NVFlare words it."""

import re
import time
from pathlib import Path

import psutil
import pytest
import torch

from conftest import changed_client, finish, run_job, running, start_job, wait_until
from stages import ENDLESS, MANY_ROUNDS, MODEL, SMALL, in_training, trainer


@pytest.mark.parametrize(
    "victim, round",
    [("the trainer of site-2", 0), ("the trainer of site-2", 1), ("NVFlare's process of site-2", 0), ("the server", 0)],
)
def test_killed_process_ends_the_run(workspace, victim, round):
    job = start_job(workspace, *(ENDLESS if round == 0 else MANY_ROUNDS))
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
    assert running(workspace.parent) == []
    assert (workspace / "hello-pt" / MODEL).exists() == (round > 0)


def test_final_evaluation_that_fails_is_no_success(tmp_path):
    line = "            if flare.is_evaluate():"
    fault = f"{line}\n                raise KeyError('no such thing')"
    script = changed_client(tmp_path, "client_with_eval.py", line, fault)
    report = tmp_path / "report.json"
    flags = [*SMALL, "--train_script", str(script), "--json", str(report)]
    run = run_job(tmp_path / "workspace", *flags)
    assert run.status == 1
    assert not report.exists()
    assert re.fullmatch(r"job\.py: error: site-[12] failed: KeyError: 'no such thing' \(see .*log.txt\)\n", run.errors)


def test_client_that_raises_ends_the_run_with_its_site_exception_and_log(tmp_path):
    fault = 'raise ValueError(f"{site_name} has {torch.get_num_threads()} threads")'
    condition = '            if site_name == "site-2":'
    script = changed_client(
        tmp_path, "client.py", "            model.load_state_dict(", f"{condition}\n                {fault}"
    )
    run = run_job(tmp_path / "workspace", *SMALL, "--train_script", str(script))
    threads = max(1, torch.get_num_threads() // 2)  # each of two clients takes its share of the cores
    assert run.status == 1
    assert run.errors == (
        f"job.py: error: site-2 failed: ValueError: site-2 has {threads} threads "
        f"(see {run.folder / 'site-2' / 'log.txt'})\n"
    )
