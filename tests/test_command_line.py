import json
import os
import re
import subprocess
import sys

import pytest
import torch

import job
from conftest import REPO, run_job
from model import SimpleNetwork


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A working directory with files and folders of the wrong sort."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "text.pt").write_text("no weights")
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "other.pt")
    torch.save(SimpleNetwork(), tmp_path / "pickled.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "script.txt").write_text("")
    (tmp_path / "other.json").write_text('{"name": "something else"}')
    (tmp_path / "folder.py").mkdir()
    (tmp_path / "with space").mkdir()
    (tmp_path / "mine" / "hello-pt").mkdir(parents=True)
    (tmp_path / "mine" / "hello-pt" / "thesis.tex").write_text("")
    (tmp_path / "half_mine" / "hello-pt" / "server").mkdir(parents=True)
    (tmp_path / "half_mine" / "hello-pt" / "thesis.tex").write_text("")
    (tmp_path / "run" / "hello-pt" / "site-1").mkdir(parents=True)
    (tmp_path / "run" / "hello-pt" / "site-1" / "client.py").write_text("")
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "hello-pt").write_text("")
    (tmp_path / "another").mkdir()
    (tmp_path / "another" / "model.py").write_text("")
    (tmp_path / "another" / "script.py").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n")
    os.mkfifo(tmp_path / "fifo.pt")
    nan = {name: tensor * torch.nan for name, tensor in SimpleNetwork().state_dict().items()}
    torch.save(nan, tmp_path / "nan.pt")
    torch.save({name: tensor.long() for name, tensor in SimpleNetwork().state_dict().items()}, tmp_path / "whole.pt")
    torch.save(SimpleNetwork().state_dict(), tmp_path / "weights.py")
    return tmp_path


@pytest.mark.parametrize(
    "flags",
    [
        *(
            f"--{name} {value}"
            for name in ("n_clients", "num_rounds", "num_threads", "epochs", "batch_size", "train_size", "test_size")
            for value in ("0", "-1", "1.5", "two", "nan", "99999999999", "")
        ),
        "--n_clients 101",
        "--train_size 50001",
        "--test_size 10001",
        *(f"--seed {value}" for value in ("-1", "4294967296", "0.5", "x")),
        *(f"--lr {value}" for value in ("0", "-0.1", "nan", "inf", "1e9", "fast", "")),
        "--num_threads 3",
        "--n_clients 4 --num_threads 5",
        *(f"--train_script {path}" for path in ("missing.py", "broken.py", "script.txt", "folder.py", "")),
        *(
            f"--train_script {path}"
            for path in ("latin.py", "another/script.py", "another/model.py", f"{'x' * 300}.py")
        ),
        "--train_script run/hello-pt/site-1/client.py --workspace run",
        "--data_root run/hello-pt/data --workspace run",
        "--cross_site_eval",
        "--cross_site_eval --train_script client.py",
        *(f"--dataset {name}" for name in ("mnist", "CIFAR10", "")),
        *(f"--data_root {path}" for path in ("text.pt", "text.pt/below", "", "$NO_SUCH_VARIABLE")),
        *(f"--workspace {path}" for path in ("text.pt", "text.pt/below", "with+space", "mine", "")),
        *(f"--workspace {path}" for path in ("half_mine", "blocked", "loop", "~nobody_here/x", "x" * 300, "a\0b")),
        *(f"--workspace {path}" for path in ("ws#1", "it's", 'say"so"', "back\\slash", "line\nline")),
        *(f"--data_root {path}" for path in ("loop", "~nobody_here/x", "x" * 300)),
        *(f"--initial_ckpt {path}" for path in ("fifo.pt", "loop", "nan.pt", "whole.pt", "weights.py", "/dev/zero")),
        *(
            f"--initial_ckpt {path}"
            for path in (
                "none.pt",
                "folder.py",
                "empty.pt",
                "text.pt",
                "other.pt",
                "pickled.pt",
                "list.pt",
                "",
            )
        ),
        *(f"--gpu {spec}" for spec in ("gpu0", "-1", "0,", "[0", "[]", "0;1", "")),
        "--gpu 0,1,2",
        "--gpu [0],[1],[2]",
        *(f"--split {split}" for split in ("equal", "IID", "")),
        *(f"--split dirichlet --alpha {alpha}" for alpha in ("0", "-1", "nan", "inf", "1e-7", "1e7", "small", "")),
        "--alpha 0.5",
        "--split iid --alpha 0.5",
        "--split iid --n_clients 3 --train_size 2",
        "--split dirichlet --n_clients 100 --train_size 99",
        *(f"--json {path}" for path in ("text.pt", "other.json", "folder.py", "text.pt/below.json", "loop", "")),
        "--json fifo.pt",
        "--json ~nobody_here/x",
        "--json run/hello-pt/report.json --workspace run",
        *(f"--json new/{name} --workspace new" for name in ("hello-pt", "hello-pt.lock", ".")),
        "--json new --workspace new",
        "--json report.json --export",
        *(f"--env {env}" for env in ("simulation", "")),
        "--env prod",
        "--startup_kit kit",
        "--env poc --startup_kit kit",
        *(
            f"--env {env} {flags}"
            for env in ("poc", "prod --startup_kit kit")
            for flags in ("--gpu 0", "--num_threads 1")
        ),
        *(f"--env prod --startup_kit kit --data_root {path}" for path in ("data", "./data", "")),
        *(f"--export --data_root {path}" for path in ("data", "")),
        *(f"--export {flags}" for flags in ("--env poc", "--env prod --startup_kit kit", "--gpu 0", "--num_threads 1")),
        "--export-dir somewhere",
        "--export-dir",
        "--export-dir --export",
        *(f"--export --export-dir {path}" for path in ("text.pt", "text.pt/below", "mine", "loop", "")),
        "--n_clients=3\n4",
        "--bogus=a\nb",
        "--no_such_flag",
        "--n_client 3",
        "stray",
    ],
)
def test_bad_arguments_are_refused_in_one_line(flags, files, capsys):
    before = sorted(files.rglob("*"))
    with pytest.raises(SystemExit) as exit:
        job.parse_args([argument.replace("+", " ") for argument in flags.split(" ")])
    output, errors = capsys.readouterr()
    assert exit.value.code == 2 and output == ""
    assert re.fullmatch(r"job\.py: error: .+\n", errors)
    assert sorted(files.rglob("*")) == before


def test_default_script_is_the_one_beside_job_py(files):
    (files / "client.py").write_text("an example of something else")
    assert job.parse_args([]).train_script == REPO / "client.py"


def test_bad_arguments_of_a_real_process(files):
    run = run_job(files / "workspace", "--export-dir", "somewhere")
    assert (run.status, run.output, run.errors) == (2, "", "job.py: error: --export-dir needs --export\n")
    assert not (files / "workspace").exists()


def test_every_flag_has_a_help_and_stands_in_the_readme():
    help = subprocess.run(
        [sys.executable, REPO / "job.py", "--help"], capture_output=True, text=True, check=True
    ).stdout
    flags = set(re.findall(r"--\w[\w-]*", help)) - {"--help"}
    assert {"--n_clients", "--cross_site_eval", "--export-dir"} <= flags
    readme = (REPO / "README.md").read_text()
    assert {flag for flag in flags if f"`{flag}" not in readme} == set()


def test_exported_job_is_complete_and_names_nothing_of_this_machine(tmp_path):
    run = run_job(tmp_path / "workspace", "--dataset", "auto", "--lr", "0.02", "--export", "--export-dir", "jobs")
    assert run.status == 0, run.errors
    exported = tmp_path / "jobs" / "hello-pt"
    assert not (tmp_path / "workspace").exists()
    app = exported / "app"
    assert {file.name for file in (app / "custom").iterdir()} == {"client.py", "data.py", "model.py"}
    server = json.loads((app / "config" / "config_fed_server.json").read_text())
    client = json.loads((app / "config" / "config_fed_client.json").read_text())
    workflow = server["workflows"][0]
    assert workflow["path"].endswith(".FedAvg") and workflow["args"]["num_rounds"] == 2
    persistor = next(component for component in server["components"] if component["id"] == "persistor")
    assert persistor["args"]["model"] == {"path": "model.SimpleNetwork", "args": {}}
    command = client["executors"][0]["executor"]["args"]["command"]
    assert command[:3] == ["python3", "-u", "custom/client.py"]
    assert "--dataset cifar10" in " ".join(command) and "--lr 0.02" in " ".join(command)
    for file in exported.rglob("*.json"):
        assert str(REPO) not in file.read_text() and str(tmp_path) not in file.read_text()


def test_exported_job_shows_each_sites_share(tmp_path):
    flags = ["--n_clients", "3", "--split", "dirichlet", "--alpha", "0.3", "--export", "--export-dir", str(tmp_path)]
    run = run_job(tmp_path / "workspace", *flags)
    assert run.status == 0, run.errors
    exported = tmp_path / "hello-pt"
    assert len(json.loads((exported / "meta.json").read_text())["deploy_map"]) == 4
    for i in (1, 2, 3):
        app = exported / f"app_site-{i}"
        client = json.loads((app / "config" / "config_fed_client.json").read_text())
        command = " ".join(client["executors"][0]["executor"]["args"]["command"])
        assert f"--split dirichlet --alpha 0.3 --num_shards 3 --shard {i}" in command
        assert {file.name for file in (app / "custom").iterdir()} == {"client.py", "data.py", "model.py"}
