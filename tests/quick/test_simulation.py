"""What the program promises, shown by three real simulations, which are run as a user runs them."""

import contextlib
import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch

from client_with_eval import LOCAL_MODEL, evaluate
from conftest import REPO, data_flags, finish, run_job, running, same_weights, start_job, wait_until
from data import load_data, make_loader
from model import create_model
from reference import distance, fedavg, images_of_sites
from stages import (
    ENDLESS,
    EVALUATION,
    MODEL,
    ONE_THREAD,
    contents,
    cross_site_results,
    in_training,
    progress,
    scalars,
    trainer,
)

SITES = ["site-1", "site-2"]
SMALL = ["--train_size", "64", "--test_size", "100"]  # four steps an epoch


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return run_job(tmp_path_factory.mktemp("plain") / "workspace", *SMALL, **ONE_THREAD)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    workspace = tmp_path_factory.mktemp("evaluated") / "workspace"
    flags = [*SMALL, "--train_script", "client_with_eval.py", "--cross_site_eval"]
    return run_job(workspace, *flags, **ONE_THREAD)


def test_training_alone_leaves_a_model_and_a_summary(plain):
    assert plain.status == 0, plain.errors
    model = plain.results / "app_server" / "FL_global_model.pt"
    assert model.is_file()
    assert not (plain.results / "app_server" / "best_FL_global_model.pt").exists()
    summary = plain.output.partition("Done: 2 rounds on 2 sites.")[2]
    assert "\nData: synthetic.\n" in summary
    assert re.search(r"\n  train_loss .*\n(    round [12] +2\.\d{3} +2\.\d{3}\n){2}\n", summary)
    assert "accuracy" not in summary
    assert str(model) in summary
    assert f"\n  tensorboard --logdir {plain.results / 'tb_events'}\n" in summary
    command = f"python job.py --dataset synthetic --workspace {plain.folder.parent} {' '.join(SMALL)}"
    assert summary.endswith(
        f"\nHow good is the model? Train again, and test it:\n  {command} --train_script client_with_eval.py\n"
    )


PROGRESS = {
    "a round begins": r"round [12]/2  begins",
    "an epoch": r"site-[12]  round [12]/2  epoch [12]/2  loss \d\.\d{4}  \d+\.\d s",
    "a report": r"site-[12]  round [12]/2  reports train_loss \d\.\d+(, accuracy [\d.]+, loss \d\.\d+)?",
    "a mean": r"round [12]/2  averaged 2 local models",
}


def test_output_fits_on_a_screen_and_each_line_of_progress_says_how_the_rounds_get_on(plain, evaluated):
    assert plain.output.count("\n") <= 42 and max(map(len, progress(plain.output))) <= 80
    expected = {"a round begins": 2, "an epoch": 8, "a report": 4, "a mean": 2}
    for run, more in ((plain, []), (evaluated, [EVALUATION])):
        lines = progress(run.output)
        found = {kind: [line for line in lines if re.fullmatch(text, line)] for kind, text in PROGRESS.items()}
        assert {kind: len(set(of_kind)) for kind, of_kind in found.items()} == expected
        assert [line for line in lines if not any(line in of_kind for of_kind in found.values())] == more
        assert lines[0] == "round 1/2  begins" and lines[-1] == (more or ["round 2/2  averaged 2 local models"])[0]


def test_nothing_alarms_a_user(plain, evaluated):
    for run in (plain, evaluated):
        assert "Traceback" not in run.output + run.errors
        assert not re.search("warning|error", run.output + run.errors, re.IGNORECASE)


def test_global_model_is_what_plain_pytorch_and_a_mean_give(plain):
    expected = fedavg(images_of_sites([range(64)] * 2, seed=0, size=64), rounds=2, seed=0)
    assert distance(plain.weights(), expected) < 1e-6


def test_evaluation_leaves_the_trained_weights_alone(plain, evaluated):
    assert evaluated.status == 0, evaluated.errors
    assert same_weights(plain.weights(), evaluated.weights())


def test_train_loss_is_logged_at_every_step_of_a_small_run(plain, evaluated):
    for run in (plain, evaluated):
        for site in SITES:
            assert sorted(scalars(run, site)["train_loss"]) == list(range(1, 17))


def test_global_model_is_logged_for_every_round_and_at_the_end(evaluated):
    for site in SITES:
        final = cross_site_results(evaluated)[site]["SRV_FL_global_model.pt"]
        for tag in ("accuracy", "loss"):
            points = scalars(evaluated, site)[tag]
            assert sorted(points) == [0, 1, 2]
            assert points[2] == pytest.approx(final[tag])


def test_metrics_of_every_round_and_site_are_recorded(plain, evaluated):
    for run, names in ((plain, {"train_loss"}), (evaluated, {"train_loss", "accuracy", "loss"})):
        rounds = [json.loads(line) for line in (run.results / "metrics" / "round_metrics.jsonl").open()]
        assert [record["round"] for record in rounds] == [0, 1]
        for record in rounds:
            assert {site["name"] for site in record["sites"]} == set(SITES)
            assert all({metric["name"] for metric in site["metrics"]} == names for site in record["sites"])
            assert all(site["weight"] == 8 for site in record["sites"])


def test_cross_site_evaluation_has_every_model_on_every_site(evaluated):
    models = {"SRV_FL_global_model.pt", "SRV_best_FL_global_model.pt", *SITES}
    results = cross_site_results(evaluated)
    assert set(results) == set(SITES) and all(set(results[site]) == models for site in SITES)
    table = evaluated.output.partition("Each model (row) on each site's test data (column)")[2]
    for metric in ("accuracy", "loss"):
        rows = re.search(rf"\n  {metric} .*((?:\n    .+)+)", table)[1]
        assert rows.count("\n") == len(models)
        for model in models:
            cells = " +".join(f"{results[site][model][metric]:#.4g}" for site in SITES)
            assert re.search(rf"\n    {re.escape(model.removeprefix('SRV_'))} +{cells}(\n|$)", rows)


def test_summary_json_holds_what_the_summary_says(evaluated):
    report = evaluated.report()
    assert report["settings"]["train_script"] == str(REPO / "client_with_eval.py")
    assert report["settings"]["num_rounds"] == 2 and report["settings"]["lr"] == 0.01
    data = report["data"]
    assert data["name"] == "synthetic" and data["warning"] == "" and list(data["sites"]) == SITES
    for site in data["sites"].values():
        assert (site["train_size"], site["test_size"]) == (64, 100) and sum(site["class_counts"].values()) == 64
    results = cross_site_results(evaluated)
    for site in SITES:
        for round, metrics in enumerate(report["rounds"]):
            assert metrics[site]["accuracy"] == pytest.approx(scalars(evaluated, site)["accuracy"][round])
            assert all(f" {value:#.4g}" in evaluated.output for value in metrics[site].values())
        assert {model: by_site[site] for model, by_site in report["models"].items()} == {
            model.removeprefix("SRV_"): metrics for model, metrics in results[site].items()
        }
    assert f"  {report['tensorboard_command']}\n" in evaluated.output
    for file in report["paths"]["models"]:
        assert f"  {file}\n" in evaluated.output and torch.load(file, weights_only=True)["model"]


def test_tensorboard_command_of_the_summary_shows_each_site_and_tag(evaluated):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (line,) = re.findall(r"^  (tensorboard .*)$", evaluated.output, re.MULTILINE)
    command = [*shlex.split(line), "--port", str(port)]
    assert command[0] == "tensorboard"
    command[0] = str(Path(sys.executable).with_name("tensorboard"))  # of this virtual environment
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        plugin = f"http://127.0.0.1:{port}/data/plugin/scalars"
        expected = {site: {"train_loss", "accuracy", "loss"} for site in SITES}
        end = time.monotonic() + 300
        tags = {}
        while {run: set(found) for run, found in tags.items()} != expected:
            assert server.poll() is None and time.monotonic() < end, (tags, server.communicate())
            time.sleep(0.5)
            with contextlib.suppress(OSError):
                tags = json.load(urllib.request.urlopen(f"{plugin}/tags"))
        for site in SITES:
            for tag in expected[site]:
                points = json.load(urllib.request.urlopen(f"{plugin}/scalars?run={site}&tag={tag}"))
                shown = {}  # with a point that NVFlare delivers late, TensorBoard drops those of later steps before it
                for step, value in scalars(evaluated, site)[tag].items():
                    shown = {s: v for s, v in shown.items() if s < step} | {step: value}
                assert {step: value for _, step, value in points} == pytest.approx(shown)
    finally:
        server.kill()
        server.communicate()


def test_latest_local_model_is_handed_over(evaluated):
    models = []
    for site in SITES:
        folder = evaluated.folder / site / "simulate_job" / f"app_{site}"
        models.append(torch.load(folder / LOCAL_MODEL, weights_only=True))
        model = create_model()
        model.load_state_dict(models[-1])
        _, test_set = load_data(data_flags(train_size=64, test_size=100), site)
        metrics = evaluate(model, make_loader(test_set, batch_size=100), "cpu")
        for receiver in SITES:  # all have the same test images
            assert cross_site_results(evaluated)[receiver][site] == pytest.approx(metrics, rel=1e-5)
    mean = {name: (models[0][name] + models[1][name]) / 2 for name in models[0]}
    assert distance(evaluated.weights(), mean) < 1e-6  # so they are those of the last round


def test_summary_names_the_better_global_model(evaluated):
    results = cross_site_results(evaluated)

    def accuracy(model):
        return sum(results[site][f"SRV_{model}"]["accuracy"] for site in SITES) / len(SITES)

    best = max(("FL_global_model.pt", "best_FL_global_model.pt"), key=accuracy)  # of equals, the later one
    report = evaluated.report()
    assert report["best_model"] == {
        "name": best,
        "accuracy": pytest.approx(accuracy(best)),
        "round": 2 if best == "FL_global_model.pt" else 1,
    }
    model = f"{best}, after round {report['best_model']['round']}"
    line = f"The best is {model}: accuracy {accuracy(best):#.4g} on average over the sites that reported it.\n"
    assert line in evaluated.output


def test_killed_trainer_ends_the_run_with_the_name_of_its_site_and_the_run_before_is_kept(plain, workspace):
    shutil.copytree(plain.folder, workspace / "hello-pt")
    before = contents(workspace / "hello-pt")
    job = start_job(workspace, *ENDLESS)
    wait_until(lambda: list(workspace.glob("hello-pt-*")) and in_training(workspace), job)
    trainer(workspace, "site-2").kill()
    start = time.monotonic()
    run = finish(job, workspace)
    assert run.status == 1 and time.monotonic() - start < 50  # NVFlare's own shutdown takes a minute
    log = run.folder / "site-2" / "log.txt"
    assert run.errors == f"job.py: error: site-2 failed: its script was killed by SIGKILL (see {log})\n"
    assert log.is_file() and not (run.folder / MODEL).exists()
    assert running(workspace.parent) == []
    (kept,) = workspace.glob("hello-pt-*")
    assert f"\nThe results of the run before are kept in {kept}\n" in run.output
    assert contents(kept) == before
