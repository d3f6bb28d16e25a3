"""What is kept from harm, as far as it can be seen without a run."""

import argparse
import asyncio
import contextlib
import functools
import io
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import job
from conftest import REPO
from model import create_model
from support.console import TRAINER, to_show
from support.failure import failed_script, parse_log, reason_of_failure
from support.flag_types import folder
from support.on_site.run_script import ENDED
from support.process import RUN_VARIABLE, process_as_it_was
from support.results import read_results
from support.run import LOCK, make_room, only_run
from support.text import JobFailed, describe, one_line

# With too few images of a class for each of 20 sites, a run ends when the table at its start is made.
ENDS_SOON = ["--dataset=synthetic", "--train_size=300", "--n_clients=20", "--split=dirichlet", "--alpha=1e-6"]


class Hostile:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_code_in_a_model_that_comes_back_is_not_run(tmp_path):
    model, ran = tmp_path / "app_server" / "FL_global_model.pt", tmp_path / "ran"
    model.parent.mkdir()
    torch.save({"model": Hostile(ran)}, model)
    with pytest.raises(JobFailed, match="holds more than weights, and was not loaded"):
        read_results(argparse.Namespace(num_rounds=1, first_round=1, run_folder=tmp_path), tmp_path)
    assert not ran.exists()
    torch.load(model, weights_only=False)
    assert ran.exists()  # so it would have been run


def test_workspace_of_another_user_is_refused(workspace):
    workspace.mkdir(mode=0o755)
    owner, other = os.getuid(), 65534
    if owner != 0:
        pytest.skip("only root can become another user")
    for user, refused in ((owner, False), (other, True)):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.setuid(user)
                folder(str(workspace))
                status = 0
            except argparse.ArgumentTypeError:
                status = 2
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (2 if refused else 0)


def test_site_can_colour_what_it_prints_and_do_nothing_else_to_a_terminal():
    printed = "\x1b[32mgreen\x1b[0m\tGröße\x1b[2J\x1b]0;title\x07\x9b2J\r\x08\nline"
    assert to_show(TRAINER, "INFO", printed) == "\x1b[32mgreen\x1b[0m\tGröße[2J]0;title2Jline"
    assert one_line(printed) == "green Größe [2J ]0;title 2J line"  # in the last line, not even that


def test_nvflares_own_line_is_not_shown_as_a_scripts():
    own = "streamed response from site-1.simulate_job.client_api_trainer_1 failed asynchronously: StreamError: shutdown"
    assert to_show(TRAINER, "INFO", own) is None and to_show(TRAINER, "INFO", f"I say {own}") == f"I say {own}"
    assert to_show(TRAINER, "WARNING", "rejecting RESULT_READY: stale session id") is None  # scripts' lines are INFO


def test_errors_of_ours_are_told_by_their_text_and_others_with_their_type():
    assert describe(OSError("no disk")) == "no disk"
    assert describe(FileNotFoundError("a.csv")) == "FileNotFoundError: a.csv"
    assert describe(TimeoutError("The read operation timed out")) == "TimeoutError: The read operation timed out"


def test_of_a_log_only_whole_records_are_read():
    record = {"asctime": "now", "name": TRAINER, "levelname": "INFO", "message": "hello"}
    made_up = ["5", "{}", '"name"', json.dumps({**record, "message": 5}), json.dumps(record)[:-2]]
    lines = [json.dumps({**record, "more": 1}), *made_up]
    assert parse_log("\n".join(lines)) == [record, {**record, "message": "5"}]


def test_question_that_came_too_early_is_not_why_the_job_failed(tmp_path):
    traceback = """blob_cb threw: 'NoneType' object has no attribute 'get_widget'
Traceback (most recent call last):
  File "/opt/lib/python3.12/site-packages/nvflare/private/fed/server/server_commands.py", line 306, in process
    collector = engine.get_widget(WidgetID.INFO_COLLECTOR)
AttributeError: 'NoneType' object has no attribute 'get_widget'
"""
    record = {"asctime": "", "name": "blob_streamer", "levelname": "ERROR", "message": traceback}
    (tmp_path / "hello-pt" / "server").mkdir(parents=True)
    log = tmp_path / "hello-pt" / "server" / "log.json"
    log.write_text(json.dumps(record))
    args = job.parse_args(["--workspace", str(tmp_path)])
    aborted = JobFailed("the job ended as FINISHED:ABORTED")
    assert reason_of_failure(args, aborted) == f"server failed: the job ended as FINISHED:ABORTED (see {log})"


BACK = ["came back", "round 3/9", ""]


@pytest.mark.parametrize(
    "events, named",
    [
        ([["was lost", "round 2/9", ""], BACK], []),
        ([["was lost", "round 2/9", ""]], ["site-2", "site-3"]),
        ([["was left out", "round 2/9", "it diverged"], BACK, ["was lost", "round 4/9", ""]], ["site-2", "site-3"]),
    ],
)
def test_sites_that_the_job_went_on_without_or_that_came_back_are_not_why_it_failed(events, named, tmp_path):
    server = tmp_path / "hello-pt" / "server"
    server.mkdir(parents=True)
    lost = {"site-2": [["was lost", "round 2/9", ""]], "site-3": events}
    (server / "lost_sites.json").write_text(json.dumps(lost))
    flags = ["--workspace", str(tmp_path), "--env", "poc", "--n_clients", "3", "--min_sites", "2"]
    reason = reason_of_failure(job.parse_args(flags), JobFailed("the job ended as FINISHED:ABORTED"))
    assert re.findall(r"(\S+) failed: ", reason) == (named or ["server"])
    assert "it diverged" not in reason  # that was over when the site came back


def test_script_of_a_site_that_came_back_is_named_if_it_failed_after_the_last_round(tmp_path):
    (tmp_path / "hello-pt" / "server").mkdir(parents=True)
    for site in ("site-1", "site-2"):
        log = tmp_path / f"hello-pt/poc/example_project/prod_00/{site}/a-job/log.json"
        log.parent.mkdir(parents=True)
        record = {"asctime": "", "name": TRAINER, "levelname": "INFO", "message": f"{ENDED}ValueError: of {site}"}
        log.write_text(json.dumps(record))
    lost = {"site-1": [["was left out", "round 1/2", ""]], "site-2": [["was left out", "round 1/2", ""]]}
    lost["site-2"].append(["came back", "round 2/2", ""])
    (tmp_path / "hello-pt" / "server" / "lost_sites.json").write_text(json.dumps(lost))
    args = job.parse_args(["--workspace", str(tmp_path), "--env", "poc", "--min_sites", "1"])
    assert failed_script(args, job_failed=False).startswith("site-2 failed: ValueError: of site-2 (see ")


# ---- A run's folder ----


def content(folder):
    """Return what is in a folder: files with what they hold, folders, and links."""
    return {
        str(path.relative_to(folder)): path.readlink() if path.is_symlink() else path.is_file() and path.read_bytes()
        for path in folder.rglob("*")
    }


def begin(workspace):
    """Make room for a run as job.py does; return the folder that was there."""
    args = job.parse_args(["--workspace", str(workspace)])
    make_room(args)
    return args.earlier_run


@pytest.mark.parametrize(
    "files",
    [
        ["server/simulate_job/app_server/FL_global_model.pt", "summary.json"],
        ["server/simulate_job/app_server/FL_global_model.pt"],
        ["server/log.txt", "site-1/notes.txt"],
        ["server/thesis.tex", "thesis.tex"],
        [],
    ],
    ids=["a result", "NVFlare's own result", "no round was complete", "something of a user's", "nothing at all"],
)
def test_folder_of_an_earlier_run_is_renamed_whatever_it_holds(files, tmp_path, capsys):
    run_folder, runs = tmp_path / "hello-pt", {}
    for round in range(2):
        (run_folder / "server").mkdir(parents=True, exist_ok=True)
        for file in files:
            (run_folder / file).parent.mkdir(parents=True, exist_ok=True)
            (run_folder / file).write_text(f"{file} of run {round}")
        os.utime(run_folder, (1e9 + round, 1e9 + round))  # the name has its second
        before = content(run_folder)
        kept = begin(tmp_path)
        assert re.fullmatch(r"hello-pt-\d{4}-\d\d-\d\d-\d{6}", kept.name) and kept.parent == tmp_path
        assert capsys.readouterr().out == f"The results of the run before are kept in {kept}\n"
        assert content(run_folder) == {"server": False}
        runs[kept] = before
    assert len(runs) == 2 and {folder: content(folder) for folder in runs} == runs


def test_link_to_an_earlier_run_is_renamed_and_what_it_leads_to_is_left_alone(tmp_path):
    (tmp_path / "elsewhere" / "server").mkdir(parents=True)
    (tmp_path / "elsewhere" / "summary.json").write_text("{}")
    before = content(tmp_path / "elsewhere")
    (tmp_path / "hello-pt").symlink_to("elsewhere")
    kept = begin(tmp_path)
    assert kept.readlink() == Path("elsewhere") and content(tmp_path / "elsewhere") == before
    assert not (tmp_path / "hello-pt").is_symlink() and (tmp_path / "hello-pt" / "server").is_dir()


def test_earlier_run_whose_new_name_is_taken_ends_the_run_and_loses_nothing(tmp_path):
    for round in range(2):
        (tmp_path / "hello-pt" / "server").mkdir(parents=True, exist_ok=True)
        (tmp_path / "hello-pt" / "server" / f"of run {round}").write_text("")
        os.utime(tmp_path / "hello-pt", (1e9, 1e9))  # at the same time
        if round == 0:
            begin(tmp_path)
    with pytest.raises(OSError, match="not empty"):
        begin(tmp_path)
    assert {path.name for path in tmp_path.glob("hello-pt*/server/*")} == {"of run 0", "of run 1"}


@pytest.mark.parametrize(
    "make",
    [
        lambda path: [path.mkdir(), (path / "main.py").write_text("precious")],
        lambda path: [path.mkdir(), (path / "server").write_text("precious")],
        lambda path: path.mkdir(),
        lambda path: path.write_text("precious"),
        lambda path: path.symlink_to("nowhere"),
    ],
    ids=["a clone", "a file called server", "an empty folder", "a file", "a link to nothing"],
)
def test_what_is_no_earlier_run_is_refused_and_left_alone(make, tmp_path, capsys):
    make(tmp_path / "hello-pt")
    before = content(tmp_path)
    with pytest.raises(SystemExit) as exit:
        job.main(["--workspace", str(tmp_path), *ENDS_SOON])
    error = f"job.py: error: {tmp_path / 'hello-pt'} is no earlier run: move it, or choose another --workspace\n"
    assert (exit.value.code, capsys.readouterr()) == (2, ("", error))
    assert content(tmp_path) == before


def test_run_that_ends_before_its_first_round_leaves_the_run_before_where_it_is(tmp_path):
    (tmp_path / "hello-pt" / "server").mkdir(parents=True)
    before = content(tmp_path)
    with pytest.raises(SystemExit) as exit:
        job.main(["--workspace", str(tmp_path), *ENDS_SOON])
    assert exit.value.code == 1 and content(tmp_path) == {**before, LOCK: b""}


def test_checkpoint_in_the_folder_of_an_earlier_run_is_found_after_that_was_renamed(tmp_path):
    model = tmp_path / "hello-pt" / "server" / "model.pt"
    model.parent.mkdir(parents=True)
    torch.save(create_model().state_dict(), model)
    args = job.parse_args(["--workspace", str(tmp_path), "--initial_ckpt", str(model)])
    make_room(args)
    assert (REPO / args.initial_ckpt).resolve() == args.earlier_run / "server" / "model.pt"
    assert (args.earlier_run / "server" / "model.pt").is_file()


# ---- One run in a workspace ----


def test_second_run_in_a_workspace_is_refused_by_the_lock_until_the_first_has_ended(tmp_path, capsys):
    (tmp_path / "hello-pt" / "server").mkdir(parents=True)
    with process_as_it_was(), only_run(tmp_path / "hello-pt"):
        before = content(tmp_path)
        with pytest.raises(SystemExit) as exit:
            job.main(["--workspace", str(tmp_path), *ENDS_SOON])
        at_work = (
            f"another job.py is at work in {tmp_path / 'hello-pt'}: wait for its end, or choose another --workspace"
        )
        assert (exit.value.code, capsys.readouterr()) == (1, ("", f"job.py: error: {at_work}\n"))
        assert content(tmp_path) == before
    with process_as_it_was(), only_run(tmp_path / "hello-pt"):
        pass


def make_socket(path):
    socket.socket(socket.AF_UNIX).bind(str(path))


@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.write_text("my own notes"),
        lambda path: path.symlink_to(path.with_name("thesis.tex")),
        lambda path: path.symlink_to(path.with_name("nothing")),
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: path.mkdir(),
        lambda path: os.mkfifo(path),
        make_socket,
    ],
    ids=["a file", "a link", "a link to nothing", "a link to a device", "a folder", "a FIFO", "a socket"],
)
def test_what_has_the_name_of_the_lock_is_left_alone(tmp_path, make, capsys):
    (tmp_path / "thesis.tex").write_text("precious")
    make(tmp_path / LOCK)
    before = {path.name: path.lstat()[:7] for path in tmp_path.iterdir()}  # kind, number, size and so on
    with pytest.raises(SystemExit) as exit:
        job.main(["--workspace", str(tmp_path), *ENDS_SOON])
    assert exit.value.code == 1
    assert re.fullmatch(r"job\.py: error: .+\n", capsys.readouterr().err)
    assert {path.name: path.lstat()[:7] for path in tmp_path.iterdir()} == before
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_signal_that_python_drops_is_raised_again():
    program = """
import os, signal, time
from support.process import ended_by_signals, process_as_it_was
os.register_at_fork(before=lambda: signal.raise_signal(signal.SIGTERM))  # where Python drops what a handler raises
with process_as_it_was(), ended_by_signals():
    if os.fork():
        time.sleep(1_000)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=REPO, timeout=100, capture_output=True, text=True)
    assert done.returncode == 128 + signal.SIGTERM and "Exception ignored in" in done.stderr


# ---- A notebook's kernel, or another program that calls job.main ----


def state():
    """Return what a run changes in its process."""
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    root = logging.getLogger()
    streams = [sys.stdin, sys.stdout, sys.stderr, getattr(sys.stdout, "errors", None)]
    log = [root.handlers[:], root.level, logging.root.manager.disable, logging.raiseExceptions]
    return [handlers, dict(os.environ), os.getcwd(), list(sys.path), list(sys.argv), *streams, *log]


def call_in_a_thread(main):
    thread = threading.Thread(target=main)
    thread.start()
    thread.join()


def call_in_asyncio(main):
    async def program():
        main()

    asyncio.run(program())


@pytest.mark.parametrize(
    "call", [lambda main: main(), call_in_a_thread, call_in_asyncio], ids=["", "thread", "asyncio"]
)
def test_job_main_leaves_its_process_as_it_was_also_the_second_time(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(RUN_VARIABLE, raising=False)
    previous = signal.signal(signal.SIGTERM, lambda number, frame: None)  # a program's own
    statuses = []
    (tmp_path / "damaged" / "startup").mkdir(parents=True)
    (tmp_path / "damaged" / "startup" / "fed_admin.json").write_text("{}")

    def main(*flags):
        with pytest.raises(SystemExit) as exit:
            job.main(["--workspace", "new", *flags])
        statuses.append(exit.value.code)

    try:
        with contextlib.redirect_stdout(io.StringIO()) as shown:  # no file, as in a notebook
            before = state()
            for _ in range(2):
                for flags in (["--train_size", "0"], ENDS_SOON, ["--env", "prod", "--startup_kit", "damaged"]):
                    call(functools.partial(main, *flags))
                    assert state() == before
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert statuses == [2, 1, 1] * 2
    assert shown.getvalue().count("Training on ") == 4
