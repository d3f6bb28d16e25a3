"""job.py on a server and sites of their own, poc and prod: the same as in a simulation, and when it goes wrong."""

import json
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from conftest import REPO, changed_client, end_all, finish, run_job, running, same_weights, start_job, wait_until
from provisioned import ADMIN, BIN, PARTICIPANTS, SITES, Federation

SMALL = ["--train_size", "64", "--test_size", "100"]
EVALUATED = [*SMALL, "--train_script", "client_with_eval.py", "--cross_site_eval"]
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
FAULT = "            model.load_state_dict(", "            raise ValueError('no such thing')"
SECTION = (REPO / "README.md").read_text().partition("### 2. A federation")[2]
PROVISION, START, SUBMIT, SHUTDOWN = re.findall(r"```bash\n(.*?)```", SECTION, re.DOTALL)[:4]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return tmp_path_factory.mktemp("images")


@pytest.fixture(scope="module")
def simulated(tmp_path_factory, online, images):
    workspace = tmp_path_factory.mktemp("sim") / "workspace"
    run = run_job(workspace, *SMALL, "--dataset", "auto", "--data_root", str(images), **online, **ONE_THREAD)
    assert run.status == 0, run.errors
    return run


# ---- POC: before the federation, which takes the same port ----


def test_poc_ends_in_the_same_model_and_summary(simulated, online, images, tmp_path):
    flags = [*EVALUATED, "--env", "poc", "--dataset", "auto", "--data_root", str(images)]
    run = run_job(tmp_path / "workspace", *flags, **online, **ONE_THREAD)
    assert (run.status, run.errors) == (0, "")
    assert same_weights(run.weights(), simulated.weights())
    assert "Data: cifar10, 64 training images a site, 100 test images." in run.output
    assert {folder.name for folder in (run.results / "tb_events").iterdir()} == set(SITES)
    assert f"tensorboard --logdir {run.results / 'tb_events'}" in run.output
    assert (run.folder / "poc").stat().st_mode & 0o077 == 0  # its certificate authority's key is in there
    assert not running(run.folder.parent)


def test_poc_that_fails_names_site_and_reason_and_stops_its_services(tmp_path):
    script = changed_client(tmp_path, "client.py", *FAULT)
    run = run_job(tmp_path / "workspace", *SMALL, "--env", "poc", "--train_script", str(script))
    assert run.status == 1
    assert re.fullmatch(
        r"job\.py: error: site-[12] failed: ValueError: no such thing \(.*:\d+\) \(see .*log.txt\)\n", run.errors
    )
    assert not running(run.folder.parent)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_stops_the_services_of_poc(tmp_path, number):
    process = start_job(tmp_path / "workspace", *SMALL, "--env", "poc", "--num_rounds", "100000")
    log = tmp_path / "workspace" / "hello-pt" / "poc" / "example_project" / "prod_00" / "site-2" / "log.txt"
    wait_until(lambda: log.exists() and "Successfully registered client" in log.read_text(), process)
    process.send_signal(number)
    run = finish(process, tmp_path / "workspace")
    assert run.status == 128 + number
    assert not running(run.folder.parent)


# ---- The provisioned federation, made and started by README.md's commands ----


@pytest.fixture(scope="module")
def federation(tmp_path_factory, online):
    """A federation each of whose sites has a folder of its own for CIFAR-10."""
    federation = Federation(tmp_path_factory.mktemp("federation"))

    def run(command, **env):
        command = command.replace("/tmp/nvflare/federation", str(federation.folder))
        for i in (1, 2):  # the README has one folder for both
            command = command.replace("CIFAR10=/tmp/nvflare/data", f"CIFAR10={federation.folder}/images-of-site-{i}", 1)
        subprocess.run(["bash", "-ec", command], cwd=REPO, env=federation.environment | env, check=True)

    try:
        run(PROVISION)
        federation.use_own_job_store()
        run(START, **online)
        for participant in PARTICIPANTS:
            federation.wait_until_ready(participant)
        yield federation
        run(SHUTDOWN)
        wait_for_end(federation)
    finally:
        end_all(federation.folder)


def wait_for_end(federation: Federation, *words: str) -> None:
    """Wait until no process of the federation has these words on its command line."""
    end = time.monotonic() + 60
    while left := running(federation.folder, *words):
        assert time.monotonic() < end, f"there still is {left}"
        time.sleep(0.5)


def prod(federation: Federation) -> list[str]:
    return ["--env", "prod", "--startup_kit", str(federation.kit(ADMIN))]


def nvflare_job(federation: Federation, *arguments: str | Path) -> dict:
    """Run an `nvflare job` command as the admin; return what it says."""
    command = [BIN / "nvflare", "--format", "json", "job", *arguments, "--startup-kit", federation.kit(ADMIN)]
    done = subprocess.run(
        command, env=federation.environment, check=True, timeout=200, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])["data"]


@pytest.fixture(scope="module")
def run(federation, tmp_path_factory):
    """The README's job, made small."""
    flags = SUBMIT.replace("/tmp/nvflare/federation", str(federation.folder)).replace("'", "").split()
    assert flags[:2] == ["python", "job.py"]
    workspace = tmp_path_factory.mktemp("prod") / "workspace"
    return run_job(workspace, "--dataset", "auto", *flags[2:], *EVALUATED, "--json", str(workspace / "report.json"))


def test_prod_ends_in_the_same_model(run, simulated):
    assert (run.status, run.errors) == (0, "")
    assert same_weights(run.weights(), simulated.weights())


def test_models_metrics_and_curves_come_back(run, federation):
    report = json.loads((run.folder.parent / "report.json").read_text())
    for file in report["paths"]["models"]:
        assert torch.load(file, weights_only=True)["model"]
    assert len(report["rounds"]) == 2 and set(report["rounds"][0]) == set(SITES)
    for model in ("FL_global_model.pt", "best_FL_global_model.pt", *SITES):
        assert set(report["models"][model]) == set(SITES)
    assert {folder.name for folder in (run.results / "tb_events").iterdir()} == set(SITES)
    assert "Done: 2 rounds on 2 sites." in run.output and "Data: cifar10, each site's own." in run.output
    assert not any((federation.kit(ADMIN) / "transfer").iterdir())  # moved to the workspace


def test_each_site_used_its_own_images(run, federation):
    for site in SITES:
        assert (federation.folder / f"images-of-{site}" / "cifar10-uint8.pt").exists()


def test_results_are_writable_by_their_owner_alone_and_hold_no_key(run):
    for path in (run.folder.parent, *run.folder.parent.rglob("*")):
        assert path.stat().st_mode & 0o002 == 0, path
        assert not path.is_file() or b"PRIVATE KEY" not in path.read_bytes(), path


def test_client_that_raises_ends_the_job_with_its_site(federation, tmp_path):
    script = changed_client(tmp_path, "client.py", *FAULT)
    run = run_job(tmp_path / "workspace", *prod(federation), *SMALL, "--train_script", str(script))
    assert run.status == 1
    assert re.fullmatch(r"job\.py: error: site-[12] failed: EXECUTION_EXCEPTION, .* \(see .*log.txt\)\n", run.errors)


def test_ctrl_c_ends_job_py_and_not_the_job(federation, tmp_path):
    known = federation.logs("server")
    process = start_job(tmp_path / "workspace", *prod(federation), *SMALL, "--num_rounds", "100000")
    federation.wait_for("server", "Round 1 started", known)
    process.send_signal(signal.SIGINT)
    run = finish(process, tmp_path / "workspace")
    assert run.status == 130
    job_id = re.fullmatch(r"job\.py: stopped; the federation goes on with job (\S+)\n", run.errors)[1]
    (log,) = federation.logs("server") - known
    latest = int(re.findall(r"Round (\d+) started", log.read_text())[-1])
    federation.wait_for("server", f"Round {latest + 1} started", known)
    nvflare_job(federation, "abort", job_id, "--force")
    wait_for_end(federation, job_id)


def test_exported_job_runs_in_the_simulator_and_on_the_federation(federation, tmp_path, simulated):
    flags = [*SMALL, "--dataset", "auto", "--data_root", "$CIFAR10", "--export"]
    exported = run_job(tmp_path / "workspace", *flags)
    assert exported.status == 0, exported.errors
    env = federation.environment | {"CIFAR10": str(federation.folder / "images-of-site-1")} | ONE_THREAD
    command = [BIN / "nvflare", "simulator", "fl_job/hello-pt", "-n", "2", "-w", "simulated"]
    subprocess.run(command, cwd=tmp_path, env=env, check=True, timeout=200)
    model = "app_server/FL_global_model.pt"
    weights = torch.load(tmp_path / "simulated" / "server" / "simulate_job" / model, weights_only=True)["model"]
    assert same_weights(weights, simulated.weights())

    job_id = nvflare_job(federation, "submit", "-j", tmp_path / "fl_job" / "hello-pt")["job_id"]
    assert nvflare_job(federation, "wait", job_id)["status"] == "FINISHED:COMPLETED"
    nvflare_job(federation, "download", job_id, "-o", tmp_path / "downloaded")
    weights = torch.load(tmp_path / "downloaded" / job_id / "workspace" / model, weights_only=True)["model"]
    assert same_weights(weights, simulated.weights())


def test_wrong_kits_too_few_sites_and_a_server_that_does_not_answer_end_in_one_line(federation, tmp_path):
    stranger, silent = Federation(tmp_path / "stranger"), Federation(tmp_path / "silent")
    stranger.provision("localhost")  # whose certificates this federation doesn't know
    silent.provision("localhost.invalid")
    accidents = [
        (tmp_path / "none", [], "is not an admin's startup kit"),
        (federation.kit("site-1"), [], "is not an admin's startup kit"),
        (stranger.kit(ADMIN), [], "no connection to the federation, or refused by it"),
        (silent.kit(ADMIN), [], "no connection to the federation, or refused by it"),
        (federation.kit(ADMIN), ["--n_clients", "3"], "only 2 of 3 sites were there"),
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
