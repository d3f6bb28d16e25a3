"""What the tables show of data and metrics of any kind, and which model is called the best."""

import argparse
import json

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset
from torchvision.datasets import FakeData

from support import results, summary
from support.results import BEST_MODEL, FINAL_MODEL, read_evaluation, read_results
from support.summary import class_counts, print_metrics, show_data
from support.tables import print_table


class Samples(Dataset):
    """A data set of which no sample can be read, with the targets and classes that it is given."""

    def __init__(self, size, **labels):
        self.size = size
        vars(self).update(labels)

    def __len__(self):
        return self.size


@pytest.mark.parametrize(
    "dataset, counts",
    [
        (Samples(4, targets=torch.tensor([0, 2, 2, 1])), {"0": 1, "1": 1, "2": 2}),
        (Samples(3, targets=[1, 0, 1]), {"0": 1, "1": 2}),
        (Samples(3, targets=np.array([1, 0, 1], dtype=np.uint8)), {"0": 1, "1": 2}),
        (
            Samples(3, targets=[1, 1, 2], classes=["cat", "dog", "frog", "hen"]),
            {"cat": 0, "dog": 2, "frog": 1, "hen": 0},
        ),
        (Samples(3, targets=[1, 1, 2], classes=["cat"]), {"cat": 0, "1": 2, "2": 1}),
        (Subset(Samples(4, targets=torch.tensor([0, 2, 2, 1])), [1, 2]), {"0": 0, "1": 0, "2": 2}),
        (Subset(Subset(Samples(3, targets=[1, 1, 2], classes=["a", "b", "c"]), [0, 2]), [1]), {"a": 0, "b": 0, "c": 1}),
        (Samples(4), {}),
        (TensorDataset(torch.zeros(4, 2), torch.tensor([0, 2, 2, 1])), {}),
        (ConcatDataset([Samples(1, targets=[1]), Samples(1, targets=[0])]), {}),
        (Samples(2, targets=["cat", "dog"]), {}),
        (Samples(2, targets=[1.5, 2]), {}),
        (Samples(2, targets=[-1, 2]), {}),
        (Samples(2, targets=[20_240_101, 2]), {}),
        (Samples(1, targets=torch.zeros(1, 3, 3, dtype=torch.int64)), {}),
        (Samples(1, targets=[None]), {}),
        (Samples(1, targets=None), {}),
        (Samples(0, targets=[]), {}),
    ],
)
def test_classes_are_counted_where_targets_are_class_numbers(dataset, counts):
    assert class_counts(dataset) == counts


def test_torchvisions_targets_and_classes_are_taken_without_reading_a_sample():
    dataset = FakeData(size=3)
    dataset.__class__ = type("Unreadable", (FakeData,), {"__getitem__": None})
    dataset.targets, dataset.classes = [1, 1, 2], ["cat", "dog", "frog"]
    assert class_counts(dataset) == {"cat": 0, "dog": 2, "frog": 1}
    assert class_counts(Subset(Subset(dataset, [0, 2]), [1])) == {"cat": 0, "dog": 0, "frog": 1}


@pytest.fixture
def shown(monkeypatch, capsys):
    """Return what the table at the start shows of data sets of a user's own, in words."""

    def shown(load_data, sites=("site-1", "site-2"), **data):
        monkeypatch.setattr(summary, "load_data", load_data)
        args = argparse.Namespace(env="sim", sites=list(sites), classes=0)
        show_data(args, {"name": "mine", **data})
        name, *table = [line.split() for line in capsys.readouterr().out.splitlines() if line]
        assert name == ["Training", "on", "mine."]
        return table

    return shown


@pytest.mark.parametrize("classes", [10, 11, 100])
def test_classes_are_shown_as_long_as_a_table_has_room_for_them(classes, shown):
    sets = Samples(200, targets=[i % classes for i in range(200)]), Samples(1)
    head, row = shown(lambda args, site: sets)
    counts = class_counts(sets[0])
    names = list(counts) if classes == 10 else []
    assert head == ["Samples", "test", "train", *names]
    assert row == ["each", "site", "1", "200", *(str(counts[name]) for name in names)]


def test_sites_whose_labels_are_no_classes_show_their_sizes(shown):
    def load_data(args, site):
        return Samples(int(site[-1]), targets=[0.5] * int(site[-1])), Samples(7)

    assert shown(load_data) == [["Samples", "test", "train"], ["site-1", "7", "1"], ["site-2", "7", "2"]]


def test_classes_that_not_all_sites_have_are_shown_of_those_that_have_them(shown):
    targets = {"berlin": [0, 1], "paris": [0, 1, 2, 3, 3], "rome": [0.5]}

    def load_data(args, site):
        return Samples(len(targets[site]), targets=targets[site]), Samples(7)

    assert shown(load_data, targets) == [
        ["Samples", "test", "train", "0", "1", "2", "3"],
        ["berlin", "7", "2", "1", "1", "-", "-"],
        ["paris", "7", "5", "1", "1", "1", "2"],
        ["rome", "7", "1", "-", "-", "-", "-"],
    ]


def test_data_are_those_of_the_flags_that_prepare_data_has_settled(shown):
    def load_data(args, site):
        return Samples(args.classes), Samples(1)

    assert shown(load_data, flags={"classes": 3})[1] == ["each", "site", "1", "3"]


@pytest.mark.parametrize("train, test, part", [(0, 1, "train"), (1, 0, "test"), (0, 0, "train")])
def test_site_without_samples_is_named_before_the_run(train, test, part, shown):
    def load_data(args, site):
        return (Samples(train), Samples(test)) if site == "site-2" else (Samples(1), Samples(1))

    with pytest.raises(OSError, match=rf"^site-2 has no samples to {part} on$"):
        shown(load_data)


def test_a_hundred_sites_fit_into_the_width_of_a_screen(capsys):
    sites = [f"site-{i}" for i in range(1, 101)]
    print_table("accuracy", {"round 0": dict.fromkeys(sites, 58.07)}, sites)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 140 and not any(line.endswith(" ") for line in lines)
    assert " ".join(lines).count("58.07") == 100


def test_of_many_rounds_the_first_and_the_last_are_shown(capsys):
    for rounds, dots in ((7, 0), (8, 1), (100, 1)):
        print_table("loss", {f"round {i}": {"site-1": i} for i in range(1, rounds + 1)}, ["site-1"], 7)
        _, *rows = (line.split() for line in capsys.readouterr().out.splitlines())
        assert rows.count(["...", "..."]) == dots
        shown = [i for i in range(1, rounds + 1) if not dots or i <= 2 or i > rounds - 4]
        assert [row for row in rows if row[0] == "round"] == [["round", str(i), str(i)] for i in shown]


def test_sites_keep_their_order_and_columns_whoever_reported_something(capsys):
    rows = {
        "round 1": {"site-3": {"loss": 1.5, "AUC": 0.5}, "site-1": {"loss": 1.5}},
        "final": {"site-1": {"loss": 1.5}, "site-2": {"loss": 1.5}, "site-3": {"loss": -1.5, "AUC": 1e-9}},
    }
    print_metrics(rows, ["site-1", "site-2", "site-3"])
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["loss", "site-1", "site-2", "site-3"],
        ["round", "1", "1.500", "-", "1.500"],
        ["final", "1.500", "1.500", "-1.500"],
        ["AUC", "site-1", "site-2", "site-3"],
        ["round", "1", "-", "-", "0.5000"],
        ["final", "-", "-", "1.000e-09"],
    ]


# ---- The best model ----

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "mode, final, best, expected",
    [
        ("max", [-3.0, -1.0], [-1.0, -9.0], (FINAL_MODEL, -2.0)),
        ("min", [-3.0, -1.0], [-1.0, -9.0], (BEST_MODEL, -5.0)),
        ("max", [50.0, 60.0], [60.0, 50.0], (FINAL_MODEL, 55.0)),  # the later one of equals
        ("max", [50.0, NAN], [40.0, 41.0], (FINAL_MODEL, 50.0)),
        ("min", [INF, None], [3.0, "many"], (BEST_MODEL, 3.0)),
        ("max", [True, 0], [-1, -2], (FINAL_MODEL, 0.5)),
        ("max", [NAN, None], [-INF, "many"], None),
    ],
)
def test_best_model_is_that_of_the_better_mean_of_the_sites_that_have_a_number(
    mode, final, best, expected, tmp_path, monkeypatch
):
    monkeypatch.setattr(results, "KEY_METRIC", ("score", mode))
    for folder in ("app_server", "cross_site_val", "metrics"):
        (tmp_path / folder).mkdir()
    torch.save({"model": {}, "meta_props": {"current_round": 4}}, tmp_path / "app_server" / FINAL_MODEL)
    evaluation = {
        site: {f"SRV_{name}": {"score": scores[i]} for name, scores in ((FINAL_MODEL, final), (BEST_MODEL, best))}
        for i, site in enumerate("ab")
    }
    (tmp_path / "cross_site_val" / "cross_val_results.json").write_text(json.dumps(evaluation))
    (tmp_path / "metrics" / "metrics_summary.json").write_text('{"best_round": 3}')
    args = argparse.Namespace(
        num_rounds=5, first_round=1, min_sites=2, evaluates=True, cross_site_eval=False, run_folder=tmp_path
    )
    found = read_results(args, tmp_path)["best_model"]
    if expected:
        name, score = expected
        round = 5 if name == FINAL_MODEL else 3
        expected = {"name": name, "score": score, "round": round}
    assert found == expected


def test_evaluation_without_results_is_empty(tmp_path):
    assert read_evaluation(tmp_path) == {}
