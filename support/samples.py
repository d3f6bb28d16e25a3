"""What does each site train and test on? The table at the start of a run."""

import argparse
import sys
from collections.abc import Callable

import torch
from torch.utils.data import Dataset, Subset

from support.failure import describe
from support.summary import COLUMNS, print_table

MOST_CLASSES = 10_000  # larger numbers are no classes


def show_data(args: argparse.Namespace, name: str, warning: str, load_data: Callable) -> dict:
    """Print what each site has, class by class, and return it. In a provisioned federation, only the sites know it.

    Args:
        name, warning: what prepare_data of data.py returns.
        load_data: that of data.py.
    """
    if warning:
        print(f"\n{'!' * 100}\nWARNING: {warning}\n{'!' * 100}\n", file=sys.stderr)
    data = {"name": name, "warning": warning, "sites": {}}
    if args.export:
        return data
    print(f"Training on {name}.", flush=True)
    if args.env == "prod":
        return data
    for site in args.sites:
        try:
            train_set, test_set = load_data(args, site)
        except Exception as error:  # of a data.py of the user's, say
            raise OSError(f"{site}: {describe(error)}") from error
        sizes = {"train_size": len(train_set), "test_size": len(test_set)}
        data["sites"][site] = {**sizes, "class_counts": class_counts(train_set)}
    rows = {
        site: {"test": described["test_size"], "train": described["train_size"], **fold(described["class_counts"])}
        for site, described in data["sites"].items()
    }
    if all(row == rows["site-1"] for row in rows.values()):
        rows = {"each site": rows["site-1"]}
    print()
    print_table("Samples", rows)
    print(flush=True)
    return data


def class_counts(dataset: Dataset) -> dict[str, int]:
    """Count a data set's samples of each class; return {} if the labels are no class numbers.

    Labels and their names are the data set's `targets` and `classes`, as torchvision calls them. Without `targets`,
    each sample is read for its label.
    """
    indices = range(len(dataset))
    while isinstance(dataset, Subset):
        indices = [dataset.indices[i] for i in indices]
        dataset = dataset.dataset
    try:
        if hasattr(dataset, "targets"):
            labels = torch.as_tensor(dataset.targets)[list(indices)]
        else:
            labels = torch.as_tensor([dataset[i][1] for i in indices])
        names = getattr(dataset, "classes", [])
        counts = labels.bincount(minlength=len(names)).tolist() if labels.max() < MOST_CLASSES else []
    except Exception:  # a user's samples may raise anything; where that is a mistake, the clients say which
        return {}
    return {str(names[i]) if i < len(names) else str(i): count for i, count in enumerate(counts)}


def fold(counts: dict[str, int]) -> dict[str, int]:
    """Return as many counts as a table has room for, the last of them for all other classes."""
    names = list(counts)
    if len(names) <= COLUMNS - 2:
        return counts
    shown = names[: COLUMNS - 3]
    return {name: counts[name] for name in shown} | {"others": sum(counts[name] for name in names[len(shown) :])}
