"""`--export`, NVFlare's own flag, and job.py's errors, in real processes."""

import json
import re
import shutil

import pytest
import torch

from conftest import REPO, finish, run_job, start_job
from model import create_model

CUSTOM = {"cifar10.py", "client.py", "data.py", "model.py", "support"}  # what travels with a job
SUPPORT = {"on_server/rounds.py", "on_server/whole_models.py", "on_site/last_word.py", "on_site/run_script.py"}


@pytest.mark.parametrize("flags", ["--export --gpu 0", "--export-dir", "--export-dir=jobs", "--lr 0"])
def test_bad_arguments_of_a_real_process(flags, tmp_path):
    run = run_job(tmp_path / "workspace", *flags.split())
    assert (run.status, run.output) == (2, "")
    assert re.fullmatch(r"job\.py: error: .+", run.errors.splitlines()[-1])
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def exporter(tmp_path_factory):
    """Return a folder in which jobs/hello-pt was exported, a job that goes on from start.pt there."""
    folder = tmp_path_factory.mktemp("exporter")
    torch.save(create_model().state_dict(), folder / "start.pt")
    flags = ["--dataset", "auto", "--lr", "0.02", "--n_clients", "3", "--split", "dirichlet", "--alpha", "0.3"]
    flags += ["--initial_ckpt", "start.pt", "--first_round", "4", "--export", "--export-dir", "jobs"]
    run = run_job(folder / "workspace", *flags)
    assert run.status == 0, run.errors
    return folder


def test_export_replaces_an_earlier_export_and_nothing_else(exporter, tmp_path):
    shutil.copytree(exporter / "jobs", tmp_path / "jobs")
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
    custom = tmp_path / "jobs" / "hello-pt" / "app" / "custom"
    assert {file.name for file in custom.iterdir()} == CUSTOM  # without the earlier job's start.pt


def test_exported_job_is_complete_says_its_split_and_start_and_names_nothing_of_this_machine(exporter):
    exported = exporter / "jobs" / "hello-pt"
    assert not (exporter / "workspace").exists()
    app = exported / "app"  # one for all sites: a site's name says which share is its own
    assert {file.name for file in (app / "custom").iterdir()} == CUSTOM | {"start.pt"}
    assert {str(file.relative_to(app / "custom" / "support")) for file in app.glob("custom/support/**/*.*")} == SUPPORT
    server = json.loads((app / "config" / "config_fed_server.json").read_text())
    client = json.loads((app / "config" / "config_fed_client.json").read_text())
    workflow = server["workflows"][0]
    assert workflow["path"].endswith(".FedAvg") and workflow["args"]["num_rounds"] == 2
    assert workflow["args"]["start_round"] == 3  # they count from 0
    assert "start.pt" in json.dumps(server)
    persistor = next(component for component in server["components"] if component["id"] == "persistor")
    assert persistor["args"]["model"] == {"path": "model.create_model", "args": {"seed": 0}}
    command = client["executors"][0]["executor"]["args"]["command"]
    assert command[:4] == ["python3", "-u", "custom/support/on_site/run_script.py", "custom/client.py"]
    assert "--dataset=cifar10" in command and "--lr=0.02" in command
    assert "--sites site-1 site-2 site-3 " in " ".join(command)
    assert "--split dirichlet --alpha 0.3" in " ".join(command)
    for file in exported.rglob("*.json"):
        assert str(REPO) not in file.read_text() and str(exporter) not in file.read_text()
