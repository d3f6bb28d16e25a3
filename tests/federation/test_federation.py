"""job.py on a server and sites of their own, poc and prod: the same as in a simulation, and when it goes wrong."""

import itertools
import json
import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch

from cifar10 import BATCHES_FOLDER
from conftest import (
    changed_client,
    copy_repo,
    end_all,
    finish,
    run_job,
    running,
    start_job,
)
from documentation import command
from provisioned import BIN, LEAD, PARTICIPANTS, SITES, Federation, prod
from reference import distance
from wine import EVALUATE, OWN_FLAG, copy_with_wine, expected_wine

SMALL = ["--train_size", "64", "--test_size", "100"]
EVALUATED = [*SMALL, "--train_script", "client_with_eval.py", "--cross_site_eval"]
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
FAULT = "            model.load_state_dict(", "            raise ValueError('no such thing')"
POC = command("docs/real-sites.md", "--env poc")
PROVISION = command("docs/real-sites.md", "nvflare provision")
LET_READ_LOGS = command("docs/real-sites.md", "get_job_log")
START_SERVER = command("docs/real-sites.md", "server/startup/start.sh")
START_SITES = command("docs/real-sites.md", "site-1/startup/start.sh")
SUBMIT = command("docs/real-sites.md", "--env prod")
LIST = command("docs/real-sites.md", "nvflare job list")
FORBID = command("docs/real-sites.md", "o:north")
STOP_SITE = command("docs/real-sites.md", "shutdown client")
EXPORT = command("docs/real-sites.md", "--export")
SUBMIT_EXPORTED = command("docs/real-sites.md", "nvflare job submit")
SHUTDOWN = command("docs/real-sites.md", "shutdown all")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return tmp_path_factory.mktemp("images")


@pytest.fixture(scope="module")
def simulated(tmp_path_factory, online, images):
    workspace = tmp_path_factory.mktemp("sim") / "workspace"
    flags = [*SMALL, "--n_clients", "3", "--dataset", "auto", "--data_root", str(images)]
    run = run_job(workspace, *flags, **online, **ONE_THREAD)
    assert run.status == 0, run.errors
    return run.weights()


def equal(weights, others):
    """Tell whether weights are the same but for the last bits, since three sites' are added as they arrive."""
    return distance(weights, others) < 1e-5


# ---- POC: before the federation, which takes the same port ----


def test_poc_ends_in_the_same_model_and_summary(simulated, online, images, tmp_path):
    flags = ["--dataset", "auto", *POC.split()[2:], *EVALUATED, "--n_clients", "3"]
    for site in SITES:
        shutil.copytree(images / BATCHES_FOLDER, images / site / BATCHES_FOLDER)
    run = run_job(tmp_path / "workspace", *flags, "--data_root", f"{images}/{{site}}", **online, **ONE_THREAD)
    assert (run.status, run.errors) == (0, "")
    assert equal(run.weights(), simulated)
    assert all((images / site / "cifar10-uint8.pt").exists() for site in SITES)
    assert "Data: cifar10, 64 training samples a site, 100 test samples." in run.output
    assert {folder.name for folder in (run.results / "tb_events").iterdir()} == set(SITES)
    assert f"tensorboard --logdir {run.results / 'tb_events'}" in run.output
    assert (run.folder / "poc").stat().st_mode & 0o077 == 0  # its certificate authority's key is in there
    assert not running(run.folder.parent)


def test_own_model_and_data_run_in_poc_too(tmp_path):
    repo = copy_with_wine(tmp_path / "repo")
    run = run_job(tmp_path / "workspace", *POC.split()[2:], *EVALUATE, *OWN_FLAG, repo=repo, **ONE_THREAD)
    assert (run.status, run.errors) == (0, "")
    assert distance(run.weights(), expected_wine(rounds=2)) < 1e-6
    assert "loss" in run.output.partition("The best is ")[2]


FAILED = r"ValueError: no such thing \(changed_client.py:\d+\)"
LEFT_OUT = rf"was left out from round 1/2 on \({FAILED}\)"


@pytest.mark.parametrize(
    "flags, last_line",
    [
        ([], rf"site-[12] failed: {FAILED} \(see .*log.txt\)"),
        (["--min_sites", "1"], rf"site-1 {LEFT_OUT}; site-2 {LEFT_OUT} \(the results so far: .*\)"),
    ],
)
def test_poc_that_fails_names_site_and_reason_and_stops_its_services(tmp_path, flags, last_line):
    script = changed_client(tmp_path, "client.py", *FAULT)
    run = run_job(tmp_path / "workspace", *SMALL, "--env", "poc", *flags, "--train_script", str(script))
    assert run.status == 1
    assert re.fullmatch(rf"job\.py: error: {last_line}\n", run.errors)
    assert not running(run.folder.parent)


@pytest.mark.parametrize(
    "number, line, left",
    [
        (signal.SIGINT, "Submitted job", "no round was complete"),
        (signal.SIGTERM, "round 2/100000  begins", "the rounds before are in {folder}"),
    ],
)
def test_signal_stops_the_services_of_poc(tmp_path, number, line, left):
    process = start_job(tmp_path / "workspace", *SMALL, "--env", "poc", "--num_rounds", "100000")
    assert any(line in printed for printed in process.stdout)
    process.send_signal(number)
    run = finish(process, tmp_path / "workspace")
    assert run.status == 128 + number
    assert run.errors.splitlines()[-1] == f"job.py: stopped; {left.format(folder=run.folder)}"
    assert any(run.folder.glob("poc/**/FL_global_model.pt")) == (number == signal.SIGTERM)
    assert not running(run.folder.parent)


# ---- The provisioned federation, made, started and used by the commands of docs/real-sites.md ----


@pytest.fixture(scope="module")
def federation(tmp_path_factory, online):
    """A federation each of whose sites has a folder of its own for CIFAR-10, and whose site-3 streams no logs."""
    federation = Federation(tmp_path_factory.mktemp("federation"))
    try:
        federation.run(PROVISION)
        federation.use_own_job_store()
        federation.run(LET_READ_LOGS)
        resources = federation.kit("site-3") / "local" / "resources.json.default"
        allowed = resources.read_text()
        assert '"allow_log_streaming": true' in allowed
        resources.with_suffix("").write_text(
            allowed.replace('"allow_log_streaming": true', '"allow_log_streaming": false')
        )
        federation.run(START_SERVER)
        federation.run(START_SITES, **online)
        for participant in PARTICIPANTS:
            federation.wait_until_ready(participant)
        yield federation
        federation.run(SHUTDOWN)
        wait_for_end(federation)
    finally:
        end_all(federation.folder)


def wait_for_end(federation: Federation, *words: str) -> None:
    """Wait until no process of the federation has these words on its command line."""
    end = time.monotonic() + 60
    while left := running(federation.folder, *words):
        assert time.monotonic() < end, f"there still is {left}"
        time.sleep(0.5)


def nvflare_job(federation: Federation, *arguments: str | Path, person: str = LEAD) -> dict:
    """Run an `nvflare job` command; return what it says."""
    command = [BIN / "nvflare", "--format", "json", "job", *arguments, "--startup-kit", federation.kit(person)]
    done = subprocess.run(command, env=federation.environment, timeout=200, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def run(federation, tmp_path_factory):
    """The page's job, made small."""
    flags = shlex.split(federation.here(SUBMIT))
    assert flags[:2] == ["python", "job.py"]
    workspace = tmp_path_factory.mktemp("prod") / "workspace"
    return run_job(workspace, "--dataset", "auto", *flags[2:], *EVALUATED, "--json", str(workspace / "report.json"))


def test_prod_ends_in_the_same_model(run, simulated):
    assert (run.status, run.errors) == (0, "")
    assert equal(run.weights(), simulated)


def test_prod_shows_the_rounds_and_what_the_sites_print_unless_they_stream_no_log(run):
    for i in (1, 2):
        assert f"\nround {i}/2  begins\n" in run.output and f"\nround {i}/2  averaged 3 local models\n" in run.output
        for site in SITES:
            assert re.search(rf"\n{site}  round {i}/2  reports train_loss 2\.\d+, accuracy .*, loss .*\n", run.output)
            epochs = re.findall(rf"\n{site}  round {i}/2  epoch [12]/2  loss 2\.\d{{4}}  \d+ s(?=\n)", run.output)
            assert len(epochs) == (0 if site == "site-3" else 2)
    assert run.output.count("site-3 sends no log, which its operator may have forbidden") == 1
    assert "site-1 sends no log" not in run.output


def test_models_metrics_and_curves_come_back(run, federation):
    report = json.loads((run.folder.parent / "report.json").read_text())
    for file in report["paths"]["models"]:
        assert torch.load(file, weights_only=True)["model"]
    assert len(report["rounds"]) == 2 and set(report["rounds"][0]) == set(SITES)
    for model in ("FL_global_model.pt", "best_FL_global_model.pt", *SITES):
        assert set(report["models"][model]) == set(SITES)
    assert {folder.name for folder in (run.results / "tb_events").iterdir()} == set(SITES)
    assert "Done: 2 rounds on 3 sites." in run.output and "Data: cifar10, each site's own." in run.output
    assert not any((federation.kit(LEAD) / "transfer").iterdir())  # moved to the workspace


def test_each_site_used_its_own_images(run, federation):
    for site in SITES:
        assert (federation.folder / f"images-of-{site}" / "cifar10-uint8.pt").exists()


def test_results_are_writable_by_their_owner_alone_and_hold_no_key(run):
    for path in (run.folder.parent, *run.folder.parent.rglob("*")):
        assert path.stat().st_mode & 0o002 == 0, path
        assert not path.is_file() or b"PRIVATE KEY" not in path.read_bytes(), path


@pytest.mark.parametrize(
    "site, reason",
    [
        ("site-1", r"ValueError: no such thing \(changed_client.py:\d+\) \(see .*/site-1/log.json\)"),
        ("site-3", r"EXECUTION_EXCEPTION, of which its own log says more \(see .*/log.txt\)"),  # streams none
    ],
)
def test_client_that_raises_ends_the_job_with_its_site_and_the_reason_if_that_is_known(
    federation, tmp_path, site, reason
):
    fault = f"{' ' * 12}if site_name == '{site}':\n{' ' * 16}raise ValueError('no such thing')"
    script = changed_client(tmp_path, "client.py", FAULT[0], fault)
    run = run_job(tmp_path / "workspace", *prod(federation), *SMALL, "--train_script", str(script))
    assert run.status == 1
    assert re.fullmatch(rf"job\.py: error: {site} failed: {reason}\n", run.errors)
    assert Path(run.errors.rpartition("(see ")[2].removesuffix(")\n")).is_file()


def test_operator_finds_the_jobs_code_command_submitter_and_log_at_the_site_after_its_end(run, federation):
    site = federation.kit("site-3")
    job = site / run.results.parent.name  # its ID
    assert "epoch 2/2" in (job / "log.txt").read_text()
    code = {file.name for file in (job / "app_site-3" / "custom").iterdir()}
    assert code >= {"client_with_eval.py", "data.py", "model.py", "cifar10.py"}
    assert "$CIFAR10" in (job / "app_site-3" / "config" / "config_fed_client.json").read_text()
    assert LEAD in (job / "meta.json").read_text()
    assert f"[U:{LEAD}][A:train.deploy]" in (site / "audit.log").read_text()


def test_ctrl_c_ends_job_py_and_not_the_job_which_the_right_people_see_and_abort(federation, tmp_path):
    known = federation.logs("server")
    process = start_job(tmp_path / "workspace", *prod(federation), *SMALL, "--num_rounds", "100000")
    lines = itertools.takewhile(lambda line: "round 20/" not in line, process.stdout)  # while the job runs
    assert any(line.startswith("site-1  round 2/100000  epoch 2/2  loss ") for line in lines)
    assert listening_on_the_network(federation) == {("server", 8002)}
    process.send_signal(signal.SIGINT)
    run = finish(process, tmp_path / "workspace")
    assert run.status == 130
    job_id = re.fullmatch(r"job\.py: stopped; the federation goes on with job (\S+)\n", run.errors)[1]
    (log,) = federation.logs("server") - known
    latest = int(re.findall(r"Round (\d+) started", log.read_text())[-1])
    federation.wait_for("server", f"Round {latest + 1} started", known)

    assert job_id in federation.run(LIST)  # as a guest
    for person in ("guest@north.org", "operator@north.org"):  # not of the submitter's organization
        assert nvflare_job(federation, "abort", job_id, "--force", person=person)["error_code"] == "AUTH_FAILED"
    assert nvflare_job(federation, "abort", job_id, "--force", person="operator@south.org")["status"] == "ok"
    wait_for_end(federation, job_id)


def listening_on_the_network(federation: Federation) -> set[tuple[str, int]]:
    """Return the ports of the federation's processes that other machines can reach, each with its participant."""
    found = set()
    for process in running(federation.folder, "prod_00"):
        participant = re.search(r"prod_00/([\w-]+)", " ".join(process.cmdline()))[1]
        for connection in process.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and not connection.laddr.ip.startswith(("127.", "::1")):
                found.add((participant, connection.laddr.port))
    return found


def test_exported_job_runs_in_the_simulator_and_on_the_federation(federation, tmp_path, simulated):
    repo = copy_repo(tmp_path / "repo")
    export = EXPORT.replace("--n_clients 3", f"--n_clients 3 {' '.join(SMALL)}")
    export = export.replace("/tmp/nvflare/data", f"{federation.folder}/images-of-site-1")
    federation.run(export.replace("/tmp/nvflare/exported", f"{tmp_path}/exported"), folder=repo)
    model = "app_server/FL_global_model.pt"
    weights = torch.load(tmp_path / "exported" / "server" / "simulate_job" / model, weights_only=True)["model"]
    assert equal(weights, simulated)

    submitted = federation.run(SUBMIT_EXPORTED, folder=repo)
    job_id = re.search(r"[0-9a-f]{8}-[0-9a-f-]{27}", submitted)[0]
    assert nvflare_job(federation, "wait", job_id)["data"]["status"] == "FINISHED:COMPLETED"
    nvflare_job(federation, "download", job_id, "-o", tmp_path / "downloaded")
    weights = torch.load(tmp_path / "downloaded" / job_id / "workspace" / model, weights_only=True)["model"]
    assert equal(weights, simulated)


def test_site_runs_no_code_that_its_operator_forbids(federation, tmp_path, online):
    federation.run(FORBID)
    federation.run(STOP_SITE)
    wait_for_end(federation, "prod_00/site-1")
    federation.start("site-1")
    run = run_job(tmp_path / "workspace", *prod(federation), *SMALL)
    assert run.status == 1
    assert re.fullmatch(
        r"job\.py: error: job \S+ ended as FINISHED:FAILED_TO_RUN: site-1: NVFLARE_ERROR: BYOC not permitted.*\n",
        run.errors,
    )


def test_wrong_kits_people_without_the_right_too_few_sites_and_a_server_that_does_not_answer_end_in_one_line(
    federation, tmp_path
):
    stranger, silent = Federation(tmp_path / "stranger"), Federation(tmp_path / "silent")
    stranger.provision("localhost")  # whose certificates this federation doesn't know
    silent.provision("localhost.invalid")
    accidents = [
        (tmp_path / "none", [], "is not an admin's startup kit"),
        (federation.kit("site-1"), [], "is not an admin's startup kit"),
        (stranger.kit(LEAD), [], "no connection to the federation, or refused by it"),
        (silent.kit(LEAD), [], "no connection to the federation, or refused by it"),
        (federation.kit("guest@north.org"), [], "'guest@north.org' is not authorized for 'submit_job'"),
        (federation.kit("operator@south.org"), [], "'operator@south.org' is not authorized for 'submit_job'"),
        (federation.kit(LEAD), ["--n_clients", "4"], "only 3 of 4 sites were there"),
    ]
    processes = []
    for i, (kit, flags, _) in enumerate(accidents):  # side by side, since most of it is waiting
        flags = [*SMALL, *flags, "--env", "prod", "--startup_kit", str(kit)]
        processes.append(start_job(tmp_path / f"workspace-{i}", *flags))
    for i, (_, _, error) in enumerate(accidents):
        run = finish(processes[i], tmp_path / f"workspace-{i}")
        assert run.status == 1
        assert re.fullmatch(rf"job\.py: error: .*{error}.*\n", run.errors)


def test_poc_whose_port_is_taken_is_one_clear_error(federation, tmp_path):
    run = run_job(tmp_path / "workspace", *SMALL, "--env", "poc")
    assert run.status == 1
    assert re.fullmatch(r"job\.py: error: port 8002 of this machine is taken by another server.*\n", run.errors)
