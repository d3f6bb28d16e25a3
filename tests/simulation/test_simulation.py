"""Real simulations, run as a user runs them and read back from the files that they leave."""

import contextlib
import json
import os
import pty
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
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from conftest import REPO, TEST_IMAGES, Run, changed_client, copy_repo, run_job, same_weights, start_job

SITES = ["site-1", "site-2"]
SMALL = ["--train_size", "64", "--test_size", "100"]  # four steps an epoch
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # the bits of a sum depend on the number of threads


def scalars(run, site):
    """Return {tag: {step: value}} of a site's TensorBoard events."""
    events = EventAccumulator(str(run.results / "tb_events" / site))
    events.Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def cross_site_results(run):
    return json.loads((run.results / "cross_site_val" / "cross_val_results.json").read_text())


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return run_job(tmp_path_factory.mktemp("plain") / "workspace", *SMALL, **ONE_THREAD)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    workspace = tmp_path_factory.mktemp("evaluated") / "workspace"
    flags = [*SMALL, "--train_script", "client_with_eval.py", "--cross_site_eval"]
    return run_job(workspace, *flags, "--json", str(workspace.parent / "report.json"), **ONE_THREAD)


def test_training_alone_leaves_a_model_and_a_summary(plain):
    assert plain.status == 0, plain.errors
    assert (plain.results / "app_server" / "FL_global_model.pt").is_file()
    assert not (plain.results / "app_server" / "best_FL_global_model.pt").exists()
    summary = plain.output.partition("Done: 2 rounds on 2 sites.")[2]
    assert "Data: synthetic, 64 training samples a site, 100 test samples." in summary
    assert re.search(r"\n  train_loss .*\n(    round [12] +2\.\d{3} +2\.\d{3}\n){2}\n", summary)
    assert "accuracy" not in summary
    assert str(plain.results / "app_server" / "FL_global_model.pt") in summary
    assert f"\n  tensorboard --logdir {plain.results / 'tb_events'}\n" in summary
    assert summary.endswith("\nHow good is the model?\n  python job.py --train_script client_with_eval.py\n")


PROGRESS = {
    "a round begins": r"round [12]/2  begins",
    "an epoch": r"site-[12]  round [12]/2  epoch [12]/2  loss \d\.\d{4}  \d+ s",
    "a report": r"site-[12]  round [12]/2  reports train_loss \d\.\d+(, accuracy [\d.]+, loss \d\.\d+)?",
    "a mean": r"round [12]/2  averaged 2 local models",
}
EVALUATION = "the sites evaluate the models"


def progress(output):
    """Return the lines of a run between where NVFlare's logs are named and the summary."""
    lines = output.splitlines()
    (start,) = (i for i, line in enumerate(lines) if line.startswith("NVFlare's logs: "))
    return lines[start + 1 : lines.index("Done: 2 rounds on 2 sites.") - 1]


def test_output_fits_on_a_screen_and_each_line_of_progress_says_how_the_rounds_get_on(plain, evaluated):
    assert plain.output.count("\n") <= 40 and max(map(len, progress(plain.output))) <= 80
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


def test_evaluation_leaves_the_trained_weights_alone(plain, evaluated):
    assert evaluated.status == 0, evaluated.errors
    assert same_weights(plain.weights(), evaluated.weights())


@pytest.fixture(scope="module")
def one_by_one(tmp_path_factory):
    """A run in a terminal, which starts each client's process anew for every round, and all of its state with it."""
    workspace = tmp_path_factory.mktemp("one_by_one") / "workspace"
    screen, terminal = pty.openpty()
    job = start_job(workspace, *SMALL, "--num_threads", "1", output=terminal, **ONE_THREAD)
    os.close(terminal)
    output = b""
    with contextlib.suppress(OSError):  # the end, when the last process has closed it
        while read := os.read(screen, 4096):
            output += read
    os.close(screen)
    return Run(job.wait(), output.decode().replace("\r\n", "\n"), "", workspace / "hello-pt")


def test_one_client_at_a_time_trains_the_same_weights(plain, one_by_one):
    assert one_by_one.status == 0, one_by_one.output
    assert same_weights(plain.weights(), one_by_one.weights())


def test_output_in_a_terminal_is_that_in_a_file_but_for_seconds(plain, one_by_one):
    def lines(run):
        text = re.sub(r"  \d+ s$", "  s", run.output.replace(str(run.folder), "RUN"), flags=re.MULTILINE)
        return text.splitlines()

    assert plain.errors == "" and sorted(lines(plain)) == sorted(lines(one_by_one))  # sites differ in who is first
    assert lines(plain).index("Done: 2 rounds on 2 sites.") == lines(one_by_one).index("Done: 2 rounds on 2 sites.")


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
    best = {site: max(metrics["accuracy"] for metrics in results[site].values()) for site in SITES}
    for model in models:
        accuracy = {site: results[site][model]["accuracy"] for site in SITES}
        cells = " +".join(f"{accuracy[site]:#.4g}" + r"\*" * (accuracy[site] == best[site]) for site in SITES)
        assert re.search(rf"\n    {re.escape(model.removeprefix('SRV_'))} +{cells} ?\n", table)


def test_report_holds_what_the_summary_says(evaluated):
    report = json.loads((evaluated.folder.parent.parent / "report.json").read_text())
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
    best = report["best_model"]
    assert f"The best is {best['name']}: accuracy {best['accuracy']:#.4g} on average" in evaluated.output
    assert f"  {report['tensorboard_command']}\n" in evaluated.output
    for file in report["paths"]["models"]:
        assert f"  {file}\n" in evaluated.output and torch.load(file, weights_only=True)["model"]


def test_tensorboard_command_of_the_summary_shows_each_site_and_tag(evaluated):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [*shlex.split(evaluated.output.splitlines()[-1]), "--port", str(port)]
    assert command[0] == "tensorboard"
    command[0] = str(Path(sys.executable).with_name("tensorboard"))  # of this virtual environment
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        plugin = f"http://127.0.0.1:{port}/data/plugin/scalars"
        expected = {site: {"train_loss", "accuracy", "loss"} for site in SITES}
        end = time.monotonic() + 60
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


def test_best_local_model_is_handed_over(evaluated):
    for site in SITES:
        file = evaluated.folder / site / "simulate_job" / f"app_{site}" / "best_local_model.pt"
        assert torch.load(file, weights_only=True)["score"] == cross_site_results(evaluated)[site][site]["accuracy"]


def test_summary_names_the_better_global_model(evaluated):
    results = cross_site_results(evaluated)

    def accuracy(model):
        return sum(results[site][f"SRV_{model}"]["accuracy"] for site in SITES) / len(SITES)

    best = max(("FL_global_model.pt", "best_FL_global_model.pt"), key=accuracy)
    assert f"The best is {best}: accuracy {accuracy(best):#.4g} on average over the sites." in evaluated.output


def test_offline_default_run_learns_synthetic_images_and_says_so(offline, tmp_path):
    (tmp_path / "Größe-工作区").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "Größe-工作区")
    flags = ["--dataset", "auto", "--data_root", str(tmp_path / "data"), "--train_script", "client_with_eval.py"]
    run = run_job(tmp_path / "link", *flags, **offline)
    assert run.status == 0, run.errors
    assert "WARNING: training on SYNTHETIC images" in run.errors
    summary = run.output.partition("Done:")[2]
    assert "Data: synthetic, 5000 training samples a site, 1000 test samples." in summary and "WARNING" in summary
    first, second, final = (cross_site_accuracy for cross_site_accuracy in scalars(run, "site-1")["accuracy"].values())
    assert first < 20 < second < final and final >= 60


def test_offline_cifar10_is_one_clear_error(offline, tmp_path):
    run = run_job(tmp_path / "workspace", "--dataset", "cifar10", "--data_root", str(tmp_path / "data"), **offline)
    assert (run.status, run.output) == (1, "")
    assert re.fullmatch(r"job\.py: error: CIFAR-10 in .* is missing and can't be downloaded .+\n", run.errors)
    assert not run.folder.exists()


def test_client_with_eval_copied_over_client_downloads_and_evaluates(online, tmp_path):
    repo = copy_repo(tmp_path / "my copy")
    shutil.copy(REPO / "client_with_eval.py", repo / "client.py")
    flags = ["--dataset", "auto", "--data_root", str(tmp_path / "data"), "--train_size", "64", "--num_rounds", "1"]
    run = run_job(tmp_path / "workspace", *flags, repo=repo, **online)
    assert run.status == 0, run.errors
    assert "Data: cifar10, 64 training samples a site" in run.output
    for site in SITES:
        accuracy = cross_site_results(run)[site]["SRV_FL_global_model.pt"]["accuracy"]
        assert accuracy * TEST_IMAGES / 100 == round(accuracy * TEST_IMAGES / 100)  # of the small CIFAR-10


PRINTED = [
    "Größe \U0001f600 工作区",
    "  indented,\tand between \x1b[32mgreen\x1b[0m words",
    "2026-11-25 09:29:36,687 - INFO - like a record",
    "ERROR Rounds: like a record of ours",
    "launching external trainer, it says",
    "--- Logging error ---",
    "Traceback (most recent call last):",
    '  File "mine.py", line 1, in <module>',
    "long " * 4000 + "line",
    "the last one",
]


def test_script_elsewhere_that_prints_and_reports_what_is_odd_gets_its_summary(tmp_path):
    line = "                flare.send(flare.FLModel(metrics=metrics))"
    text = "\n\n".join(PRINTED)
    odd = f"""                if site_name == "site-2":
                    print({text!r})
                metrics = {{"accuracy": "high", "loss": None, "note": [1, 2], "mean": 1.5}}"""
    script = changed_client(tmp_path, "client_with_eval.py", line, odd)
    flags = [*SMALL, "--split", "iid", "--train_script", str(script)]
    run = run_job(tmp_path / "workspace", *flags)
    assert (run.status, run.errors) == (0, "")
    lines = progress(run.output)
    models = cross_site_results(run)["site-2"]
    # All of it but the empty lines, which NVFlare drops.
    assert lines[lines.index(EVALUATION) + 1 :] == PRINTED * len(models)
    assert run.output.endswith(f"tensorboard --logdir {run.results / 'tb_events'}\n")
    assert scalars(run, "site-1")["mean"] == {2: 1.5}
