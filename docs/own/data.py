"""What a site trains on: scikit-learn's wines, 178 of three cultivars, with 13 measurements each."""

import argparse
import zlib

import torch
from sklearn.datasets import load_wine
from torch.utils.data import DataLoader, Dataset, TensorDataset, random_split

TEST_SIZE = 58


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what a site trains on: job.py takes them and hands them on to the client script."""
    parser.add_argument("--ratio", type=int, default=5, metavar="N", help="the first site has N times another's wines")


def prepare_data(args: argparse.Namespace) -> dict:
    """Return what the sites train on, in words. Nothing has to be downloaded or settled here.

    Raises:
        ValueError: the flags can't be right.
    """
    if not 1 <= args.ratio <= 20:
        raise ValueError(f"argument --ratio: {args.ratio} is not from 1 to 20")
    return {"name": "wine"}


def load_data(args: argparse.Namespace, site: str) -> tuple[Dataset, Dataset]:
    """Return the training and the test set of a site, of samples (features float32 (13,), class 0, 1 or 2)."""
    wine = load_wine()
    wines = TensorDataset(torch.tensor(wine.data, dtype=torch.float32), torch.tensor(wine.target))
    wines.targets = wines.tensors[1]  # in which job.py's table counts the classes
    share = (len(wines) - TEST_SIZE) // (args.ratio + len(args.sites) - 1)
    shares = [share] * (len(args.sites) - 1)
    lengths = [TEST_SIZE, len(wines) - TEST_SIZE - sum(shares), *shares]
    test_set, *train_sets = random_split(wines, lengths, generator=torch.Generator().manual_seed(args.seed))
    return train_sets[args.sites.index(site)], test_set


def make_loader(dataset: Dataset, batch_size: int, shuffle_by: tuple | None = None) -> DataLoader:
    """Return a loader of batches: features float32 (B, 13), classes int64 (B,).

    Args:
        shuffle_by: what decides the order, such as (seed, site, round). It seeds torch, whose generator dropout and
            augmentation draw from, too: the same values give the same training again. None keeps the data set's order.
    """
    if shuffle_by:
        torch.manual_seed(zlib.crc32(" ".join(map(str, shuffle_by)).encode()))
    # The last batch may hold a single sample, which BatchNorm can't train on.
    return DataLoader(dataset, batch_size, shuffle=shuffle_by is not None, drop_last=shuffle_by is not None)
