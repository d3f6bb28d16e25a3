"""What a site trains on. To use data of your own, replace the four functions that job.py and the clients call.

The clients call add_data_flags, load_data and make_loader. job.py calls prepare_data, and support/ the first two.
"""

import argparse
import os
import zlib
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

from cifar10 import DATA_ROOT, DataError, load_cifar10, synthetic_images

ALPHA = 0.5  # if --alpha isn't given. argparse doesn't know it, so that prepare_data sees whether it was


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what a site trains on: job.py takes them and hands them on to the client script."""
    flag = parser.add_argument
    flag("--dataset", choices=["auto", "cifar10", "synthetic"], default="auto", help="auto: cifar10 if it can be had")
    flag("--data_root", default=DATA_ROOT, metavar="DIR", help="of CIFAR-10; {site}: its name (default: %(default)s)")
    flag("--train_size", type=int, metavar="N", help="use only so many training images (default: all)")
    flag("--test_size", type=int, metavar="N", help="use only so many test images (default: all)")
    flag("--split", choices=["same", "iid", "dirichlet"], default="same", help="a site's share; same, the default: all")
    flag("--alpha", type=float, metavar="X", help="skew of dirichlet, small is strong (default: 0.5)")


def prepare_data(args: argparse.Namespace) -> dict:
    """Get the images ready before any client wants them, and decide what "auto" is.

    Returns {"name": what a person reads, "flags": values that replace the sites' flags, "warning": "" if all is well}.
    Raises ValueError if the flags can't be right, and DataError if --dataset cifar10 can't be had.
    """
    for name, most in (("train_size", 50_000), ("test_size", 10_000)):
        if (size := vars(args)[name]) is not None and not 1 <= size <= most:
            raise ValueError(f"argument --{name}: {size} is not from 1 to {most}")
    if args.alpha is not None and (args.split != "dirichlet" or not 1e-6 <= args.alpha <= 1e6):
        raise ValueError("--alpha is from 1e-06 to 1000000, and needs --split dirichlet")
    if args.split != "same" and args.train_size and args.train_size < len(args.sites):
        raise ValueError(f"--split {args.split} needs an image a site: --train_size {args.train_size} is too few")
    dataset, data_root, warning = args.dataset, args.data_root, ""
    if args.env == "prod" or args.export:  # the images are on the sites, not here
        if data_root[:1] not in ("/", "~", "$"):
            raise ValueError("--data_root is on the sites: begin it with /, ~ or $")
        if dataset == "auto":
            dataset = "cifar10"  # no real site trains on synthetic images by accident
    elif dataset != "synthetic":
        dataset, data_root = "cifar10", os.path.abspath(os.path.expanduser(os.path.expandvars(data_root)))
        try:
            for site in args.sites:
                load_cifar10(data_folder(args, site))  # {site} may give each a folder of its own
        except DataError as error:
            if args.dataset != "auto":
                raise
            dataset, warning = "synthetic", f"training on SYNTHETIC images. {error}"
    shares = {"same": "", "iid": " (iid split)", "dirichlet": f" (dirichlet split of alpha {args.alpha or ALPHA})"}
    flags = {"dataset": dataset, "data_root": data_root}
    return {"name": dataset + shares[args.split], "flags": flags, "warning": warning}


def load_data(args: argparse.Namespace, site: str) -> tuple[Dataset, Dataset]:
    """Return the training and the test set of a site, two map-style Datasets. cifar10.Images says what a sample is.

    Args:
        args: the flags of add_data_flags, with `seed` and `sites`.
        site: the site's name. Its place in `sites` decides its share, if the split isn't "same".

    Raises:
        DataError: CIFAR-10 can't be had, or the images can't be split so.
    """
    if args.dataset == "synthetic":
        train_set, test_set = synthetic_images(args.train_size or 5_000, args.test_size or 1_000, args.seed)
    else:
        train_set, test_set = load_cifar10(data_folder(args, site))
        train_set, test_set = train_set.first(args.train_size), test_set.first(args.test_size)
    if args.split != "same":
        if site not in args.sites:
            raise DataError(f"--split divides the images among {', '.join(args.sites)}, and {site} is not among them")
        shards = partition(train_set.targets.numpy(), len(args.sites), args.split, args.alpha or ALPHA, args.seed)
        train_set = Subset(train_set, shards[args.sites.index(site)].tolist())
    return train_set, test_set


def data_folder(args: argparse.Namespace, site: str) -> Path:
    """Return --data_root on a site: {site} becomes its name, and ~ and $VARIABLES get their values there."""
    folder = os.path.expandvars(args.data_root.replace("{site}", site))
    if "$" in folder:
        raise DataError(f"a variable in --data_root {args.data_root!r} is not set on {site}: set it at its start")
    return Path(folder).expanduser()


def partition(labels: np.ndarray, num_shards: int, split: str, alpha: float, seed: int) -> list[np.ndarray]:
    """Divide images into shards, and return each shard's indices, int64. The shards are disjoint and hold all images.

    Args:
        labels: int64 (N,), the class of each image.
        split: "iid" gives each shard the same number of random images. "dirichlet" skews the labels (Yurochkin et al.
            2019, arXiv:1905.12022): of each class, the shards take fractions drawn from Dir(alpha, ..., alpha). All
            are drawn again until each shard has 10 images, or an equal share if that is less.
        alpha: > 0; near 0 each class goes to one shard, and in the thousands all shards look alike.

    Raises:
        DataError: there are fewer images than shards, or 1 000 draws left a shard with too few.
    """
    least = min(10, len(labels) // num_shards)
    if least == 0:
        raise DataError(f"{len(labels)} training images are too few for {num_shards} sites: raise --train_size")
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    if split == "iid":
        return np.array_split(order, num_shards)
    classes = [order[labels[order] == label] for label in np.unique(labels)]
    for _ in range(1_000):
        parts = []  # for each class, its part for each shard
        for images in classes:
            ends = len(images) * rng.dirichlet(np.full(num_shards, alpha)).cumsum()
            parts.append(np.split(images, ends[:-1].astype(int)))
        shards = [np.concatenate(shard) for shard in zip(*parts)]
        if min(len(shard) for shard in shards) >= least:
            return shards
    raise DataError(f"--alpha {alpha:g} leaves a site with fewer than {least} images: raise it or --train_size")


def make_loader(dataset: Dataset, batch_size: int, shuffle_by: tuple | None = None) -> DataLoader:
    """Return a loader of batches: images float32 (B, 3, 32, 32) in [-1, 1], labels int64 (B,).

    With shuffle_by, such as (seed, site, round), it shuffles, and seeds torch's generator, which dropout and
    augmentation use, too: equal values give equal training.
    """
    if shuffle_by:
        torch.manual_seed(zlib.crc32(" ".join(map(str, shuffle_by)).encode()))  # hash() differs in each process
    return DataLoader(dataset, batch_size, shuffle=bool(shuffle_by), collate_fn=collate)


def collate(samples: list | tuple) -> list | tuple:
    """Make a batch of samples. cifar10.Images returns a whole batch, as a tuple; other data sets, a list of samples."""
    return samples if isinstance(samples, tuple) else default_collate(samples)
