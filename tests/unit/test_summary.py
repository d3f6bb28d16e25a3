"""What the tables show of data and metrics of any kind."""

import argparse

import pytest
import torch
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset
from torchvision.datasets import FakeData

from support.results import read_evaluation
from support.samples import class_counts, show_data
from support.summary import mark_best, print_table

X = torch.zeros(4, 2)


class Samples(Dataset):
    """A data set of whatever samples."""

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        return self.samples[i]


@pytest.mark.parametrize(
    "dataset, counts",
    [
        (TensorDataset(X, torch.tensor([0, 2, 2, 1])), {"0": 1, "1": 1, "2": 2}),
        (Subset(TensorDataset(X, torch.tensor([0, 2, 2, 1])), [1, 2]), {"0": 0, "1": 0, "2": 2}),
        (ConcatDataset([Samples([(X, 1)]), Samples([(X, 1), (X, 0)])]), {"0": 1, "1": 2}),
        (Samples([(X, "cat"), (X, "dog")]), {}),
        (Samples([(X, 1.5), (X, 2)]), {}),
        (Samples([(X, -1), (X, 2)]), {}),
        (Samples([(X, 20_240_101), (X, 2)]), {}),
        (Samples([{"image": X, "label": 1}]), {}),
        (Samples([X.sum(), X.sum()]), {}),
        (Samples([(X, torch.zeros(3, 3, dtype=torch.int64))]), {}),
        (Samples([(X, None)]), {}),
        (Samples([]), {}),
    ],
)
def test_classes_are_counted_where_labels_are_class_numbers(dataset, counts):
    assert class_counts(dataset) == counts


def test_torchvisions_targets_and_classes_are_taken_without_reading_a_sample():
    dataset = FakeData(size=3)
    dataset.__class__ = type("Unreadable", (FakeData,), {"__getitem__": None})
    dataset.targets, dataset.classes = [1, 1, 2], ["cat", "dog", "frog"]
    assert class_counts(dataset) == {"cat": 0, "dog": 2, "frog": 1}
    assert class_counts(Subset(Subset(dataset, [0, 2]), [1])) == {"cat": 0, "dog": 0, "frog": 1}


def shown(load_data, capsys, n_clients=2):
    sites = [f"site-{i + 1}" for i in range(n_clients)]
    args = argparse.Namespace(export=False, env="sim", sites=sites)
    show_data(args, "mine", "", load_data)
    return [line.split() for line in capsys.readouterr().out.splitlines() if line]


def test_many_classes_are_folded(capsys):
    sets = Samples([(X, i % 100) for i in range(200)]), Samples([(X, 0)])
    _, head, row = shown(lambda args, site: sets, capsys)
    assert head == ["Samples", "test", "train", *map(str, range(9)), "others"]
    assert row == ["each", "site", "1", "200", *["2"] * 9, "182"]


def test_sites_whose_labels_are_no_classes_show_their_sizes(capsys):
    def load_data(args, site):
        count = int(site[-1])
        return Samples([(X, 0.5)] * count), Samples([(X, 0.5)] * 7)

    assert shown(load_data, capsys)[1:] == [
        ["Samples", "test", "train"],
        ["site-1", "7", "1"],
        ["site-2", "7", "2"],
    ]


def test_stars_are_right_below_zero_and_for_the_smallest_and_leave_nan_out():
    rows = {"a": {"site-1": -3.0, "site-2": float("nan")}, "b": {"site-1": -1.0, "site-2": -9.0}}
    assert mark_best(rows, max)["b"] == {"site-1": "-1.000*", "site-2": "-9.000*"}
    assert mark_best(rows, min) == {
        "a": {"site-1": "-3.000*", "site-2": "nan "},
        "b": {"site-1": "-1.000 ", "site-2": "-9.000*"},
    }


def test_a_hundred_sites_fit_into_the_width_of_a_screen(capsys):
    print_table("accuracy", {"round 0": {f"site-{i}": 58.07 for i in range(1, 101)}})
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 140


def test_sites_keep_their_order_if_the_first_round_drew_some_of_them(capsys):
    rows = {"round 1": {"site-1": 1.5, "site-3": 1.5}, "final": {"site-1": 1.5, "site-2": 1.5, "site-3": 1.5}}
    print_table("loss", rows, order=["site-1", "site-2", "site-3", "site-4"])
    head, first, _ = capsys.readouterr().out.splitlines()
    assert head.split() == ["loss", "site-1", "site-2", "site-3"]
    assert first.split() == ["round", "1", "1.500", "-", "1.500"]


def test_evaluation_without_results_is_empty(tmp_path):
    assert read_evaluation(tmp_path) == {}
