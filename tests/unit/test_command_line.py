import os
import re
import subprocess
import sys

import pytest
import torch

import job
from conftest import REPO
from model import SimpleNetwork
from support.folder import MARK


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A working directory with files and folders of the wrong sort."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "text.pt").write_text("no weights")
    (tmp_path / "site-2.txt").write_text("")
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
    (tmp_path / "run" / "hello-pt" / "local").mkdir()
    (tmp_path / "run" / "hello-pt" / MARK).write_text("")
    (tmp_path / "run" / "hello-pt" / "site-1" / "client.py").write_text("")
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "hello-pt").write_text("")
    (tmp_path / "another").mkdir()
    (tmp_path / "another" / "model.py").write_text("")
    (tmp_path / "another" / "script.py").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n")
    for name in ("job", "data", "model", "support", "nvflare", "torch", "random"):
        (tmp_path / f"{name}.py").write_text("")
    os.mkfifo(tmp_path / "fifo.pt")
    nan = {name: tensor * torch.nan for name, tensor in SimpleNetwork().state_dict().items()}
    torch.save(nan, tmp_path / "nan.pt")
    large = {name: tensor.double() + 1e300 for name, tensor in SimpleNetwork().state_dict().items()}
    torch.save(large, tmp_path / "large.pt")  # finite, but not as float32
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
        *(f"--{name} {value}" for name in ("clients_per_round", "min_sites") for value in ("0", "-1", "1.5", "3", "")),
        "--n_clients 4 --clients_per_round 5",
        *(f"--env {env} --min_sites 3" for env in ("poc", "prod --startup_kit kit")),
        "--min_sites 1",
        "--n_clients 101",
        "--train_size 50001",
        "--test_size 10001",
        *(f"--seed {value}" for value in ("-1", "4294967296", "0.5", "x")),
        *(f"--lr {value}" for value in ("0", "-0.1", "nan", "inf", "1e9", "fast", "")),
        "--num_threads 3",
        "--n_clients 4 --num_threads 5",
        "--env poc --n_clients 4 --min_sites 2 --clients_per_round 2",
        *(f"--env poc --min_sites {value}" for value in ("3", "0", "-1", "1.5", "two", "")),
        *(f"--train_script {path}" for path in ("missing.py", "broken.py", "script.txt", "folder.py", "")),
        *(
            f"--train_script {path}"
            for path in ("latin.py", "another/script.py", "another/model.py", f"{'x' * 300}.py")
        ),
        *(f"--train_script {name}.py" for name in ("job", "data", "model", "support", "nvflare", "torch", "random")),
        "--train_script run/hello-pt/site-1/client.py --workspace run",
        "--data_root run/hello-pt/data --workspace run",
        "--train_args '",
        "--cross_site_eval",
        "--cross_site_eval --train_script client.py",
        *(f"--dataset {name}" for name in ("mnist", "CIFAR10", "")),
        *(f"--data_root {path}" for path in ("text.pt", "text.pt/below", "", "$NO_SUCH_VARIABLE")),
        *(f"--workspace {path}" for path in ("text.pt", "text.pt/below", "with+space", "mine", "")),
        *(f"--workspace {path}" for path in ("half_mine", "blocked", "loop", "~nobody_here/x", "x" * 300, "a\0b")),
        *(f"--workspace {path}" for path in ("ws#1", "it's", 'say"so"', "back\\slash", "line\nline")),
        "--data_root {site}.txt/{site}",
        *(f"--data_root {path}" for path in ("loop", "~nobody_here/x", "x" * 300)),
        *(f"--initial_ckpt {path}" for path in ("fifo.pt", "loop", "nan.pt", "large.pt", "weights.py", "/dev/zero")),
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
        "--json /proc/report.json",
        "--workspace /proc",
        "--json ~nobody_here/x",
        "--json run/hello-pt/report.json --workspace run",
        *(f"--json new/{name} --workspace new" for name in ("hello-pt", "hello-pt.lock", ".")),
        "--json new --workspace new",
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


@pytest.mark.parametrize(
    "file, reason",
    [
        ("empty.pt", "is empty: write one with torch.save"),
        ("text.pt", "is no file of torch.save's, or damaged: write one with torch.save"),
        ("pickled.pt", "holds something else than weights, such as a whole model: write one with torch.save"),
        ("list.pt", "holds something else than weights, such as a whole model: write one with torch.save"),
        ("other.pt", "holds no weights of SimpleNetwork: .*Missing key.*conv1.bias"),
    ],
)
def test_file_that_is_no_checkpoint_is_told_what_it_is(file, reason, files, capsys):
    with pytest.raises(SystemExit):
        job.parse_args(["--initial_ckpt", file])
    assert re.fullmatch(
        rf"job\.py: error: argument --initial_ckpt: '{file}' {reason}.*\n", errors := capsys.readouterr().err
    )
    assert "weights_only" not in errors and "\x1b" not in errors


def test_simulation_may_lose_no_site(files, capsys):
    with pytest.raises(SystemExit):
        job.parse_args(["--n_clients", "3", "--min_sites", "2"])
    assert "simulator waits for a lost site for ever" in capsys.readouterr().err
    assert job.parse_args(["--n_clients", "3", "--min_sites", "3"]).min_sites == 3
    assert job.parse_args(["--n_clients", "3", "--min_sites", "2", "--env", "poc"]).min_sites == 2
    assert job.parse_args(["--n_clients", "3", "--env", "poc"]).min_sites == 3


@pytest.mark.parametrize("threads", ["abc", "0", "-1", "", "1.5"])
def test_number_of_threads_that_is_none_is_refused(threads, files, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    test_bad_arguments_are_refused_in_one_line("--lr 0.01", files, capsys)


def test_default_script_is_the_one_beside_job_py(files):
    (files / "client.py").write_text("an example of something else")
    assert job.parse_args([]).train_script == REPO / "client.py"


def test_checkpoint_may_be_whatever_load_state_dict_takes(files, monkeypatch):
    for name, convert in (("double.pt", torch.Tensor.double), ("whole.pt", torch.Tensor.long)):
        torch.save({name: convert(tensor) for name, tensor in SimpleNetwork().state_dict().items()}, name)
        assert job.parse_args(["--initial_ckpt", name]).initial_ckpt == files / name


@pytest.mark.parametrize(
    "flags", ["--data_root data", "--data_root=", "--json report.json", "--num_threads 1", "--gpu 0", "--env poc"]
)
def test_flags_that_an_export_has_no_use_for_are_refused(flags, files, capsys, monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", [*sys.orig_argv, "--export"])  # which NVFlare takes out of sys.argv
    test_bad_arguments_are_refused_in_one_line(flags, files, capsys)


@pytest.mark.parametrize(
    "flags, reason",
    [
        ("--clients_per_round 3", "--clients_per_round 3 is more than --n_clients 2"),
        ("--clients_per_round 0", "argument --clients_per_round: 0 is not from 1 to 1000000"),
        ("--min_sites 1", "--min_sites is for --env poc or prod: NVFlare's simulator waits for a lost site for ever"),
    ],
)
def test_number_of_sites_that_cannot_be_is_told_why(flags, reason, files, capsys):
    with pytest.raises(SystemExit) as exit:
        job.parse_args(flags.split())
    assert (exit.value.code, capsys.readouterr().err) == (2, f"job.py: error: {reason}\n")


def test_all_sites_train_and_are_needed_unless_told_otherwise(files):
    args = job.parse_args(["--n_clients", "4"])
    assert (args.clients_per_round, args.min_sites) == (4, 4)
    args = job.parse_args(["--n_clients", "4", "--clients_per_round", "2", "--env", "poc", "--min_sites", "3"])
    assert (args.clients_per_round, args.min_sites) == (2, 3)


def test_importing_job_changes_nothing():
    code = """
import signal, sys
before = [signal.getsignal(number) for number in signal.valid_signals()], list(sys.argv), dict(os.environ)
import job
assert before == ([signal.getsignal(number) for number in signal.valid_signals()], list(sys.argv), dict(os.environ))
"""
    command = [sys.executable, "-c", f"import os{code}", "--lr", "fast", "--workspace", "/"]
    subprocess.run(command, cwd=REPO, check=True)


def test_every_flag_has_a_help_and_stands_in_the_readme():
    help = subprocess.run(
        [sys.executable, REPO / "job.py", "--help"], capture_output=True, text=True, check=True
    ).stdout
    flags = set(re.findall(r"--\w[\w-]*", help)) - {"--help"}
    assert {"--n_clients", "--cross_site_eval", "--export-dir"} <= flags
    readme = (REPO / "README.md").read_text()
    assert {flag for flag in flags if f"`{flag}" not in readme} == set()


@pytest.mark.parametrize("part", ["create_model", "check_data_flags"])
def test_mistake_in_an_own_model_or_own_data_is_told_with_its_place(part, files, capsys, monkeypatch):
    own = files / "own.py"
    own.write_text("def mistaken(*args):\n    return undefined\n")
    namespace = {}
    exec(compile(own.read_text(), own, "exec"), namespace)
    monkeypatch.setattr(job, part, namespace["mistaken"])
    torch.save(SimpleNetwork().state_dict(), "weights.pt")
    with pytest.raises(SystemExit) as exit:
        job.parse_args(["--initial_ckpt", "weights.pt"])
    error = "job.py: error: NameError: name 'undefined' is not defined (own.py:2)\n"
    assert (exit.value.code, capsys.readouterr().err) == (2, error)
