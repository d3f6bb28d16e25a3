"""A run that fails says which site failed and why: real runs, each of which depends on how NVFlare words it."""

import contextlib
import json
import re
import socket
import time
from pathlib import Path

import psutil
import pytest
import torch

from conftest import (
    changed_client,
    copy_repo,
    finish,
    insert,
    replace,
    run_job,
    running,
    slowed,
    start_job,
    succeed,
    wait_for,
    wait_until,
)
from stages import ENDLESS, MANY_ROUNDS, MODEL, SMALL, faulty_client, in_training, scalars, trainer


@pytest.mark.parametrize(
    "victim, round, reason",
    [
        ("the trainer of site-2", 1, "its script was killed"),  # between tasks, NVFlare doesn't say by what
        ("NVFlare's process of site-2", 0, "its process was killed"),
        ("the server", 0, ""),
    ],
)
def test_killed_process_ends_the_run(workspace, victim, round, reason):
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
    assert run.status == 1 and time.monotonic() - start < 50  # NVFlare's own shutdown takes a minute
    site = "server" if victim == "the server" else "site-2"
    last = run.errors.splitlines()[-1]
    assert last.startswith(f"job.py: error: {site} failed: {reason}")
    assert last.endswith(f"(see {workspace / 'hello-pt' / site / 'log.txt'})")
    assert Path(last.rpartition("(see ")[2].removesuffix(")")).is_file()
    assert running(workspace.parent) == []
    assert (workspace / "hello-pt" / MODEL).exists() == (round > 0)


def test_process_that_cannot_start_since_another_program_took_its_port_ends_the_run(workspace):
    job = start_job(workspace, *ENDLESS)
    (process,) = wait_until(lambda: running(workspace / "hello-pt", "simulator_worker", "--client site-2"), job)
    words = process.cmdline()
    with socket.create_server(("localhost", int(words[words.index("--port") + 1]))):  # NVFlare connects, and waits
        run = finish(job, workspace)
    log = workspace / "hello-pt" / "site-2" / "log.txt"
    in_use = r"OSError: \[Errno \d+\] Address already in use"
    assert run.status == 1
    assert re.fullmatch(rf"job\.py: error: site-2 failed: {in_use} \(see {log}\)\n", run.errors)
    assert running(workspace.parent) == []


def test_processes_that_cannot_reach_the_server_in_nvflares_ten_seconds_end_the_run(workspace):
    python = slowed(workspace.parent, ("time.time", "_create_client", "3"))  # before a process connects
    job = start_job(workspace, *ENDLESS, PYTHONPATH=python)
    log = workspace / "hello-pt" / "site-2" / "log.txt"
    wait_until(lambda: log.exists() and "ClientTaskWorker started to run" in log.read_text(), job)
    busy = max(running(workspace / "hello-pt", "simulator.simulator "), key=psutil.Process.num_threads)
    busy.suspend()  # as on a computer that is too busy
    time.sleep(15)
    with contextlib.suppress(psutil.NoSuchProcess):  # job.py may have ended it
        busy.resume()
    run = finish(job, workspace)
    assert run.status == 1
    reason = r"RuntimeError: Could not connect to the server cell\."
    assert re.fullmatch(rf"job\.py: error: site-[12] failed: {reason} \(see .*/site-[12]/log\.txt\)\n", run.errors)
    assert running(workspace.parent) == []


def test_client_that_raises_ends_the_run_with_its_site_exception_line_and_log(tmp_path):
    fault = 'raise ValueError(f"it has\\n\\n  {torch.get_num_threads()} threads,\\nno more")'
    script = faulty_client(tmp_path, "site-2", "            model.load_state_dict(", fault)
    run = run_job(tmp_path / "workspace", *SMALL, "--train_script", str(script))
    threads = max(1, torch.get_num_threads() // 2)  # each of two clients takes its share of the cores
    line = 1 + script.read_text().splitlines().index(f"                {fault}")
    assert run.status == 1
    assert run.errors == (
        f"job.py: error: site-2 failed: ValueError: it has {threads} threads, no more (changed_client.py:{line}) "
        f"(see {run.folder / 'site-2' / 'log.txt'})\n"
    )


def test_evaluation_that_fails_on_all_sites_is_no_success_even_if_nvflare_ends_well(tmp_path):
    line = "                flare.send(flare.FLModel(metrics=metrics))"
    script = changed_client(tmp_path, "client_with_eval.py", line, f"{' ' * 16}raise ValueError('no such thing')")
    patient = "import support.simulation; support.simulation.PATIENCE = 600"
    job = start_job(tmp_path / "workspace", *SMALL, "--train_script", str(script), before=patient)
    run = finish(job, tmp_path / "workspace")
    assert run.status == 1 and "Done:" not in run.output
    reason = r"failed: ValueError: no such thing \(changed_client\.py:\d+\)"
    assert re.match(rf"job\.py: error: site-. {reason} .*; site-. {reason}", run.errors)
    (lost,) = run.folder.glob("server/**/lost_sites.json")
    assert "the task validate" in lost.read_text()


# ---- What is wrong in a user's own modules, where only a run finds it ----


def test_exception_in_a_users_own_model_on_the_server_is_one_line(tmp_path):
    repo = copy_repo(tmp_path / "repo")
    (repo / "words.txt").write_text("which the server doesn't have")
    insert(repo / "model.py", "        super().__init__()\n", '        open("words.txt")\n')
    run = run_job(tmp_path / "workspace", *SMALL, repo=repo)
    assert run.status == 1 and "Traceback" not in run.output
    reason = r"FileNotFoundError: .*'words.txt' \(model.py:\d+\) \(see .*/server/log.txt\)"
    assert re.fullmatch(rf"job\.py: error: server failed: {reason}\n", run.errors)


# ---- A result is a whole result ----


@pytest.mark.parametrize(
    "fault, reason",
    [
        (
            "weights['fc3.bias'][3] = torch.inf",
            "its local model's fc3.bias isn't finite: training diverged, try a smaller --lr",
        ),
        ("steps = 0", "its NUM_STEPS_CURRENT_ROUND is 0: it must be above 0 (and below 2**53)"),
        ("raise KeyError('no such thing')", "KeyError: 'no such thing' (changed_client.py:"),
    ],
)
def test_site_that_sends_no_whole_model_ends_the_run_and_the_round_before_stays(tmp_path, fault, reason):
    line = "            local_model = flare.FLModel("
    fault = f"if current_round == 1:\n                    {fault}"
    script = faulty_client(tmp_path, "site-2", line, fault)
    insert(script, "            import os\n", "            weights = model.state_dict()\n")
    replace(script, "params=model.state_dict()", "params=weights")
    run = run_job(tmp_path / "workspace", *SMALL, "--num_rounds", "2", "--train_script", str(script))
    assert run.status == 1
    assert run.errors.startswith(f"job.py: error: site-2 failed: {reason}") and run.errors.count("\n") == 1
    model = torch.load(run.results / "app_server" / "FL_global_model.pt", weights_only=True)
    assert (model["meta_props"]["current_round"], model["meta_props"]["nr_aggregated"]) == (0, 2)


def test_local_model_that_the_other_sites_could_not_load_ends_the_run_with_the_name_of_its_site(tmp_path):
    line = "                flare.send(flare.FLModel(params=params))"
    fault = 'params["fc3.bias"] = torch.ones(11)'
    script = faulty_client(tmp_path, "site-2", line, fault, "client_with_eval.py")
    run = run_job(tmp_path / "workspace", *SMALL, "--cross_site_eval", "--train_script", str(script))
    assert run.status == 1 and run.errors.count("\n") == 1
    reason = "its local model's fc3.bias has the shape (11,), not (10,)"
    log = run.folder / "site-2" / "log.txt"
    assert run.errors == f"job.py: error: site-2 failed: {reason} (see {log})\n"


def test_metrics_and_curves_of_a_site_that_calls_itself_another_stay_its_own(tmp_path):
    fault = """metrics = {"accuracy": 99.0, "loss": 7.0}
                writer.add_scalar("../site-1/forged", 1.0, global_step=0, record_origin="site-1")"""
    line = "            local_model = flare.FLModel("
    script = faulty_client(tmp_path, "site-2", line, fault, "client_with_eval.py")
    forged = "{'client_name': 'site-1', 'site_name': 'site-1'} if site_name == 'site-2' else {}"
    replace(script, "meta={", f"meta={{**({forged}), ")
    run = succeed(tmp_path / "workspace", *SMALL, "--train_script", str(script))
    assert re.search(r"site-2  round 1/1  reports train_loss .*, accuracy 99\.00, loss 7\.000\n", run.output)
    (record,) = map(json.loads, (run.results / "metrics" / "round_metrics.jsonl").open())
    sites = {site["name"]: {metric["name"]: metric["value"] for metric in site["metrics"]} for site in record["sites"]}
    assert sites["site-2"]["accuracy"] == 99 and sites["site-1"]["accuracy"] < 50 and len(record["sites"]) == 2
    curves = {folder.name: set(scalars(run, folder.name)) for folder in (run.results / "tb_events").iterdir()}
    assert curves == {"site-1": set(sites["site-1"]), "site-2": {*sites["site-2"], "../site-1/forged"}}


# ---- A site that takes its time ----


def test_site_that_is_slow_is_named_again_and_again_and_not_ended(tmp_path):
    wait = wait_for(tmp_path / "end", indent=16)
    script = faulty_client(tmp_path, "site-2", "            model.load_state_dict(", wait)
    patience = "import support.recipe; support.recipe.NAME_SLOW_AFTER = 3"
    job = start_job(tmp_path / "workspace", *SMALL, "--train_script", str(script), before=patience)
    slow = r"still waiting for site-2: at work on round 1/1 for (\d+) s\n"
    waits = []
    for line in job.stdout:
        waits += map(int, re.findall(slow, line))
        if len(waits) == 3:
            (tmp_path / "end").touch()
    run = finish(job, tmp_path / "workspace")
    assert (run.status, run.errors) == (0, "")
    assert waits[2] - waits[1] >= 5  # at growing intervals
