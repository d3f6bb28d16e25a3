"""What is kept from harm, as far as it can be seen without a run."""

import argparse
import os
import re
import shutil
import socket
import time
from pathlib import Path

import pytest
import torch
from nvflare.apis.fl_constant import ReservedKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.abstract.model import make_model_learnable
from nvflare.app_common.aggregators.weighted_aggregation_helper import WeightedAggregationHelper
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.utils.fl_model_utils import FLModelUtils
from nvflare.app_common.workflows.fedavg import FedAvg

from support.failure import JobFailed, one_line
from support.folder import MARK, MODEL, is_free, keep_earlier_results, lock_file
from support.places import workspace_folder
from support.progress import TRAINER, to_show
from support.results import read_results
from support.server import WholeLocalModels, check_steps, check_weights


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
        read_results(argparse.Namespace(num_rounds=1), str(tmp_path), ("accuracy", "max"))
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
            os.setuid(user)
            try:
                workspace_folder(str(workspace))
                os._exit(0)
            except ValueError:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (2 if refused else 0)


# ---- A run's folder ----


def make_room(run_folder):
    keep_earlier_results(argparse.Namespace(run_folder=run_folder, initial_ckpt=None, export=False))


def test_folder_that_job_py_did_not_make_is_refused_and_left_alone(tmp_path):
    run_folder = tmp_path / "hello-pt"
    precious = run_folder / "server" / "main.py"
    precious.parent.mkdir(parents=True)
    precious.write_text("precious")
    with pytest.raises(ValueError, match=re.escape(f"{run_folder} was not made by job.py: move it")):
        workspace_folder(str(tmp_path))
    with pytest.raises(OSError, match=r"was not made by job\.py"):
        make_room(run_folder)
    assert precious.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [run_folder]


@pytest.mark.parametrize(
    "change, kept",
    [
        (lambda folder: None, False),
        (lambda folder: (folder / "site-1" / "notes.txt").write_text("mine"), True),
        (lambda folder: (folder / MARK).unlink(), "refused"),
        (lambda folder: [(folder / MODEL.replace("**", "x")).parent.mkdir(parents=True), results(folder)], True),
        (lambda folder: [shutil.move(folder, folder.with_name("old")), folder.symlink_to("old")], True),
    ],
    ids=["untouched", "a file put in", "no mark", "a result", "a link"],
)
def test_folder_of_a_run_is_deleted_only_if_it_has_no_result_and_nobody_changed_it(tmp_path, change, kept):
    run_folder = tmp_path / "hello-pt"
    make_room(run_folder)
    (run_folder / "site-1").mkdir()
    (run_folder / "site-1" / "log.txt").write_text("NVFlare's")
    (run_folder / MARK).touch()  # as a run does at its end
    time.sleep(0.02)  # the clock of a file system ticks slowly
    change(run_folder)
    before = len(list(run_folder.rglob("*")))
    if kept == "refused":
        assert not is_free(run_folder)
        return
    for times in range(1, 3 if kept else 2):  # the second time, the first's name is taken
        copy = shutil.copytree(run_folder, tmp_path / "copy", symlinks=True)
        make_room(run_folder)
        folders = list(tmp_path.glob("hello-pt-*"))
        assert [len(list(folder.rglob("*"))) for folder in folders] == [before] * (times if kept else 0)
        assert sorted(path.name for path in run_folder.rglob("*")) == ["local", "made-by-job.py"]
        shutil.rmtree(run_folder)
        shutil.move(copy, run_folder)


def results(folder):
    (folder / MODEL.replace("**", "x")).write_text("a model")
    (folder / MARK).touch()


def make_socket(path):
    socket.socket(socket.AF_UNIX).bind(str(path))


@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.write_text("my own notes"),
        lambda path: path.symlink_to(path.with_name("thesis.tex")),
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: path.mkdir(),
        lambda path: os.mkfifo(path),
        make_socket,
    ],
    ids=["a file", "a link", "a link to a device", "a folder", "a FIFO", "a socket"],
)
def test_what_has_the_name_of_the_lock_is_refused_and_left_alone(tmp_path, make):
    (tmp_path / "thesis.tex").write_text("precious")
    lock = tmp_path / "hello-pt.lock"
    make(lock)
    with pytest.raises(OSError, match=re.escape(str(lock)) + ".*: move it, or choose another --workspace"):
        lock_file(lock)
    assert (tmp_path / "thesis.tex").read_text() == "precious"
    assert not lock.is_file() or lock.read_text() in ("my own notes", "precious")


def test_lock_of_job_py_is_taken_again(tmp_path):
    for content in ("", "4711 (job.py)\n"):
        (tmp_path / "hello-pt.lock").write_text(content)
        with lock_file(tmp_path / "hello-pt.lock") as lock:
            assert lock.read() == content


# ---- What the server refuses ----

GLOBAL = {"weight": torch.ones(2, 2), "mask": torch.tensor([0.0, -torch.inf]), "count": torch.tensor(3)}


def test_whole_local_model_is_taken():
    check_weights({name: value.numpy() for name, value in GLOBAL.items()}, GLOBAL)
    for steps in (None, 1, 2.5, 10**9):
        check_steps(steps)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"weight": None}, "lacks weight$"),
        ({"weight": torch.ones(4)}, r"weight has the shape \(4,\), not \(2, 2\)"),
        ({"weight": torch.tensor([[1, torch.nan], [1, 1]])}, "weight isn't finite: training diverged"),
        ({"weight": torch.full((2, 2), 1e300, dtype=torch.float64)}, "weight isn't finite: training diverged"),
        ({"count": torch.tensor(torch.nan)}, "count isn't finite: training diverged"),
        ({"weight": "ones"}, "weight is no tensor"),
        ({"extra": torch.ones(1)}, "has extra, which the global model doesn't have"),
    ],
)
def test_local_model_that_is_not_whole_is_refused(change, reason):
    weights = {name: value for name, value in {**GLOBAL, **change}.items() if value is not None}
    with pytest.raises(ValueError, match=reason):
        check_weights(weights, GLOBAL)


@pytest.mark.parametrize("steps", [0, -5, float("nan"), float("inf"), "many", True, [3]])
def test_number_of_steps_that_is_none_is_refused(steps):
    with pytest.raises(ValueError, match="no positive number"):
        check_steps(steps)


def received(model, return_code=ReturnCode.OK, spare=True):
    """Return what WholeLocalModels makes of a local model from site-2, as it arrives at the server."""
    result, fl_ctx, peer = FLModelUtils.to_shareable(model), FLContext(), FLContext()
    result.set_return_code(return_code)
    peer.set_prop(ReservedKey.IDENTITY_NAME, "site-2")
    fl_ctx.set_peer_context(peer)
    fl_ctx.set_prop(AppConstants.GLOBAL_MODEL, make_model_learnable(GLOBAL, {}))
    return WholeLocalModels(spare).process(result, fl_ctx)


def is_averaged(result):
    """Tell whether NVFlare's FedAvg takes a result into its mean."""
    controller = FedAvg(num_clients=2)
    controller.fl_ctx, controller.current_round = FLContext(), 0
    controller._aggr_helper, controller._aggr_metrics_helper = WeightedAggregationHelper(), WeightedAggregationHelper()
    return controller._aggregate_one_result(FLModelUtils.from_shareable(result))


@pytest.mark.parametrize(
    "change, meta, return_code, reason",
    [
        ({"weight": torch.ones(4)}, {}, "OK", "its local model's weight has the shape (4,), not (2, 2)"),
        ({"weight": torch.full((2, 2), torch.nan)}, {}, "OK", "its local model's weight isn't finite"),
        ({"x\n\x1b[2J" * 1000: torch.ones(1)}, {}, "OK", "its local model has x [2Jx [2Jx"),
        ({}, {"NUM_STEPS_CURRENT_ROUND": -1}, "OK", "its NUM_STEPS_CURRENT_ROUND is -1, which is no positive number"),
        ({}, {}, "EXECUTION_EXCEPTION", "its client says EXECUTION_EXCEPTION"),
    ],
)
def test_bad_model_of_a_site_that_can_be_spared_is_passed_over_and_a_line_says_why(
    change, meta, return_code, reason, caplog
):
    result = received(FLModel(params={**GLOBAL, **change}, meta=meta), return_code)
    (line,) = caplog.messages
    assert line.startswith(f"site-2  refused: {reason}") and len(line) < 400 and line.isprintable()
    assert to_show(caplog.records[0].name.rpartition(".")[2], line) == line
    assert not is_averaged(result)


def test_good_model_of_a_site_that_can_be_spared_is_averaged(caplog):
    assert is_averaged(received(FLModel(params=GLOBAL, meta={"NUM_STEPS_CURRENT_ROUND": 3})))
    assert caplog.messages == []


def test_bad_model_of_a_site_that_is_needed_ends_the_job():
    with pytest.raises(ValueError, match="weight is no tensor"):
        received(FLModel(params={**GLOBAL, "weight": "ones"}), spare=False)


def test_site_can_colour_what_it_prints_and_do_nothing_else_to_a_terminal():
    printed = "\x1b[32mgreen\x1b[0m\tGröße\x1b[2J\x1b]0;title\x07\x9b2J\r\x08\nline"
    assert to_show(TRAINER, printed) == "\x1b[32mgreen\x1b[0m\tGröße[2J]0;title2Jline"
    assert one_line(printed) == "green Größe [2J ]0;title 2J line"  # in the last line, not even that
