"""`--export`, NVFlare's own flag, and job.py's errors, in real processes."""

import json
import re

import pytest

from conftest import REPO, finish, run_job, start_job

CUSTOM = {"cifar10.py", "client.py", "data.py", "model.py", "support"}  # what travels with a job


@pytest.mark.parametrize("flags", ["--export --gpu 0", "--export-dir", "--lr 0"])
def test_bad_arguments_of_a_real_process(flags, tmp_path):
    run = run_job(tmp_path / "workspace", *flags.split())
    assert (run.status, run.output) == (2, "")
    assert re.fullmatch(r"job\.py: error: .+", run.errors.splitlines()[-1])
    assert list(tmp_path.iterdir()) == []


def test_export_replaces_an_earlier_export_and_nothing_else(tmp_path):
    assert run_job(tmp_path / "workspace", "--export", "--export-dir", "jobs").status == 0
    (tmp_path / "mine" / "hello-pt").mkdir(parents=True)
    (tmp_path / "mine" / "hello-pt" / "thesis.tex").write_text("")
    (tmp_path / "text").write_text("")
    before = {path: path.stat().st_mtime for path in tmp_path.rglob("*") if not path.is_relative_to(tmp_path / "jobs")}
    folders = ["jobs", "mine", "text"]
    processes = [start_job(tmp_path / "workspace", "--export", "--export-dir", folder) for folder in folders]
    for folder, process in zip(folders, processes):
        run = finish(process, tmp_path / "workspace")
        assert run.status == (0 if folder == "jobs" else 1) and "Traceback" not in run.errors
        assert folder == "jobs" or re.fullmatch(r"job\.py: error: .+", run.errors.splitlines()[-1])
    assert all(path.exists() for path in before)
    assert list((tmp_path / "mine" / "hello-pt").iterdir()) == [tmp_path / "mine" / "hello-pt" / "thesis.tex"]


def test_exported_job_is_complete_and_names_nothing_of_this_machine(tmp_path):
    run = run_job(tmp_path / "workspace", "--dataset", "auto", "--lr", "0.02", "--export", "--export-dir", "jobs")
    assert run.status == 0, run.errors
    exported = tmp_path / "jobs" / "hello-pt"
    assert not (tmp_path / "workspace").exists()
    app = exported / "app"
    assert {file.name for file in (app / "custom").iterdir()} == CUSTOM
    assert [file.name for file in (app / "custom" / "support").iterdir()] == ["server.py"]
    server = json.loads((app / "config" / "config_fed_server.json").read_text())
    client = json.loads((app / "config" / "config_fed_client.json").read_text())
    workflow = server["workflows"][0]
    assert workflow["path"].endswith(".FedAvg") and workflow["args"]["num_rounds"] == 2
    persistor = next(component for component in server["components"] if component["id"] == "persistor")
    assert persistor["args"]["model"] == {"path": "model.create_model", "args": {"seed": 0}}
    command = client["executors"][0]["executor"]["args"]["command"]
    assert command[:3] == ["python3", "-u", "custom/client.py"]
    assert "--dataset cifar10" in " ".join(command) and "--lr 0.02" in " ".join(command)
    for file in exported.rglob("*.json"):
        assert str(REPO) not in file.read_text() and str(tmp_path) not in file.read_text()


def test_exported_job_says_how_the_images_are_split(tmp_path):
    flags = ["--n_clients", "3", "--split", "dirichlet", "--alpha", "0.3", "--export", "--export-dir", str(tmp_path)]
    run = run_job(tmp_path / "workspace", *flags)
    assert run.status == 0, run.errors
    app = tmp_path / "hello-pt" / "app"  # one for all sites: a site's name says which share is its own
    client = json.loads((app / "config" / "config_fed_client.json").read_text())
    command = " ".join(client["executors"][0]["executor"]["args"]["command"])
    assert "--n_clients 3" in command and "--split dirichlet --alpha 0.3" in command
    assert {file.name for file in (app / "custom").iterdir()} == CUSTOM
