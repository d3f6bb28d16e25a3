"""A run that fails says which site failed and why: real runs, each of which depends on how NVFlare words it."""

import json
import re
import time
from pathlib import Path

import psutil
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from conftest import changed_client, copy_repo, finish, run_job, running, start_job, wait_until
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


def faulty_client(folder: Path, line: str, new: str, script: str = "client.py") -> Path:
    """Write a copy of a client script in which site-2 does something new in front of a line."""
    indent = " " * (len(line) - len(line.lstrip()))
    return changed_client(folder, script, line, f'{indent}if site_name == "site-2":\n{indent}    {new}')


def test_final_evaluation_that_fails_is_no_success(tmp_path):
    line = "            if flare.is_evaluate():"
    fault = f"{line}\n                raise KeyError('no such thing')"
    script = changed_client(tmp_path, "client_with_eval.py", line, fault)
    report = tmp_path / "report.json"
    flags = [*SMALL, "--train_script", str(script), "--json", str(report)]
    run = run_job(tmp_path / "workspace", *flags)
    assert run.status == 1
    assert not report.exists()
    reason = r"KeyError: 'no such thing' \(changed_client.py:\d+\) \(see .*log.txt\)"
    assert re.fullmatch(rf"job\.py: error: site-[12] failed: {reason}\n", run.errors)


def test_client_that_raises_ends_the_run_with_its_site_exception_line_and_log(tmp_path):
    fault = 'raise ValueError(f"it has\\n\\n  {torch.get_num_threads()} threads,\\nno more")'
    script = faulty_client(tmp_path, "            model.load_state_dict(", fault)
    run = run_job(tmp_path / "workspace", *SMALL, "--train_script", str(script))
    threads = max(1, torch.get_num_threads() // 2)  # each of two clients takes its share of the cores
    line = 1 + script.read_text().splitlines().index(f"                {fault}")
    assert run.status == 1
    assert run.errors == (
        f"job.py: error: site-2 failed: ValueError: it has {threads} threads, no more (changed_client.py:{line}) "
        f"(see {run.folder / 'site-2' / 'log.txt'})\n"
    )


def test_client_that_asks_for_input_gets_none(tmp_path):
    script = faulty_client(tmp_path, "            model.load_state_dict(", 'input("Go on? ")')
    run = run_job(tmp_path / "workspace", *SMALL, "--train_script", str(script))
    assert run.status == 1
    assert run.errors.startswith("job.py: error: site-2 failed: EOFError: EOF when reading a line (changed_client.py:")


def test_script_without_the_flags_of_job_py_is_told_what_argparse_said(tmp_path):
    script = tmp_path / "other.py"
    script.write_text(
        "import argparse\nparser = argparse.ArgumentParser()\nparser.add_argument('--lr')\nparser.parse_args()"
    )
    run = run_job(tmp_path / "workspace", *SMALL, "--train_script", str(script))
    said = r"other\.py: error: unrecognized arguments: --epochs 2 --batch_size 16 --seed 0 .*"
    assert run.status == 1
    assert re.fullmatch(
        rf"job\.py: error: site-[12] failed: its script ended with status 2: {said} \(see .*\)\n", run.errors
    )


# ---- What is wrong in a user's own modules ----


@pytest.mark.parametrize(
    "module, line, new, last_line",
    [
        (
            "data.py",
            "    if args.dataset ==",
            '    open("table.csv")',
            r"site-1: FileNotFoundError: .*'table.csv' \(data.py:\d+\)",
        ),
        (
            "model.py",
            "        super().__init__()",
            '        open("words.txt")',
            r"server failed: FileNotFoundError: .*'words.txt' \(model.py:\d+\) \(see .*/server/log.txt\)",
        ),
    ],
    ids=["load_data, in job.py", "the model's constructor, on the server"],
)
def test_exception_in_a_users_own_module_is_one_line(tmp_path, module, line, new, last_line):
    repo = copy_repo(tmp_path / "repo")
    if module == "model.py":
        (repo / "words.txt").write_text("which the server doesn't have")
    source = (repo / module).read_text()
    (repo / module).write_text(source.replace(f"\n{line}", f"\n{new}\n{line}", 1))
    run = run_job(tmp_path / "workspace", *SMALL, repo=repo)
    assert run.status == 1 and "Traceback" not in run.output
    assert re.fullmatch(rf"job\.py: error: {last_line}\n", run.errors)


# ---- A result is a whole result ----


@pytest.mark.parametrize(
    "fault, reason",
    [
        ("weights.pop('fc3.bias')", "its local model lacks fc3.bias"),
        (
            "weights['fc3.bias'] = torch.ones(1_000_000)",
            "its local model's fc3.bias has the shape (1000000,), not (10,)",
        ),
        (
            "weights['fc3.bias'][3] = torch.inf",
            "its local model's fc3.bias isn't finite: training diverged, try a smaller --lr",
        ),
        ("steps = 0", "its NUM_STEPS_CURRENT_ROUND is 0, which is no positive number"),
        ("raise KeyError('no such thing')", "KeyError: 'no such thing' (changed_client.py:"),
    ],
)
def test_site_that_sends_no_whole_model_ends_the_run_and_the_round_before_stays(tmp_path, fault, reason):
    line = "            local_model = flare.FLModel("
    fault = f"\n                if current_round == 1:\n                    {fault}"
    script = faulty_client(tmp_path, line, f"pass{fault}")
    weights = "            weights = model.state_dict()\n            if site_name"
    source = script.read_text().replace("            if site_name", weights)
    script.write_text(source.replace("params=model.state_dict()", "params=weights"))
    run = run_job(tmp_path / "workspace", *SMALL, "--num_rounds", "2", "--train_script", str(script))
    assert run.status == 1
    assert run.errors.startswith(f"job.py: error: site-2 failed: {reason}") and run.errors.count("\n") == 1
    model = torch.load(run.results / "app_server" / "FL_global_model.pt", weights_only=True)
    assert (model["meta_props"]["current_round"], model["meta_props"]["nr_aggregated"]) == (0, 2)


def test_best_model_that_the_other_sites_could_not_load_ends_the_run_with_the_name_of_its_site(tmp_path):
    line = '                flare.send(flare.FLModel(params=best["model"]))'
    fault = """                if site_name == "site-2":
                    best["model"]["fc3.bias"] = torch.ones(11)"""
    script = changed_client(tmp_path, "client_with_eval.py", line, fault)
    run = run_job(tmp_path / "workspace", *SMALL, "--cross_site_eval", "--train_script", str(script))
    assert run.status == 1 and run.errors.count("\n") == 1
    reason = "the best model of site-2 is refused: its local model's fc3.bias has the shape (11,), not (10,)"
    assert run.errors.startswith(f"job.py: error: server failed: ValueError: {reason} (see ")


def test_metrics_and_curves_of_a_site_that_calls_itself_another_stay_its_own(tmp_path):
    fault = """metrics = {"accuracy": 99.0, "loss": 7.0}
                writer.add_scalar("../site-1/forged", 1.0, global_step=0, record_origin="site-1")"""
    script = faulty_client(tmp_path, "            local_model = flare.FLModel(", fault, "client_with_eval.py")
    forged = "{'client_name': 'site-1', 'site_name': 'site-1'} if site_name == 'site-2' else {}"
    script.write_text(script.read_text().replace("meta={", f"meta={{**({forged}), "))
    run = run_job(tmp_path / "workspace", *SMALL, "--train_script", str(script))
    assert (run.status, run.errors) == (0, "")
    assert re.search(r"site-2  round 1/1  reports train_loss .*, accuracy 99, loss 7\n", run.output)
    (record,) = map(json.loads, (run.results / "metrics" / "round_metrics.jsonl").open())
    sites = {site["name"]: {metric["name"]: metric["value"] for metric in site["metrics"]} for site in record["sites"]}
    assert sites["site-2"]["accuracy"] == 99 and sites["site-1"]["accuracy"] < 50 and len(record["sites"]) == 2
    folders = {folder.name: EventAccumulator(str(folder)) for folder in (run.results / "tb_events").iterdir()}
    curves = {site: set(events.Reload().Tags()["scalars"]) for site, events in folders.items()}
    assert curves == {"site-1": set(sites["site-1"]), "site-2": {*sites["site-2"], "../site-1/forged"}}


# ---- A site that takes its time ----


def test_site_that_is_slow_is_named_again_and_again_and_not_ended(tmp_path):
    script = faulty_client(tmp_path, "            model.load_state_dict(", "import time; time.sleep(20)")
    patience = "import support.run; support.run.PATIENCE = 3"
    job = start_job(tmp_path / "workspace", *SMALL, "--train_script", str(script), before=patience)
    run = finish(job, tmp_path / "workspace")
    assert (run.status, run.errors) == (0, "")
    named = re.findall(r"\njob\.py: still waiting for (\S+): at work on round 1 for (\d+) s", run.output)
    waits = [int(seconds) for site, seconds in named if site == "site-2"]
    assert len(waits) >= 2 and waits[-1] - waits[-2] >= 5  # at growing intervals
    assert named[-1][0] == "site-2"
