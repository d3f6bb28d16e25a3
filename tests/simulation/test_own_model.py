"""Another network, other data, another metric: what docs/own-model-and-data.md says, done to copies of the program."""

import contextlib
import os
import pty
import re

import numpy as np
import pytest
import torch

from client_with_eval import LOCAL_MODEL
from conftest import Run, copy_repo, insert, replace, run_job, same_weights, start_job, succeed
from documentation import missing_lines
from reference import distance
from stages import MODEL, ONE_THREAD, scalars
from wine import (
    EVALUATE,
    OWN_FLAG,
    PAGE,
    REGRESSION,
    WINE,
    block_after,
    copy_with_wine,
    expected_wine,
    load_module,
    wine_flags,
)

SITES = ["site-1", "site-2"]
MODELS = ("FL_global_model.pt", "best_FL_global_model.pt")


@pytest.fixture(scope="module")
def wine(tmp_path_factory):
    """A copy of the repository with docs/own's files in it, and the page's own flag in both clients."""
    return copy_with_wine(tmp_path_factory.mktemp("wine") / "repo")


@pytest.fixture(scope="module")
def evaluated(wine):
    return run_job(wine.parent / "evaluated", *EVALUATE, *OWN_FLAG, repo=wine, **ONE_THREAD)


def test_wine_is_averaged_as_plain_pytorch_and_arithmetic_say_buffers_included(evaluated):
    assert (evaluated.status, evaluated.errors) == (0, "")
    expected = expected_wine(rounds=2)
    # NVFlare averages BatchNorm's count of batches, too: after 12 steps on site-1 and 2 on site-2 it is 10.57, as a
    # floating-point number. The server makes it 11, and after the next round it is the mean of 23 and 13, rounded.
    assert expected["0.num_batches_tracked"] == round((23 * 12 + 13 * 2) / 14) == 22
    assert evaluated.weights()["0.num_batches_tracked"].dtype == torch.int64
    assert distance(evaluated.weights(), expected) < 1e-6


@pytest.fixture(scope="module")
def one_by_one(wine):
    """The same in a terminal, with each client's process started anew for every round, and all of its state with it."""
    workspace = wine.parent / "one_by_one"
    screen, terminal = pty.openpty()
    flags = [*EVALUATE, *OWN_FLAG, "--num_threads", "1"]
    job = start_job(workspace, *flags, repo=wine, output=terminal, **ONE_THREAD)
    os.close(terminal)
    output = b""
    with contextlib.suppress(OSError):  # the end, when the last process has closed it
        while read := os.read(screen, 4096):
            output += read
    os.close(screen)
    return Run(job.wait(), output.decode().replace("\r\n", "\n"), "", workspace / "hello-pt")


def test_one_client_at_a_time_trains_the_same_weights_and_dropout_draws_the_same_bits(evaluated, one_by_one):
    assert one_by_one.status == 0, one_by_one.output
    assert same_weights(evaluated.weights(), one_by_one.weights())


def test_output_in_a_terminal_is_that_in_a_file_but_for_seconds(evaluated, one_by_one):
    def lines(run):
        text = re.sub(r"  \d+\.\d s$", "  s", run.output, flags=re.MULTILINE)
        return text.replace(str(run.folder.parent), "WORKSPACE").replace(" --num_threads 1", "").splitlines()

    assert sorted(lines(evaluated)) == sorted(lines(one_by_one))  # sites differ in who is first
    assert lines(evaluated).index("Done: 2 rounds on 2 sites.") == lines(one_by_one).index("Done: 2 rounds on 2 sites.")


def test_wine_goes_on_from_its_own_result(evaluated, wine):
    flags = [*OWN_FLAG, "--initial_ckpt", str(evaluated.folder / MODEL), "--num_rounds", "1"]
    run = run_job(wine.parent / "further", *flags, repo=wine, **ONE_THREAD)
    assert run.status == 0, run.errors
    assert distance(run.weights(), expected_wine(rounds=1, weights=evaluated.weights())) < 1e-6


def test_page_shows_what_the_example_prints(evaluated):
    (shown,) = re.findall(r"^```\n(Training on wine.*?)```", PAGE, re.DOTALL | re.MULTILINE)
    assert missing_lines(shown, evaluated.output) == []


def test_start_shows_wines_of_each_class_and_summary_follows_the_key_metric(evaluated):
    for site, test, training, *classes in (("site-1", 58, 100, 33, 37, 30), ("site-2", 58, 20, 7, 9, 4)):
        assert " ".join(map(str, [site, test, training, *classes])) in " ".join(evaluated.output.split())
    report = evaluated.report()
    assert report["key_metric"] == {"name": "loss", "mode": "min"}
    losses = {name: report["models"][name]["site-1"]["loss"] for name in MODELS}
    best = min(losses, key=losses.get)
    assert report["best_model"]["name"] == best
    assert report["best_model"]["loss"] == pytest.approx(losses[best])
    model = f"{best}, after round {2 if best == MODELS[0] else 1}"
    assert (
        f"The best is {model}: loss {losses[best]:#.4g} on average over the sites that reported it." in evaluated.output
    )


def test_sites_submit_their_latest_local_models(evaluated):
    model, data = load_module(WINE / "model.py"), load_module(WINE / "data.py")
    wines, labels = data.load_data(wine_flags(), "site-1")[1][:]
    report, network = evaluated.report(), model.create_model().eval()
    for site in SITES:
        folder = evaluated.folder / site / "simulate_job" / f"app_{site}"
        network.load_state_dict(torch.load(folder / LOCAL_MODEL, weights_only=True))
        with torch.no_grad():
            metrics = model.compute_metrics(network(wines), labels)
        for name, value in metrics.items():
            assert report["models"][site]["site-1"][name] == pytest.approx(value, rel=1e-5)


# ---- A regression, with everything about it that may be unusual ----

OWN_MODEL = f'''
import torch
from torch import nn

{REGRESSION}

class Autoencoder(nn.Module):
    """With tied and frozen parameters, and buffers of integers, booleans and infinity."""

    def __init__(self, width):
        super().__init__()
        self.encoder = nn.Linear(width, width, bias=False)
        self.decoder = nn.Linear(width, width, bias=False)
        self.decoder.weight = self.encoder.weight
        self.offset = nn.Parameter(torch.ones(width), requires_grad=False)
        self.norm = nn.BatchNorm1d(width, momentum=None)
        self.head = nn.Linear(width, 1)
        self.register_buffer("order", torch.arange(1_000_000))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("added_mask", torch.full((2,), -torch.inf))

    def forward(self, x):
        return self.head(self.norm(self.decoder(self.encoder(x)) + self.offset)).squeeze(1)


def create_model(seed=0):
    torch.manual_seed(seed)
    return Autoencoder(4)
'''

# What docs/own-model-and-data.md says of the files of each site, and flags of every kind.
OF_EACH_SITE = block_after("## Each site its own folder")
MAKE_LOADER = (WINE / "data.py").read_text().partition("def make_loader")[2]
OWN_DATA = f"""
import datetime
import zlib

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset


{OF_EACH_SITE}

def make_loader{MAKE_LOADER}
"""
OWN_FLAGS = """
    parser.add_argument("--columns", type=int, nargs="+")
    parser.add_argument("--since", type=datetime.date.fromisoformat)
    parser.add_argument("--shift", action="store_true")
    parser.add_argument("--no-scale", dest="scale", action="store_false")
"""
CHECK = """
    assert (args.columns, args.shift, args.scale) == ([0, 1, 2, 3], True, False)
    assert args.since == datetime.date(2026, 1, 31)
"""


def test_regression_with_a_folder_for_each_site_undefined_metrics_and_own_flags_trains_and_goes_on(tmp_path):
    repo = copy_repo(tmp_path / "repo")
    (repo / "model.py").write_text(OWN_MODEL)
    (repo / "data.py").write_text(OWN_DATA)
    insert(repo / "data.py", "def add_data_flags(parser):", OWN_FLAGS)
    insert(repo / "data.py", "def load_data(args, site):", CHECK)
    undefined = """            metrics["count"] = len(test_set)
            if current_round == 0:  # of the untrained model
                metrics |= {"R2": None} if site_name == "berlin" else {"MAE": float("nan")}
"""
    line = "            for name, value in metrics.items():\n"
    replace(repo / "client_with_eval.py", line, undefined + line)
    random, tables = torch.Generator().manual_seed(0), {}
    for site, train, test in (("berlin", 40, 20), ("oslo", 12, 7)):
        (tmp_path / site).mkdir()
        for part, count in (("train", train), ("test", test)):
            table = torch.randn(count, 5, generator=random) + torch.tensor([0, 0, 0, 0, 5])  # noise: R2 is below zero
            np.savetxt(tmp_path / site / f"{part}.csv", table, delimiter=",", header="a,b,c,d,label", comments="")
            tables[site, part] = table

    flags = ["--train_script", "client_with_eval.py", "--cross_site_eval", "--sites", "berlin", "oslo"]
    flags += ["--folder", f"{tmp_path}/{{site}}", "--batch_size", "4", "--lr", "0.001"]
    flags += ["--columns", "0", "1", "2", "3", "--shift", "--no-scale", "--since", "2026-01-31"]
    run = succeed(tmp_path / "workspace", *flags, repo=repo)

    shown = " ".join(run.output.split())
    assert "Samples test train berlin 20 40 oslo 7 12" in shown
    assert "\nData: tables.\n" in run.output
    report = run.report()
    assert report["settings"]["since"] == "2026-01-31"
    assert report["data"]["sites"]["oslo"] == {"train_size": 12, "test_size": 7, "class_counts": {}}
    for name in ("train_loss", "R2", "MAE", "count"):
        assert f"\n  {name} " in run.output
    rounds = report["rounds"]
    assert [round["berlin"]["count"] for round in rounds] == [20, 20]
    assert [round["oslo"]["count"] for round in rounds] == [7, 7]
    assert "R2" not in rounds[0]["berlin"] and "MAE" not in rounds[0]["oslo"]
    assert re.search(rf"\n  R2 .*\n    round 1 +- +{rounds[0]['oslo']['R2']:#.4g}\n", run.output)
    assert re.search(rf"\n  MAE .*\n    round 1 +{rounds[0]['berlin']['MAE']:#.4g} +-\n", run.output)
    models = [report["models"][name] for name in (*MODELS, "berlin", "oslo")]
    for site in ("berlin", "oslo"):
        best = max(model[site]["R2"] for model in models)
        assert best < 0
        assert f"{best:#.4g}" in run.output.partition("Each model (row)")[2]
        assert set(scalars(run, site)) == {"train_loss", "R2", "MAE", "count"}

    model = load_module(repo / "model.py")
    weights, initial = run.weights(), model.create_model(0).state_dict()
    assert torch.equal(weights["encoder.weight"], weights["decoder.weight"])
    for name in ("order", "mask", "added_mask", "offset"):  # the same on all sites, and so in their mean
        assert torch.equal(weights[name], initial[name]) and weights[name].dtype == initial[name].dtype

    # The last column is the label.
    network = model.create_model().eval()
    network.load_state_dict(weights)
    for site in ("berlin", "oslo"):
        table = tables[site, "test"]
        with torch.no_grad():
            metrics = model.compute_metrics(network(table[:, :4]), table[:, 4])
        for name, value in metrics.items():
            assert report["models"]["FL_global_model.pt"][site][name] == pytest.approx(value, rel=1e-4)

    succeed(tmp_path / "workspace", *flags, "--initial_ckpt", str(run.folder / MODEL), "--num_rounds", "1", repo=repo)
