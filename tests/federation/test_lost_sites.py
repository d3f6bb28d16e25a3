"""What becomes of a job that loses sites, or its server, in the middle of a round."""

import contextlib
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from conftest import Run, end_all, finish, running, start_job, succeed, wait_until
from documentation import command
from provisioned import PARTICIPANTS, SERVER_ADDRESS, Federation, prod, separate_hosts, set_cable

SILENT = r"it no longer answered[^;]*"
SHORTENED = "server heartbeat timeout set to 30"
SHORTEN = command("docs/real-sites.md", "heart_beat_timeout")

# Each site sends a model of one value, and reports the value of the one that it received.
VALUES, STEPS = {"site-1": 1.0, "site-2": 2.0, "site-3": 4.0}, {"site-1": 1, "site-2": 2, "site-3": 3}
SCRIPT = f"""
import time
import nvflare.client as flare

flare.init()
try:
    site = flare.get_site_name()
    while flare.is_running():
        model = flare.receive()
        metrics = {{"accuracy": next(iter(model.params.values())).flatten()[0].item()}}
        if flare.is_evaluate():
            flare.send(flare.FLModel(metrics=metrics))
            continue
        time.sleep(2)
        params = {{name: value * 0 + {VALUES}[site] for name, value in model.params.items()}}
        flare.send(flare.FLModel(params=params, metrics=metrics, meta={{"NUM_STEPS_CURRENT_ROUND": {STEPS}[site]}}))
finally:
    flare.shutdown()
"""


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    with contextlib.ExitStack() as stack:
        try:
            hosts = stack.enter_context(separate_hosts())
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"network namespaces need root and Debian's iproute2: {error}")
        federation = Federation(tmp_path_factory.mktemp("federation"), hosts)
        federation.provision(SERVER_ADDRESS)
        try:
            for participant in PARTICIPANTS:
                federation.start(participant)
            yield federation
        finally:
            end_all(federation.folder)


@pytest.fixture
def script(tmp_path) -> str:
    file = tmp_path / "known_models.py"
    file.write_text(SCRIPT)
    return str(file)


def wait_for_rounds(federation: Federation, known: set[Path], pattern: str, seconds: float = 600) -> None:
    """Wait until the log of the latest job's server has a pattern; known are the logs of the jobs before."""

    def logged():
        return any(re.search(pattern, log.read_text(), re.DOTALL) for log in federation.logs("server") - known)

    wait_until(logged, seconds=seconds, what=pattern)


def kill(folder: Path, *words: str) -> None:
    """Kill the processes in a folder that have these words on their command line; there must be one."""
    processes = running(folder, *words)
    assert processes
    for process in processes:
        process.kill()


def kill_trainer(job: Path) -> None:
    """Kill a client script, by the folder of its site's job."""
    (trainer,) = [process for process in running(job, "custom/") if Path(process.cwd()).is_relative_to(job)]
    trainer.kill()


def mean(sites) -> float:
    return sum(VALUES[site] * STEPS[site] for site in sites) / sum(STEPS[site] for site in sites)


def check_means(run: Run) -> list[set[str]]:
    """Check each round's global model, as the sites received it, and the final one; return each round's sites."""
    report = run.report()
    rounds = [set(row) for row in report["rounds"]]
    for sites, row in zip(rounds, report["rounds"][1:], strict=False):
        for reported in row.values():
            assert reported["accuracy"] == pytest.approx(mean(sites), abs=1e-6)
    for weights in run.weights().values():
        assert torch.allclose(weights, torch.full_like(weights, mean(rounds[-1])), atol=1e-6)
    return rounds


def test_job_goes_on_without_lost_sites_and_with_those_that_come_back(federation, tmp_path, script):
    known = federation.logs("server")
    flags = [*prod(federation), "--min_sites", "1", "--train_script", script, "--num_rounds", "12"]
    process = start_job(tmp_path / "workspace", *flags, "--enable_log_streaming")

    wait_for_rounds(federation, known, "round 2/12  begins")
    (job,) = [log.parent.name for log in federation.logs("server") - known]
    set_cable("site-3", "down")
    story = "averaged 2 local models"
    try:
        wait_for_rounds(federation, known, story, seconds=90)
    finally:
        set_cable("site-3", "up")
    story += ".* came back.* averaged 3 local models"
    wait_for_rounds(federation, known, story)

    kill_trainer(federation.kit("site-3") / job)
    story += ".* averaged 2 local models"
    wait_for_rounds(federation, known, story, seconds=90)
    kill(federation.folder, "worker_process", "prod_00/site-2")
    story += ".* averaged 1 local model\n"
    wait_for_rounds(federation, known, story, seconds=90)

    run = finish(process, tmp_path / "workspace")
    assert (run.status, run.errors) == (0, "")
    sites = check_means(run)
    assert sites[0] == set(VALUES) and sites[1] == {"site-1", "site-2"} and sites[-1] == {"site-1"}
    assert set(VALUES) in sites[2:]  # since site-3 came back
    assert {"site-1", "site-2"} in sites[sites.index(set(VALUES), 2) :]  # until its script was killed
    report = run.report()
    assert set(report["models"]["FL_global_model.pt"]) == {"site-1"}
    assert [what for what, _, _ in report["lost_sites"]["site-2"]] == ["was lost"]
    assert [what for what, _, _ in report["lost_sites"]["site-3"]] == ["was lost", "came back", "was left out"]
    assert report["lost_sites"]["site-3"][0] == ["was lost", "round 2/12", ""]
    assert re.search(r"Lost: site-2 was lost in round \d+/12\.\n", run.output)
    back_and_out = r"came back in round \d+/12, was left out in round \d+/12"
    assert re.search(rf"Lost: site-3 was lost in round 2/12, {back_and_out}\.\n", run.output)
    assert "round 2/12  averaged 2 local models\n" in run.output
    assert run.output.count("you may not read the job's logs, and so what the sites print isn't shown\n") == 1


def test_job_that_loses_more_sites_than_it_may_ends_with_their_names(federation, tmp_path, script):
    known = federation.logs("server")
    flags = [*prod(federation), "--min_sites", "2", "--train_script", script, "--num_rounds", "100000"]
    process = start_job(tmp_path / "workspace", *flags)
    wait_for_rounds(federation, known, "round 2/100000  begins")
    kill(federation.folder, "client_train", "prod_00/site-1")  # its start script starts it again
    wait_for_rounds(federation, known, "averaged 2 local models.* averaged 2 local models", seconds=90)
    set_cable("site-2", "down")
    start = time.monotonic()
    try:
        run = finish(process, tmp_path / "workspace")
        assert time.monotonic() - start < 120
    finally:
        set_cable("site-2", "up")
    assert run.status == 1
    assert re.fullmatch(rf"job\.py: error: site-1 failed: {SILENT}; site-2 failed: {SILENT}\n", run.errors)
    for weights in run.weights().values():
        assert torch.allclose(weights, torch.full_like(weights, mean(["site-2", "site-3"])), atol=1e-6)


@contextlib.contextmanager
def a_minute_after(accident: str, federation: Federation) -> Iterator[None]:
    """Let an accident happen to site-2 of a job that is at work; what this block waits for takes a minute at most."""
    if accident == "cut off":
        set_cable("site-2", "down")
    else:
        # The start script of a killed client starts it again.
        kill(federation.folder, "client_train" if accident == "client killed" else "worker_process", "prod_00/site-2")
    start = time.monotonic()
    try:
        yield
        assert time.monotonic() - start < 60
    finally:
        set_cable("site-2", "up")


def check_rounds_before(results: Path) -> None:
    """Check that the global model is the mean of all sites."""
    for weights in torch.load(results / "app_server" / "FL_global_model.pt", weights_only=True)["model"].values():
        assert torch.allclose(weights, torch.full_like(weights, mean(VALUES)), atol=1e-6)


ACCIDENTS = ["cut off", "client killed", "process for the job killed"]


@pytest.mark.parametrize("accident", ACCIDENTS)
def test_job_that_loses_a_site_ends_with_its_name_and_the_rounds_before(federation, tmp_path, script, accident):
    process = start_job(tmp_path / "workspace", *prod(federation), "--train_script", script, "--num_rounds", "100000")
    assert any("round 2/100000  begins" in line for line in process.stdout)
    with a_minute_after(accident, federation):
        run = finish(process, tmp_path / "workspace")
    assert run.status == 1
    assert re.fullmatch(rf"job\.py: error: site-2 failed: {SILENT}\n", run.errors)
    check_rounds_before(run.results)


@pytest.mark.parametrize("accident", ACCIDENTS)
def test_nvflare_ends_a_job_that_loses_a_site_if_nobody_follows_it_too(federation, tmp_path, script, accident):
    process = start_job(tmp_path / "workspace", *prod(federation), "--train_script", script, "--num_rounds", "100000")
    assert any("round 2/100000  begins" in line for line in process.stdout)
    process.send_signal(signal.SIGINT)
    run = finish(process, tmp_path / "workspace")
    assert run.status == 130
    job_id = re.fullmatch(r"job\.py: stopped; the federation goes on with job (\S+)\n", run.errors)[1]
    with a_minute_after(accident, federation):
        status = federation.job("wait", job_id)["data"]["status"]
    assert status in ("FINISHED:ABNORMAL", "FINISHED:ABORTED", "FINISHED:EXECUTION_EXCEPTION")
    federation.job("download", job_id, "-o", tmp_path)
    check_rounds_before(tmp_path / job_id / "workspace")


def kill_server_and_shorten_heartbeat(federation: Federation) -> None:
    federation.run(SHORTEN)
    kill(federation.folder, "server_train")  # its start script starts it again


def wait_for_restarted_server(federation: Federation) -> None:
    federation.wait_for("server", SHORTENED)
    for site in VALUES:  # they have to find it again
        federation.wait_for("server", f"Re-activate the client: {site}")


def test_job_whose_server_is_started_again_ends_and_goes_on_from_the_servers_disk(federation, tmp_path, script):
    known = federation.logs("server")
    flags = [*prod(federation), "--train_script", script]
    process = start_job(tmp_path / "workspace", *flags, "--num_rounds", "100000")
    wait_for_rounds(federation, known, "round 2/100000  begins")
    kill_server_and_shorten_heartbeat(federation)
    start = time.monotonic()
    run = finish(process, tmp_path / "workspace")
    assert time.monotonic() - start < 120
    assert run.status == 1
    said = re.fullmatch(
        r"job\.py: error: the server was started again, and doesn't go on with the job: the rounds before are in "
        r"(\S+/app_server) of the server's folder\n",
        run.errors,
    )
    model = federation.kit("server") / said[1] / "FL_global_model.pt"
    wait_for_restarted_server(federation)
    flags += ["--initial_ckpt", str(model), "--num_rounds", "1"]
    run = succeed(tmp_path / "workspace", *flags)
    (row,) = run.report()["rounds"]
    assert [row[site]["accuracy"] for site in VALUES] == pytest.approx([mean(VALUES)] * 3, abs=1e-6)


def test_job_whose_site_stays_away_until_its_end_is_complete(federation, tmp_path, script):
    if not any(SHORTENED in log.read_text() for log in federation.logs("server")):  # else a test before did that
        kill_server_and_shorten_heartbeat(federation)
        wait_for_restarted_server(federation)
    known = federation.logs("server")
    flags = [*prod(federation), "--min_sites", "2", "--train_script", script, "--num_rounds", "3"]
    process = start_job(tmp_path / "workspace", *flags)
    wait_for_rounds(federation, known, "round 2/3  begins")
    set_cable("site-1", "down")
    try:
        run = finish(process, tmp_path / "workspace")
    finally:
        set_cable("site-1", "up")
    assert (run.status, run.errors) == (0, "")
    sites = check_means(run)
    assert sites == [set(VALUES), {"site-2", "site-3"}, {"site-2", "site-3"}]
    assert "Lost: site-1 was lost in round 2/3.\n" in run.output


def test_poc_goes_on_without_lost_sites(federation, tmp_path, script):
    # On a host of its own, since poc takes a port that other tests take on this one at the same time.
    host = federation.hosts["site-1"]
    flags = ["--env", "poc", "--n_clients", "3", "--min_sites", "1", "--train_script", script, "--num_rounds", "5"]
    process = start_job(tmp_path / "workspace", *flags, host=host)
    kit = tmp_path / "workspace" / "hello-pt" / "poc" / "example_project" / "prod_00"

    def log_of_round_2():
        return [log for log in (kit / "server").glob("*/log.txt") if "round 2/5  begins" in log.read_text()]

    (log,) = wait_until(log_of_round_2, process)
    kill_trainer(kit / "site-2" / log.parent.name)
    kill(kit, "worker_process", "prod_00/site-3")
    run = finish(process, tmp_path / "workspace")
    assert (run.status, run.errors) == (0, "")
    assert "Lost: site-2 was left out in round 2/5.\n" in run.output
    assert "Lost: site-3 was lost in round 2/5.\n" in run.output
    for weights in run.weights().values():
        assert torch.allclose(weights, torch.full_like(weights, VALUES["site-1"]), atol=1e-6)
