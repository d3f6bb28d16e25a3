"""job.py on a server and sites of their own, poc and prod: the same as in a simulation, and when it goes wrong."""

import dataclasses
import itertools
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
    Run,
    changed_client,
    copy_repo,
    end_all,
    finish,
    run_job,
    running,
    same_weights,
    start_job,
    succeed,
    wait_for,
    wait_until,
)
from documentation import command
from model import create_model
from provisioned import LEAD, PARTICIPANTS, SITES, Federation, prod
from reference import distance
from stages import ONE_THREAD, faulty_client, sizes
from wine import EVALUATE, OWN_FLAG, copy_with_wine, expected_wine

SMALL = ["--train_size", "64", "--test_size", "100"]
EVALUATED = [*SMALL, "--train_script", "client_with_eval.py", "--cross_site_eval"]
HOSPITALS = ["hospital-a", "hospital-b", "hospital-c"]
BEGINS, TRAINS = "import nvflare.client as flare", "            model.load_state_dict("  # lines of client.py
PLACE = r"changed_client\.py:\d+"
RAISED = rf"ValueError: no such thing \({PLACE}\)"
NOT_INSTALLED = rf"ModuleNotFoundError: No module named 'a_missing_package' \({PLACE}\)"
RAISE, KILL = "raise ValueError('no such thing')", "import os; os.kill(os.getpid(), 9)"
KILLED, LOG = r"its script was killed[^;]*", r"\(see \S+/log.(?:json|txt)\)"
FAULTS = {  # what happens: in front of which line, how, what job.py says of it, and what stands in the site's own log
    "raises": (TRAINS, RAISE, RAISED, RAISED),
    "can't start": (BEGINS, "import a_missing_package", NOT_INSTALLED, NOT_INSTALLED),
    "is killed": (TRAINS, KILL, KILLED, "trainer process (group )?exited"),
}
ELSEWHERE = r"its own log tells why \(with --enable_log_streaming, sites send theirs\)"
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
    assert run.status == 0, run.errors  # which has the download's progress
    return run.weights()


def finish_after(text: str, process: subprocess.Popen, workspace: Path) -> tuple[Run, float]:
    """Wait until a job has printed a text, and then until it has ended; return how many seconds that took."""
    before = itertools.takewhile(lambda line: text not in line, process.stdout)
    printed = "".join(before)
    start = time.monotonic()
    run = finish(process, workspace)
    return dataclasses.replace(run, output=printed + run.output), time.monotonic() - start


# ---- POC: before the federation, which takes the same port ----


def test_poc_ends_in_the_same_model_and_summary(simulated, online, images, tmp_path):
    flags = ["--dataset", "auto", *POC.split()[2:], *EVALUATED, "--n_clients", "3"]
    for site in SITES:
        shutil.copytree(images / BATCHES_FOLDER, images / site / BATCHES_FOLDER)
    run = succeed(tmp_path / "workspace", *flags, "--data_root", f"{images}/{{site}}", **online, **ONE_THREAD)
    assert same_weights(run.weights(), simulated)
    assert all((images / site / "cifar10-uint8.pt").exists() for site in SITES)
    assert "\nData: cifar10.\n" in run.output and sizes(run) == dict.fromkeys(SITES, (64, 100))
    assert {folder.name for folder in (run.results / "tb_events").iterdir()} == set(SITES)
    assert f"tensorboard --logdir {run.results / 'tb_events'}" in run.output
    assert (run.folder / "poc").stat().st_mode & 0o077 == 0  # its certificate authority's key is in there
    assert not running(run.folder.parent)


def test_own_model_and_data_run_in_poc_too(tmp_path):
    repo = copy_with_wine(tmp_path / "repo")
    run = succeed(tmp_path / "workspace", *POC.split()[2:], *EVALUATE, *OWN_FLAG, repo=repo, **ONE_THREAD)
    assert distance(run.weights(), expected_wine(rounds=2)) < 1e-6
    assert "loss" in run.output.partition("The best is ")[2]


def test_poc_takes_sites_by_their_names_and_deals_images_out_as_a_simulation_does(tmp_path):
    flags = ["--sites", *HOSPITALS, "--split", "dirichlet", "--train_size", "90", "--test_size", "20"]
    for folder in ("sim", "poc"):
        (tmp_path / folder).mkdir()
    simulated = run_job(tmp_path / "sim" / "workspace", *flags, **ONE_THREAD)
    run = run_job(tmp_path / "poc" / "workspace", *flags, "--env", "poc", **ONE_THREAD)
    assert (run.status, run.errors) == (simulated.status, simulated.errors) == (0, "")
    assert same_weights(run.weights(), simulated.weights())
    assert not same_weights(run.weights(), create_model(seed=0).state_dict())
    assert {folder.name for folder in (run.results / "tb_events").iterdir()} == set(HOSPITALS)
    report = run.report()
    assert [set(row) for row in report["rounds"]] == [set(HOSPITALS)] * 2
    assert report["rounds"] == simulated.report()["rounds"]
    assert re.search(r"\n  train_loss +hospital-a +hospital-b +hospital-c\n", run.output)


ONE, THE_OTHER = r"site-([12])", r"site-(?!\1)[12]"


@pytest.mark.parametrize(
    "fault, flags, last_line",
    [
        (RAISE, [], rf"{ONE} failed: {RAISED} {LOG}(; {THE_OTHER} failed: {RAISED} {LOG})?"),
        (RAISE, ["--min_sites", "1"], rf"{ONE} failed: {RAISED} {LOG}; {THE_OTHER} failed: {RAISED} {LOG}"),
        (KILL, [], rf"{ONE} failed: {KILLED} {LOG}(; {THE_OTHER} failed: {KILLED} {LOG})?"),
    ],
)
def test_poc_that_fails_names_site_and_reason_and_stops_its_services(tmp_path, fault, flags, last_line):
    script = changed_client(tmp_path, "client.py", TRAINS, f"{' ' * 12}{fault}")
    run = run_job(tmp_path / "workspace", *SMALL, "--env", "poc", *flags, "--train_script", str(script))
    assert run.status == 1
    assert re.fullmatch(rf"job\.py: error: {last_line}\n", run.errors)
    assert all(Path(log).is_file() for log in re.findall(r"see ([^)]+)\)", run.errors))
    assert not running(run.folder.parent)


def test_poc_whose_script_fails_some_time_after_its_last_round_fails_and_has_the_results(tmp_path):
    after = ["time.sleep(5)", "print(site_name, 'goes on')", RAISE]
    script = changed_client(tmp_path, "client.py", "    finally:", "\n".join(" " * 8 + line for line in after))
    run = run_job(tmp_path / "workspace", *SMALL, "--env", "poc", "--train_script", str(script))
    assert run.status == 1
    assert re.fullmatch(rf"job\.py: error: {ONE} failed: {RAISED} {LOG}; the results are complete\n", run.errors)
    assert run.weights() and "Done: 2 rounds on 2 sites." in run.output
    assert sorted(re.findall(r"^site-. goes on$", run.output, re.MULTILINE)) == ["site-1 goes on", "site-2 goes on"]
    assert not running(run.folder.parent)


@pytest.mark.parametrize("min_sites", [3, 2])
def test_poc_whose_script_fails_at_its_start_on_one_site_ends_or_goes_on_without_it(tmp_path, min_sites):
    script = faulty_client(tmp_path, "hospital-b", BEGINS, "import a_missing_package")
    flags = ["--env", "poc", "--sites", *HOSPITALS, "--min_sites", str(min_sites), "--train_script", str(script)]
    process = start_job(tmp_path / "workspace", *SMALL, *flags)
    run, seconds = finish_after("round 1/2  begins", process, tmp_path / "workspace")
    assert seconds < 60
    assert not running(run.folder.parent)
    if min_sites == 3:
        assert run.status == 1
        assert re.fullmatch(rf"job\.py: error: hospital-b failed: {NOT_INSTALLED} \(see .*\)\n", run.errors)
    else:
        assert (run.status, run.errors) == (0, "")
        report = run.report()
        assert report["lost_sites"] == {"hospital-b": [["could not take part", "round 1/2", ""]]}
        assert [set(row) for row in report["rounds"]] == [{"hospital-a", "hospital-c"}] * 2
        assert "Lost: hospital-b could not take part in round 1/2.\n" in run.output


def test_poc_leaves_out_a_refused_model_says_why_and_takes_the_sites_next_one(tmp_path):
    send = "            flare.send(local_model)  # (11) to the server"
    diverges = "current_round == 1 and local_model.params['fc3.bias'].fill_(torch.nan)"
    script = faulty_client(tmp_path, "site-2", send, diverges)
    flags = ["--env", "poc", "--min_sites", "1", "--num_rounds", "3", "--train_script", str(script)]
    run = succeed(tmp_path / "workspace", *SMALL, *flags)
    reason = "its local model's fc3.bias isn't finite: training diverged, try a smaller --lr"
    assert run.output.count(f"site-2  round 2/3  was left out: {reason}\n") == 1
    for number, models in enumerate(("2 local models", "1 local model", "2 local models"), start=1):
        assert f"round {number}/3  averaged {models}\n" in run.output
    assert "Lost: site-2 was left out in round 2/3, came back in round 3/3.\n" in run.output
    assert [set(row) for row in run.report()["rounds"]] == [{"site-1", "site-2"}, {"site-1"}, {"site-1", "site-2"}]


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
        federation.set_up_job_store()
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
    wait_until(lambda: not running(federation.folder, *words), what="the end of the processes")


@pytest.fixture(scope="module")
def run(federation, tmp_path_factory):
    """The page's job, made small."""
    return run_as_the_page_does(federation, tmp_path_factory.mktemp("prod"))


@pytest.fixture(scope="module")
def streamed(federation, tmp_path_factory):
    """The same, with the logs of those sites that send them."""
    return run_as_the_page_does(federation, tmp_path_factory.mktemp("streamed"), "--enable_log_streaming")


def run_as_the_page_does(federation: Federation, folder: Path, *more: str) -> Run:
    flags = shlex.split(federation.here(SUBMIT))
    assert flags[:2] == ["python", "job.py"]
    return run_job(folder / "workspace", "--dataset", "auto", *flags[2:], *EVALUATED, *more)


def test_prod_ends_in_the_same_model(run, streamed, simulated):
    for of_prod in (run, streamed):
        assert (of_prod.status, of_prod.errors) == (0, "")
        assert same_weights(of_prod.weights(), simulated)


def test_prod_shows_the_rounds_and_only_if_asked_what_the_sites_print_that_stream_their_logs(run, streamed):
    for output, streaming in ((run.output, []), (streamed.output, ["site-1", "site-2"])):
        for i in (1, 2):
            assert f"\nround {i}/2  begins\n" in output and f"\nround {i}/2  averaged 3 local models\n" in output
            for site in SITES:
                assert re.search(rf"\n{site}  round {i}/2  reports train_loss 2\.\d+, accuracy .*, loss .*\n", output)
                epochs = re.findall(rf"\n{site}  round {i}/2  epoch [12]/2  loss 2\.\d{{4}}  \d+\.\d s(?=\n)", output)
                assert len(epochs) == (2 if site in streaming else 0)
    assert streamed.output.count("site-3 sends no log, which its operator may have forbidden") == 1
    assert "site-1 sends no log" not in streamed.output and "sends no log" not in run.output


def test_no_log_of_a_site_comes_to_the_server_unless_it_streams_it(run, streamed):
    for job, streaming in ((run, set()), (streamed, {b"site-1", b"site-2"})):
        texts = [file.read_bytes() for file in job.results.rglob("*") if file.is_file()]  # all that the server had
        assert set(re.findall(rb"(site-\d)  round 2/2  epoch", b"\n".join(texts))) == streaming


@pytest.mark.parametrize(
    "site, what, streamed",
    [
        ("site-1", "raises", False),
        ("site-1", "raises", True),
        ("site-3", "raises", True),  # streams none
        ("site-2", "can't start", False),
        ("site-2", "can't start", True),
        ("site-2", "is killed", True),
    ],
)
def test_script_that_fails_ends_the_job_with_its_site_and_the_reason_if_that_is_streamed(
    federation, tmp_path, site, what, streamed
):
    line, fault, reason, logged = FAULTS[what]
    known = federation.logs(site)
    flags = ["--train_script", str(faulty_client(tmp_path, site, line, fault))]
    if streamed:
        flags += ["--enable_log_streaming"]
    process = start_job(tmp_path / "workspace", *prod(federation), *SMALL, *flags)
    run, seconds = finish_after("round 1/2  begins", process, tmp_path / "workspace")
    assert run.status == 1 and seconds < 60
    told = rf"{reason} \(see (.*/{site}/log.json)\)" if streamed and site != "site-3" else ELSEWHERE
    said = re.fullmatch(rf"job\.py: error: {site} failed: {told}\n", run.errors)
    assert all(Path(log).is_file() for log in said.groups())
    assert re.search(logged, "".join(log.read_text() for log in federation.logs(site) - known))


def test_slow_site_is_named_while_the_job_waits_for_it_and_the_next_job_waits_its_turn(federation, tmp_path):
    script = faulty_client(tmp_path, "site-2", TRAINS, wait_for(tmp_path / "end", indent=16))
    flags = [*prod(federation), *SMALL, "--num_rounds", "1", "--train_script", str(script)]
    job = start_job(tmp_path / "workspace", *flags, before="import support.recipe; support.recipe.NAME_SLOW_AFTER = 5")
    named, next_job = [], None
    for line in job.stdout:
        if found := re.fullmatch(r"still waiting for (.*): at work on round 1/1 for \d+ s\n", line):
            named.append(found[1])
            if not next_job:  # for which enough sites are there, though the server's queue is full
                impatient = "import support.federation.follow as follow; follow.SITES_WITHIN = 0"
                next_job = start_job(
                    tmp_path / "next", *prod(federation), *SMALL, "--num_rounds", "1", before=impatient
                )
                assert any(line.startswith("Submitted job") for line in next_job.stdout)
            (tmp_path / "end").touch()
    for process, workspace in ((job, "workspace"), (next_job, "next")):
        run = finish(process, tmp_path / workspace)
        assert (run.status, run.errors) == (0, "")
    assert set(named) == {"site-2"}


def test_operator_finds_the_jobs_code_command_submitter_and_log_at_the_site_after_its_end(run, federation):
    site = federation.kit("site-3")
    job = site / run.results.parent.name  # its ID
    assert "epoch 2/2" in (job / "log.txt").read_text()
    custom = job / "app_site-3" / "custom"
    code = {str(file.relative_to(custom)) for file in custom.rglob("*.py")}
    assert code >= {"client_with_eval.py", "data.py", "model.py", "cifar10.py", "support/on_site/run_script.py"}
    assert "$CIFAR10" in (job / "app_site-3" / "config" / "config_fed_client.json").read_text()
    assert LEAD in (job / "meta.json").read_text()
    assert f"[U:{LEAD}][A:train.deploy]" in (site / "audit.log").read_text()


def test_ctrl_c_ends_job_py_and_not_the_job_which_the_right_people_see_and_abort(federation, tmp_path):
    known = federation.logs("server")
    flags = [*prod(federation), *SMALL, "--num_rounds", "100000", "--enable_log_streaming"]
    process = start_job(tmp_path / "workspace", *flags)
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
    said = federation.job("stats", job_id, person="guest@north.org")
    assert f"round {latest + 1}/100000  begins" in str(said)
    assert re.search(rf"site-1  round {latest}/100000  reports train_loss \d\.\d+", str(said))
    for person in ("guest@north.org", "operator@north.org"):  # not of the submitter's organization
        assert federation.job("abort", job_id, "--force", person=person)["error_code"] == "AUTH_FAILED"
    assert federation.job("abort", job_id, "--force", person="operator@south.org")["status"] == "ok"
    wait_for_end(federation, job_id)


def test_job_that_an_operator_aborts_ends_with_that(federation, tmp_path):
    process = start_job(tmp_path / "workspace", *prod(federation), *SMALL, "--num_rounds", "100000")
    printed = "".join(itertools.takewhile(lambda line: "round 2/100000  begins" not in line, process.stdout))
    job_id = re.search(r"Submitted job 'hello-pt' with ID: (\S+)", printed)[1]
    assert federation.job("abort", job_id, "--force", person="operator@south.org")["status"] == "ok"
    run = finish(process, tmp_path / "workspace")
    assert run.status == 1
    assert re.fullmatch(r"job\.py: error: .*FINISHED:ABORTED.*\n", run.errors)
    assert run.weights()


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
    assert same_weights(weights, simulated)

    submitted = federation.run(SUBMIT_EXPORTED, folder=repo)
    job_id = re.search(r"[0-9a-f]{8}-[0-9a-f-]{27}", submitted)[0]
    assert federation.job("wait", job_id)["data"]["status"] == "FINISHED:COMPLETED"
    federation.job("download", job_id, "-o", tmp_path / "downloaded")
    weights = torch.load(tmp_path / "downloaded" / job_id / "workspace" / model, weights_only=True)["model"]
    assert same_weights(weights, simulated)


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
        (federation.kit(LEAD), ["--n_clients", "4"], "after 60 s, only 3 of 4 sites are there"),
    ]
    processes = []
    for i, (kit, flags, _) in enumerate(accidents):  # side by side, since most of it is waiting
        flags = [*SMALL, *flags, "--env", "prod", "--startup_kit", str(kit)]
        processes.append(start_job(tmp_path / f"workspace-{i}", *flags))
    for i, (_, _, error) in enumerate(accidents):
        run = finish(processes[i], tmp_path / f"workspace-{i}")
        assert run.status == (2 if i < 2 else 1) and (run.folder.exists() == (i >= 2))
        assert re.fullmatch(rf"job\.py: error: .*{error}.*\n", run.errors)
    assert all(job["status"].startswith("FINISHED:") for job in federation.job("list")["data"])  # none waits on


def test_poc_whose_port_is_taken_is_one_clear_error(federation, tmp_path):
    run = run_job(tmp_path / "workspace", *SMALL, "--env", "poc")
    assert run.status == 1
    assert re.fullmatch(r"job\.py: error: port 8002 of this machine is taken by another server.*\n", run.errors)
