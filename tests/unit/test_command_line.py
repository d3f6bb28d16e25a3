import argparse
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import client
import job
from conftest import REPO, copy_repo
from model import SimpleNetwork, create_model
from support import arguments, flag_types, summary


@pytest.fixture(scope="module")
def wrong_sort(tmp_path_factory):
    """Return a folder with files and folders of the wrong sort."""
    folder = tmp_path_factory.mktemp("files")
    for name in ("folder.py", "with space", "another", "mine/hello-pt", "blocked", "lost_link", "kit/startup", "third"):
        (folder / name).mkdir(parents=True)
    for name in (
        "job",
        "data",
        "model",
        "support",
        "nvflare",
        "torch",
        "random",
        "another/model",
        "another/script",
        "third/data",
        "third/script",
    ):
        (folder / f"{name}.py").write_text("")
    for name in (
        "empty.pt",
        "script.txt",
        "mine/hello-pt/thesis.tex",
        "blocked/hello-pt",
        "kit/startup/fed_admin.json",
    ):
        (folder / name).write_text("")
    (folder / "file_of_mine" / "hello-pt").mkdir(parents=True)
    (folder / "file_of_mine" / "hello-pt" / "server").write_text("")
    (folder / "lost_link" / "hello-pt").symlink_to("nowhere")
    (folder / "loop").symlink_to("loop")
    (folder / "text.pt").write_text("no weights")
    (folder / "broken.py").write_text("def f(:\n")
    (folder / "latin.py").write_bytes(b"# \xe9\n")
    os.mkfifo(folder / "fifo.pt")
    weights = SimpleNetwork().state_dict()
    for name, content in {
        "other.pt": {"conv1.weight": torch.zeros(1)},
        "pickled.pt": SimpleNetwork(),
        "list.pt": [1, 2],
        "parameters.pt": dict(SimpleNetwork().named_parameters()),
        "nan.pt": {name: tensor * torch.nan for name, tensor in weights.items()},
        "large.pt": {name: tensor.double() + 1e300 for name, tensor in weights.items()},  # finite, but not as float32
        "weights.py": weights,
        "good.pt": weights,
        "double.pt": {name: tensor.double() for name, tensor in weights.items()},
        "whole.pt": {name: tensor.long() for name, tensor in weights.items()},
        "tutorial.pt": {"epoch": 3, "model_state_dict": weights},
        "another_tutorial.pt": {"state_dict": weights},
    }.items():
        torch.save(content, folder / name)
    return folder


@pytest.fixture
def files(wrong_sort, monkeypatch):
    """Work in that folder, in which nothing may change."""
    monkeypatch.chdir(wrong_sort)
    before = sorted(wrong_sort.rglob("*"))
    yield wrong_sort
    assert sorted(wrong_sort.rglob("*")) == before


def refusal(flags, capsys, call=job.parse_args, status=2):
    """Return the line in which job.py refuses flags. A + in them is a blank."""
    with pytest.raises(SystemExit) as exit:
        call([argument.replace("+", " ") for argument in flags.split(" ")])
    output, errors = capsys.readouterr()
    code = exit.value.code
    if isinstance(code, str):  # which Python prints, and ends with status 1
        code, errors = 1, f"{errors}{code}\n"
    assert code == status and (output == "" or status == 1) and "Traceback" not in output
    assert re.fullmatch(r"job\.py: error: .+\n", errors)
    return errors.removeprefix("job.py: error: ").removesuffix("\n")


@pytest.mark.parametrize(
    "flags",
    [
        *(
            f"--{name} {value}"
            for name in ("n_clients", "num_rounds", "num_threads", "epochs", "batch_size")
            for value in ("0", "-1", "1.5", "two", "nan", "99999999999", "")
        ),
        *(f"--{name} {value}" for name in ("train_size", "test_size") for value in ("1.5", "two", "nan", "")),
        *(f"--{name} {value}" for name in ("clients_per_round", "min_sites") for value in ("0", "-1", "1.5", "3", "")),
        "--n_clients 4 --clients_per_round 5",
        *(f"--env {env} --min_sites 3" for env in ("poc", "prod --startup_kit kit")),
        "--n_clients 101",
        *(
            f"--sites {names}"
            for names in ("a a", "server", "A", "site_1", "a/b", "..", "-", "a-", "a.b", "x" * 64, "")
        ),
        "--sites",
        "--n_clients 2 --sites a b",
        *(f"--sites a b {flags}" for flags in ("--num_threads 3", "--clients_per_round 3", "--env poc --min_sites 3")),
        *(f"--initial_ckpt good.pt --first_round {value}" for value in ("0", "-1", "1.5", "two", "")),
        "--first_round 2",
        *(f"--seed {value}" for value in ("-1", "4294967296", "0.5", "x")),
        *(f"--lr {value}" for value in ("0", "-0.1", "nan", "inf", "1e9", "fast", "")),
        "--num_threads 3",
        "--n_clients 4 --num_threads 5",
        "--env poc --n_clients 4 --min_sites 2 --clients_per_round 2",
        *(f"--env poc --min_sites {value}" for value in ("3", "0", "-1", "1.5", "two", "")),
        *(f"--train_script {path}" for path in ("missing.py", "broken.py", "script.txt", "folder.py", "")),
        *(
            f"--train_script {path}"
            for path in ("latin.py", "another/script.py", "third/script.py", "another/model.py", f"{'x' * 300}.py")
        ),
        *(f"--train_script {name}.py" for name in ("job", "data", "model", "support", "nvflare", "torch", "random")),
        "--train_args '",
        *(f"--train_args --x={value}" for value in ("{app_dir}", "{{x}}", "{$HOME}", '{"a":1}', "}")),
        "--cross_site_eval",
        "--cross_site_eval --train_script client.py",
        *(f"--dataset {name}" for name in ("mnist", "CIFAR10", "")),
        *(f"--data_root {path}" for path in ("{app_dir}/data", "{}")),
        *(f"--workspace {path}" for path in ("text.pt", "text.pt/below", "with+space", "mine", "file_of_mine", "")),
        *(f"--workspace {path}" for path in ("blocked", "lost_link", "loop", "~nobody_here/x", "x" * 300, "a\0b")),
        *(f"--workspace {path}" for path in ("ws#1", "it's", 'say"so"', "back\\slash", "line\nline")),
        *(f"--initial_ckpt {path}" for path in ("fifo.pt", "loop", "weights.py", "/dev/zero", "none.pt", "folder.py")),
        "--initial_ckpt ",
        *(f"--gpu {spec}" for spec in ("gpu0", "-1", "0,", "[0", "[]", "0;1", "[0,,1]", "[,]", "")),
        "--gpu 0,1,2",
        "--gpu [0],[1],[2]",
        "--gpu 0,1 --num_threads 2",
        *(f"--split {split}" for split in ("equal", "IID", "")),
        *(f"--split dirichlet --alpha {alpha}" for alpha in ("small", "")),
        *(f"--env {env}" for env in ("simulation", "")),
        "--env prod",
        "--startup_kit kit",
        "--env prod --startup_kit another --data_root /",
        "--env poc --startup_kit kit",
        *(
            f"--env {env} {flags}"
            for env in ("poc", "prod --startup_kit kit")
            for flags in ("--gpu 0", "--num_threads 1")
        ),
        *(f"{env}--enable_log_streaming" for env in ("", "--env poc ")),
        "--json report.json",
        "--n_clients=3\n4",
        "--bogus=a\nb",
        "--no_such_flag",
        "--n_client 3",
        "stray",
    ],
)
def test_bad_arguments_are_refused_in_one_line(flags, files, capsys):
    refusal(flags, capsys)


@pytest.mark.parametrize(
    "flags, reason",
    [
        *((f"--train_size {size}", f"{size} is not from 1 to 50000") for size in ("0", "-1", "50001", "99999999999")),
        *((f"--test_size {size}", f"{size} is not from 1 to 10000") for size in ("0", "-1", "10001", "99999999999")),
        *(
            (f"--split dirichlet --alpha {alpha}", "--alpha is from 1e-06 to 1000000")
            for alpha in ("0", "-1", "nan", "inf", "1e-7", "1e7")
        ),
        *((f"{split}--alpha 0.5", "needs --split dirichlet") for split in ("", "--split iid ")),
        ("--split iid --n_clients 3 --train_size 2", "--train_size 2 is too few"),
        ("--split dirichlet --n_clients 100 --train_size 99", "--train_size 99 is too few"),
        *(
            (f"--env prod --startup_kit kit --data_root {path}", "--data_root is on the sites: begin it with")
            for path in ("data", "./data", "")
        ),
    ],
)
def test_bad_flags_of_the_data_are_refused_in_one_line_before_anything_is_made(flags, reason, files, capsys):
    line = refusal(f"--dataset synthetic --workspace new {flags}", capsys, job.main)
    assert reason in line and "ValueError" not in line


@pytest.mark.parametrize(
    "file, reason",
    [
        ("empty.pt", "is no file of weights: write one with torch.save"),
        ("text.pt", "is no file of weights: write one with torch.save"),
        ("pickled.pt", "is no file of weights: write one with torch.save"),
        ("list.pt", "is no file of weights: write one with torch.save"),
        ("parameters.pt", "is no file of weights: write one with torch.save"),
        (
            "tutorial.pt",
            r"has its weights in an entry: .* torch\.save\(torch\.load\(.*\)\['model_state_dict'\], FILE\)",
        ),
        ("another_tutorial.pt", r"has its weights in an entry: .*\['state_dict'\], FILE\)"),
        ("other.pt", "holds no weights of SimpleNetwork: .*Missing key.*conv1.bias"),
        ("nan.pt", "holds weights that are not finite"),
        ("large.pt", "holds weights that are not finite"),
    ],
)
def test_file_that_is_no_checkpoint_is_told_what_it_is(file, reason, files, capsys):
    error = refusal(f"--initial_ckpt {file}", capsys)
    assert re.fullmatch(rf"argument --initial_ckpt: '{file}' {reason}.*", error)
    assert "weights_only" not in error and "\x1b" not in error


def test_default_script_is_the_one_beside_job_py(tmp_path, monkeypatch):
    (tmp_path / "client.py").write_text("an example of something else")
    monkeypatch.chdir(tmp_path)
    assert job.parse_args([]).train_script == REPO / "client.py"


@pytest.mark.parametrize("file", ["good.pt", "double.pt", "whole.pt"])
def test_checkpoint_may_be_whatever_load_state_dict_takes(file, files):
    # It is relative to the folder that a run works in, from where NVFlare sends it along.
    assert (REPO / job.parse_args(["--initial_ckpt", file]).initial_ckpt).resolve() == files / file


def test_checkpoint_may_be_in_ones_home_folder(files, monkeypatch):
    monkeypatch.setenv("HOME", str(files))
    assert (REPO / job.parse_args(["--initial_ckpt=~/good.pt"]).initial_ckpt).resolve() == files / "good.pt"


def test_startup_kit_is_found_from_wherever_a_run_works(files):
    assert job.parse_args(["--env", "prod", "--startup_kit", "kit", "--data_root", "/"]).startup_kit == files / "kit"


@pytest.fixture
def exported(monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", [*sys.orig_argv, "--export"])  # which NVFlare takes out of sys.argv


def test_export_renames_no_earlier_run_and_takes_its_model_from_where_it_is(tmp_path, exported):
    model = tmp_path / "hello-pt" / "server" / "model.pt"
    model.parent.mkdir(parents=True)
    torch.save(create_model().state_dict(), model)
    args = job.parse_args(["--workspace", str(tmp_path), "--initial_ckpt", str(model)])
    assert Path(args.initial_ckpt).samefile(model)


@pytest.mark.parametrize("flags", ["--json report.json", "--num_threads 1", "--gpu 0", "--env poc"])
def test_flags_that_an_export_has_no_use_for_are_refused(flags, files, capsys, exported):
    test_bad_arguments_are_refused_in_one_line(flags, files, capsys)


@pytest.mark.parametrize("flags", ["--data_root data", "--data_root="])
def test_export_needs_the_place_of_the_data_on_the_sites(flags, files, capsys, exported):
    assert "--data_root is on the sites" in refusal(flags, capsys, job.main)


@pytest.mark.parametrize(
    "flags, reason",
    [
        ("--clients_per_round 3", "--clients_per_round can't be more than the 2 sites"),
        (
            "--sites a --num_threads 2 --clients_per_round 2",
            "--num_threads and --clients_per_round can't be more than the",
        ),
        ("--clients_per_round 0", "argument --clients_per_round: 0 is not from 1 to 1000000"),
        ("--min_sites 1", "--min_sites is for --env poc or prod: a simulation ends when it loses a site"),
        ("--n_clients 3 --min_sites 2", "--min_sites is for --env poc or prod: a simulation ends when it loses a site"),
    ],
)
def test_number_of_sites_that_cannot_be_is_told_why(flags, reason, files, capsys):
    assert refusal(flags, capsys).startswith(reason)


def test_all_sites_train_and_are_needed_unless_told_otherwise(files):
    args = job.parse_args(["--n_clients", "4"])
    assert (args.clients_per_round, args.min_sites, args.num_threads) == (4, 4, 4)
    args = job.parse_args(["--n_clients", "4", "--clients_per_round", "2", "--env", "poc", "--min_sites", "3"])
    assert (args.clients_per_round, args.min_sites) == (2, 3)
    assert job.parse_args(["--n_clients", "3", "--min_sites", "3"]).min_sites == 3
    assert job.parse_args(["--n_clients", "3", "--env", "poc"]).min_sites == 3


def test_sites_may_have_names_and_are_site_1_and_so_on_if_not(files):
    assert job.parse_args(["--n_clients", "3"]).sites == ["site-1", "site-2", "site-3"]
    args = job.parse_args(["--sites", "berlin", "2", "x" * 63])
    assert (args.sites, args.n_clients, args.clients_per_round) == (["berlin", "2", "x" * 63], 3, 3)


def test_importing_job_changes_nothing():
    state = "[signal.getsignal(number) for number in signal.valid_signals()], list(sys.argv), dict(os.environ), "
    state += "os.getcwd(), list(sys.path), sys.stdin, sys.stdout, logging.getLogger().handlers, logging.root.level"
    code = f"import logging, os, signal, sys\nbefore = {state}\nimport job\nassert before == ({state})"
    subprocess.run([sys.executable, "-c", code, "--lr", "fast", "--workspace", "/"], cwd=REPO, check=True)


@pytest.mark.parametrize("pretence, word", [("version_info = (3, 9, 18)", "3.10"), ("platform = 'win32'", "WSL")])
def test_older_python_and_windows_are_refused_in_one_line(pretence, word):
    blocked = "sys.modules['nvflare'] = None"  # which an old Python doesn't have
    code = f"import runpy, sys; sys.{pretence}; {blocked}; runpy.run_path('job.py', run_name='__main__')"
    run = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert run.returncode == 1 and re.fullmatch(rf"job\.py: error: .*{re.escape(word)}.*\n", run.stderr)


# ---- A model.py or data.py of a user's own ----


EXITED = "data.py or model.py called sys.exit while it was imported"


@pytest.mark.parametrize(
    "module, source, status, reason",
    [
        ("data.py", "import sys\nsys.exit()", 1, EXITED),
        ("model.py", "import sys\nsys.exit()", 1, EXITED),
        ("model.py", "import no_such_package", 1, "No module named 'no_such_package': is the virtual environment .*"),
        ("client.py", "\ndef main()", 2, r".*client\.py' is not valid Python: expected ':' \(client\.py, line 2\)"),
    ],
)
def test_module_that_cant_be_used_is_one_line(module, source, status, reason, tmp_path):
    repo = copy_repo(tmp_path / "repo")
    (repo / module).write_text(source)
    run = subprocess.run([sys.executable, repo / "job.py"], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (status, "")
    assert re.fullmatch(rf"job\.py: error: {reason}\n", run.stderr)


@pytest.mark.parametrize(
    "mistake, reason",
    [
        ("return undefined", "NameError: name 'undefined' is not defined (own.py:2)"),
        ("open('table.csv')", "FileNotFoundError: [Errno 2] No such file or directory: 'table.csv' (own.py:2)"),
        ("raise SystemExit(0)", "SystemExit: 0 (own.py:2)"),
        ("import sys; sys.exit()", "SystemExit (own.py:2)"),
    ],
)
@pytest.mark.parametrize(
    "module, part, status, place",
    [
        (flag_types, "create_model", 2, "argument --initial_ckpt: create_model failed with "),
        (job, "prepare_data", 1, ""),
        (summary, "load_data", 1, "load_data for site-1: "),
    ],
)
def test_mistake_in_an_own_model_or_own_data_is_told_with_its_place(
    module, part, status, place, mistake, reason, files, tmp_path, capsys, monkeypatch
):
    own = tmp_path / "own.py"
    own.write_text(f"def mistaken(*args):\n    {mistake}\n")
    namespace = {}
    exec(compile(own.read_text(), own, "exec"), namespace)
    monkeypatch.setattr(module, part, namespace["mistaken"])
    error = refusal(f"--dataset synthetic --initial_ckpt good.pt --workspace {tmp_path}", capsys, job.main, status)
    ends_the_program = "SystemExit" in reason and status == 1
    assert error == (f"{reason} ended the program" if ends_the_program else f"{place}{reason}")
    assert not (tmp_path / "hello-pt").exists()


def one_of(*names, **settings):
    return lambda parser: parser.add_argument(*names, **settings)


def two_of_one_dest(parser):
    parser.add_argument("--up", dest="way", action="store_const", const="up")
    parser.add_argument("--down", dest="way", action="store_const", const="down")


def size(text):
    return tuple(map(int, text.split("x")))


@pytest.fixture
def own_flags(monkeypatch, files):
    """Give job.py and the clients data.py's flags of a user's own."""

    def give(add):
        for module in (arguments, client):
            monkeypatch.setattr(module, "add_data_flags", add)

    return give


@pytest.mark.parametrize(
    "add, flags, reason",
    [
        (one_of("--lr"), "--lr 1", "argument --lr: conflicting option string: --lr (test_command_line.py:"),
        (one_of("--sites", nargs="+"), "", "conflicting option string: --sites (test_command_line.py:"),
        (lambda parser: one_of("--lr")(parser.add_argument_group("mine")), "--lr 1", "conflicting option string: --lr"),
        (lambda parser: parser.no_such_thing, "", "has no attribute 'no_such_thing' (test_command_line.py:"),
        (one_of("--evaluates", action="store_true"), "--evaluates", "evaluates"),
        (one_of("--command", default="mine"), "", "command"),
        (one_of("--note"), "--note {app_dir}", "can't hold braces, but for {site}"),
        (one_of("--notes", nargs="+"), "--notes a {site} {$HOME}", "can't hold braces, but for {site}"),
    ],
)
def test_own_flag_that_cannot_be_sent_is_refused_in_one_line(add, flags, reason, own_flags, capsys):
    own_flags(add)
    assert reason in refusal(f"--workspace new {flags}".strip(), capsys)


@pytest.mark.parametrize(
    "add, words, name, value",
    [
        (one_of("--shift", type=float), ["--shift=-0.00001"], "shift", -0.00001),
        (one_of("--shift", type=float, default=-0.5), [], "shift", -0.5),
        (one_of("--columns", type=int, nargs="+"), ["--columns", "-1", "2"], "columns", [-1, 2]),
        (one_of("--columns", type=int, nargs="*", default=[1]), ["--columns"], "columns", []),
        (one_of("--no-scale", dest="scale", action="store_false"), ["--no-scale"], "scale", False),
        (one_of("--scale", action=argparse.BooleanOptionalAction, default=True), ["--no-scale"], "scale", False),
        (one_of("--tag", action="append"), ["--tag", "a", "--lr", "1", "--tag=b"], "tag", ["a", "b"]),
        (one_of("-v", dest="verbose", action="count", default=0), ["-vv", "--lr=1", "-v"], "verbose", 3),
        (two_of_one_dest, ["--up"], "way", "up"),
        (one_of("--size", type=size), ["--size", "2x3"], "size", (2, 3)),
        (one_of("--number", type=int), ["--num_rounds", "3", "--number", "3", "--seed", "3"], "number", 3),
        (one_of("--note"), ['--note=-x --lr=3 it\'s "$HOME" {site}'], "note", '-x --lr=3 it\'s "$HOME" {site}'),
        (one_of("--note"), ["--note="], "note", ""),
        (one_of("table"), ["--lr", "1", "mine.csv", "--seed", "3"], "table", "mine.csv"),
        (one_of("--note"), [], "note", None),
        (one_of("--data_root"), [], "data_root", None),
        (one_of("--data_root", type=Path), ["--data_root", "/data"], "data_root", Path("/data")),
        (one_of("--threshold", type=float, default=float("inf")), [], "threshold", float("inf")),
    ],
)
def test_own_flag_arrives_as_it_was_given(add, words, name, value, own_flags, monkeypatch):
    own_flags(add)
    args = job.parse_args(words)
    assert getattr(args, name) == value
    monkeypatch.setattr(sys, "argv", ["client.py", *shlex.split(arguments.script_flags(args, {}))])  # as NVFlare does
    assert getattr(client.parse_args(), name) == value


def test_script_gets_its_flags_and_what_prepare_data_has_settled(files):
    words = ["--lr", "0.5", "--sites", "berlin", "paris", "--data_root", "/data/{site}", "--train_args", "--note 'a b'"]
    flags = shlex.split(arguments.script_flags(job.parse_args(words), {"flags": {"dataset": "cifar10"}}))
    assert flags[:7] == ["--sites", "berlin", "paris", "--epochs=2", "--batch_size=16", "--lr=0.5", "--seed=0"]
    assert flags[7:] == ["--data_root", "/data/{site}", "--dataset=cifar10", "--note", "a b"]
