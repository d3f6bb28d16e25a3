"""Another network, other data, another metric: what docs/own-model-and-data.md says, done to copies of the program."""

import difflib
import json
import re

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from conftest import REPO, copy_repo, run_job, same_weights
from reference import distance
from stages import MODEL
from wine import (
    DATA_DIFF,
    EVALUATE,
    MODEL_DIFF,
    OWN_FLAG,
    REGRESSION,
    WINE,
    apply,
    copy_with_wine,
    expected_wine,
    load_module,
)

SITES = ["site-1", "site-2"]
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def diff(old, new):
    """Return how a file differs from another; of more than two removed lines in a row, only the first two."""
    lines, removed = [], 0
    for line in list(difflib.unified_diff(old.splitlines(), new.splitlines(), lineterm="", n=1000))[3:]:
        removed = removed + 1 if line.startswith("-") else 0
        if removed <= 3:
            lines.append("-    ..." if removed == 3 else line.rstrip())
    return "".join(f"{line}\n" for line in lines)


@pytest.mark.parametrize("name, shown", [("model.py", MODEL_DIFF), ("data.py", DATA_DIFF)])
def test_page_shows_how_the_example_differs(name, shown):
    assert shown == diff((REPO / name).read_text(), (WINE / name).read_text())


@pytest.fixture(scope="module")
def wine(tmp_path_factory):
    """A copy of the repository with docs/wine's files in it, and the page's own flag in both clients."""
    return copy_with_wine(tmp_path_factory.mktemp("wine") / "repo")


@pytest.fixture(scope="module")
def evaluated(wine):
    flags = [*EVALUATE, *OWN_FLAG, "--json", str(wine.parent / "report.json")]
    return run_job(wine.parent / "evaluated", *flags, repo=wine, **ONE_THREAD)


def test_wine_is_averaged_as_plain_pytorch_and_arithmetic_say_buffers_included(evaluated):
    assert (evaluated.status, evaluated.errors) == (0, "")
    expected = expected_wine(rounds=2)
    # NVFlare averages BatchNorm's count of batches, too: after 12 steps on site-1 and 2 on site-2 it is 10.57, as a
    # floating-point number. The server makes it 11, and after the next round it is the mean of 23 and 13, rounded.
    assert expected["0.num_batches_tracked"] == round((23 * 12 + 13 * 2) / 14) == 22
    assert evaluated.weights()["0.num_batches_tracked"].dtype == torch.int64
    assert distance(evaluated.weights(), expected) < 1e-6


def test_dropout_draws_the_same_bits_in_every_run_and_with_evaluation(evaluated, wine):
    # One client at a time: each client's process is started anew for every round, and all of its state with it.
    plain = run_job(wine.parent / "plain", *OWN_FLAG, "--num_threads", "1", repo=wine, **ONE_THREAD)
    assert plain.status == 0, plain.errors
    assert same_weights(plain.weights(), evaluated.weights())


def test_wine_goes_on_from_its_own_result(evaluated, wine):
    flags = [*OWN_FLAG, "--initial_ckpt", str(evaluated.folder / MODEL), "--num_rounds", "1"]
    run = run_job(wine.parent / "further", *flags, repo=wine, **ONE_THREAD)
    assert run.status == 0, run.errors
    assert distance(run.weights(), expected_wine(rounds=1, weights=evaluated.weights())) < 1e-6


def test_start_shows_wines_of_each_class_and_summary_follows_the_key_metric(evaluated):
    for site, test, training, *classes in (("site-1", 58, 100, 33, 37, 30), ("site-2", 58, 20, 7, 9, 4)):
        assert " ".join(map(str, [site, test, training, *classes])) in " ".join(evaluated.output.split())
    report = json.loads((evaluated.folder.parents[1] / "report.json").read_text())
    assert report["key_metric"] == {"name": "loss", "mode": "min"}
    losses = {name: by_site["site-1"]["loss"] for name, by_site in report["models"].items()}
    table = evaluated.output.partition("Each model (row)")[2]
    for name, loss in losses.items():
        star = r"\*" if loss == min(losses.values()) else " "
        assert re.search(rf"\n    {re.escape(name)} +{loss:#.4g}{star}", table)
    best = min(("FL_global_model.pt", "best_FL_global_model.pt"), key=losses.get)
    assert report["best_model"] == {"name": best, "loss": pytest.approx(losses[best])}
    assert f"The best is {best}: loss {losses[best]:#.4g} on average over the sites." in evaluated.output


# ---- A regression, with everything about it that may be unusual ----

OWN_MODEL = '''
import torch
from torch import nn

KEY_METRIC = ("R2", "max")


class Autoencoder(nn.Module):
    """With tied and frozen parameters, and buffers of integers and booleans."""

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

    def forward(self, x):
        return self.head(self.norm(self.decoder(self.encoder(x)) + self.offset)).squeeze(1)


def create_model(seed=0):
    torch.manual_seed(seed)
    return Autoencoder(4)
'''

OWN_DATA = """
import zlib

import torch
from torch.utils.data import DataLoader, Dataset


class Table(Dataset):
    def __init__(self, file):
        self.lines = open(file).read().splitlines()

    def __len__(self):
        return len(self.lines)

    def __getitem__(self, i):
        *features, target = map(float, self.lines[i].split(","))
        return torch.tensor(features), torch.tensor(target)


def add_data_flags(parser):
    parser.add_argument("--data_root", required=True)
    parser.add_argument("--columns", type=int, nargs="+")
    parser.add_argument("--shift", action="store_true")
    parser.add_argument("--no-scale", dest="scale", action="store_false")


def check_data_flags(args):
    pass


def prepare_data(args):
    return "tables", ""


def load_data(args, site):
    assert (args.columns, args.shift, args.scale) == ([0, 1, 2, 3], True, False)
    folder = args.data_root.replace("{site}", site)
    return Table(f"{folder}/train.csv"), Table(f"{folder}/test.csv")


def make_loader(dataset, batch_size, shuffle_by=None):
    if shuffle_by:
        torch.manual_seed(zlib.crc32(" ".join(map(str, shuffle_by)).encode()))
    return DataLoader(dataset, batch_size, shuffle=shuffle_by is not None)
"""


NUMBER_OF_ROUND = (
    "            current_round, num_rounds = global_model.current_round, global_model.total_rounds  # (9) from 0\n"
)


def test_regression_with_a_folder_for_each_site_a_metric_below_zero_and_an_own_flag(tmp_path):
    repo = copy_repo(tmp_path / "repo")
    (repo / "model.py").write_text(OWN_MODEL)
    (repo / "data.py").write_text(OWN_DATA)
    apply(REGRESSION, repo / "client_with_eval.py")
    script = (repo / "client_with_eval.py").read_text()
    no_number = 'None if site_name == "site-1" else float("nan")'  # of the untrained model
    for line, more in [
        ("            metrics = evaluate(model, test_loader, device)\n", 'metrics["count"] = len(test_set)'),
        (NUMBER_OF_ROUND, f'metrics["R2"] = {no_number}'),
    ]:
        assert script.count(line) == 1
        condition = "if current_round == 0: " if "R2" in more else ""
        script = script.replace(line, f"{line}            {condition}{more}\n")
    (repo / "client_with_eval.py").write_text(script)
    random = torch.Generator().manual_seed(0)
    for site, train, test in (("site-1", 40, 20), ("site-2", 12, 7)):
        (tmp_path / site).mkdir()
        for name, count in (("train", train), ("test", test)):
            rows = torch.randn(count, 5, generator=random) + torch.tensor([0, 0, 0, 0, 5])  # noise: R2 is below zero
            lines = "".join(",".join(map(str, row)) + "\n" for row in rows.tolist())
            (tmp_path / site / f"{name}.csv").write_text(lines)

    flags = ["--train_script", "client_with_eval.py", "--cross_site_eval", "--data_root", str(tmp_path / "{site}")]
    flags += ["--batch_size", "4", "--lr", "0.001", "--columns", "0", "1", "2", "3", "--shift", "--no-scale"]
    run = run_job(tmp_path / "workspace", *flags, "--json", str(tmp_path / "report.json"), repo=repo)
    assert (run.status, run.errors) == (0, "")

    shown = " ".join(run.output.split())
    assert "Samples test train site-1 20 40 site-2 7 12" in shown
    assert "Data: tables, 12 to 40 training samples a site, 7 to 20 test samples." in run.output
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["data"]["sites"]["site-2"] == {"train_size": 12, "test_size": 7, "class_counts": {}}
    for name in ("train_loss", "R2", "loss", "count"):
        assert f"\n  {name} " in run.output
    final = report["models"]["FL_global_model.pt"]
    assert final["site-1"]["count"] == 20 and final["site-2"]["count"] == 7
    models = [report["models"][name] for name in ("FL_global_model.pt", "best_FL_global_model.pt", *SITES)]
    for site in SITES:
        best = max(model[site]["R2"] for model in models)
        assert best < 0
        assert f"{best:#.4g}*" in run.output.partition("Each model (row)")[2]
        events = EventAccumulator(str(run.results / "tb_events" / site)).Reload()
        assert set(events.Tags()["scalars"]) == {"train_loss", "R2", "loss", "count"}

    weights, initial = run.weights(), load_module(repo / "model.py").create_model(0).state_dict()
    assert torch.equal(weights["encoder.weight"], weights["decoder.weight"])
    for name in ("order", "mask", "offset"):  # the same on all sites, and so in their mean
        assert torch.equal(weights[name], initial[name]) and weights[name].dtype == initial[name].dtype
