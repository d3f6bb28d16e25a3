"""The images: CIFAR-10, or a synthetic stand-in of the same shapes, and each site's share of them.

Download CIFAR-10 ahead of time with `python data.py [--data_root DIR]`.
"""

import argparse
import os
import queue
import socket
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock  # comes with torch
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler, Subset, TensorDataset

DATA_ROOT = "/tmp/nvflare/data"
CIFAR10_FOLDER = "cifar-10-batches-py"  # torchvision's name for it
DECODED_FILE = "cifar10-uint8.pt"  # ours: see load_cifar10
SIZES = {"cifar10": (50_000, 10_000), "synthetic": (5_000, 1_000)}  # training and test images
SPLITS = ["same", "iid", "dirichlet"]  # see partition
CLASSES = {
    "cifar10": ["plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"],
    "synthetic": [str(label) for label in range(10)],
}
DOWNLOAD_TIMEOUT = 15  # seconds of silence


class DataError(Exception):
    """The images can't be had. The message is one line: what is wrong and what to do."""


class UnavailableError(DataError):
    """CIFAR-10 is missing or damaged, and can't be downloaded."""


def load_data(
    dataset: str, data_root: str, train_size: int | None = None, test_size: int | None = None, seed: int = 0
) -> tuple[TensorDataset, TensorDataset]:
    """Return the training and the test images, each as (images, labels).

    Images are uint8 (N, 3, 32, 32) in [0, 255], labels int64 (N,) in [0, 9].

    Args:
        dataset: "cifar10" or "synthetic".
        data_root: the folder of CIFAR-10, which is downloaded if it isn't there; a leading ~ and $VARIABLES are
            those of the site.
        train_size, test_size: use only the first so many images, or draw so many synthetic ones; None means all.
        seed: seed of the synthetic images.

    Raises:
        DataError: CIFAR-10 can't be downloaded, read or stored, or a variable in data_root is not set.
    """
    if dataset == "synthetic":
        generator = torch.Generator().manual_seed(seed)
        patterns = F.interpolate(torch.randn(10, 3, 4, 4, generator=generator), size=32, mode="bicubic")
        train_seed, test_seed = torch.randint(2**62, (2,), generator=generator).tolist()
        train_set = draw_images(patterns, train_size or SIZES[dataset][0], train_seed)
        test_set = draw_images(patterns, test_size or SIZES[dataset][1], test_seed)
    else:
        cifar10 = load_cifar10(Path(expand_variables(data_root)).expanduser())
        train_set = TensorDataset(*(tensor[:train_size] for tensor in cifar10["train"]))
        test_set = TensorDataset(*(tensor[:test_size] for tensor in cifar10["test"]))
    return train_set, test_set


def expand_variables(data_root: str) -> str:
    """Put the values of this site's $VARIABLES into data_root; raise DataError if one is not set."""
    folder = os.path.expandvars(data_root)
    if "$" in folder:
        raise DataError(f"a variable in --data_root {data_root!r} is not set on this site: set it at its start")
    return folder


def take_shard(train_set: Dataset, split: str, alpha: float, shard: int, num_shards: int, seed: int) -> Dataset:
    """Return a site's shard of the training images, number `shard` of 1 to num_shards; see partition."""
    if split == "same":
        return train_set
    shards = partition(train_set.tensors[1].numpy(), num_shards, split, alpha, seed)
    return Subset(train_set, shards[shard - 1].tolist())


def partition(labels: np.ndarray, num_shards: int, split: str, alpha: float, seed: int) -> list[np.ndarray]:
    """Deal images out in disjoint shards that hold them all, of sizes that differ by one image at most.

    Args:
        labels: int64 (N,), the class of each image.
        split: "iid" deals at random. "dirichlet" skews the labels as Hsu et al. 2019 (arXiv:1909.06335) do: each
            shard draws its mix of classes from Dir(alpha * p), where p is the mix of all images, and then draws
            images by it. When a class is used up, the shard draws a new mix of those that are left.
        alpha: > 0; near 0 a shard holds as few classes as it can, and in the thousands all shards look alike.

    Returns:
        The indices of each shard's images, int64.

    Raises:
        DataError: there are fewer images than shards.
    """
    if len(labels) < num_shards:
        raise DataError(f"{len(labels)} training images are too few for {num_shards} sites: raise --train_size")
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    shards = np.array_split(order, num_shards)
    if split == "iid":
        return shards

    pools = [order[labels[order] == label] for label in np.unique(labels)]
    prior = np.array([len(pool) for pool in pools]) / len(labels)
    for i, size in enumerate(len(shard) for shard in shards):
        left = np.array([len(pool) for pool in pools])
        counts = np.zeros_like(left)
        while missing := size - counts.sum():
            mix, available = np.zeros(len(pools)), counts < left
            mix[available] = rng.dirichlet(alpha * prior[available])
            counts = np.minimum(counts + rng.multinomial(missing, mix), left)
        shards[i] = np.concatenate([pool[:count] for pool, count in zip(pools, counts)])
        pools = [pool[count:] for pool, count in zip(pools, counts)]
    return shards


def make_loader(dataset: Dataset, batch_size: int, generator: torch.Generator | None = None) -> DataLoader:
    """Return a loader of batches: images float32 (B, 3, 32, 32) in [-1, 1], labels int64 (B,).

    With a generator, each epoch has an order of its own; without one the images keep theirs.
    """
    sampler = RandomSampler(dataset, generator=generator) if generator else SequentialSampler(dataset)
    batches = BatchSampler(sampler, batch_size, drop_last=False)
    # Given whole batches of indices, the loader indexes the tensors once a batch, not once an image.
    return DataLoader(dataset, sampler=batches, batch_size=None, collate_fn=scale)


def scale(batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale the images from [0, 255] to [-1, 1], as torchvision's Normalize(0.5, 0.5) does after ToTensor."""
    images, labels = batch
    return images.float().div_(127.5).sub_(1), labels


def draw_images(patterns: torch.Tensor, count: int, seed: int) -> TensorDataset:
    """Draw synthetic images: each shows the pattern of its class, shifted, faint or strong, under noise.

    Args:
        patterns: float32 (10, 3, 32, 32), one a class, of mean 0 and standard deviation about 1.
    """
    generator = torch.Generator().manual_seed(seed)
    images = torch.empty(count, 3, 32, 32, dtype=torch.uint8)
    labels = torch.empty(count, dtype=torch.int64)
    for i in range(count):
        labels[i] = torch.randint(10, (), generator=generator)
        shift = torch.randint(32, (2,), generator=generator).tolist()
        contrast = 20 + 40 * torch.rand(1, generator=generator)
        noise = 120 * torch.randn(3, 32, 32, generator=generator)
        pattern = patterns[labels[i]].roll(shift, dims=(1, 2))
        images[i] = (127.5 + contrast * pattern + noise).clamp(0, 255)
    return TensorDataset(images, labels)


def choose_dataset(dataset: str, data_root: str) -> str:
    """Get the images ready before any client wants them; turn "auto" into "cifar10" or "synthetic".

    Raises:
        DataError: see load_data; for "auto" only if data_root can't be written.
    """
    if dataset == "synthetic":
        return "synthetic"
    try:
        load_cifar10(Path(data_root))
    except UnavailableError as error:
        if dataset == "cifar10":
            raise
        print(f"\n{'!' * 100}\nWARNING: training on SYNTHETIC images. {error}\n{'!' * 100}\n", file=sys.stderr)
        return "synthetic"
    return "cifar10"


def load_cifar10(root: Path) -> dict[str, list[torch.Tensor]]:
    """Return CIFAR-10 as {"train": [images, labels], "test": [images, labels]}; see load_data.

    The images are decoded once, to a file that all processes of a machine map into memory and share.
    """
    decoded = root / DECODED_FILE

    def map_decoded():
        try:
            if all(decoded.stat().st_mtime >= batch.stat().st_mtime for batch in root.glob(f"{CIFAR10_FOLDER}/*")):
                cifar10 = torch.load(decoded, mmap=True, weights_only=True)
                return cifar10 if cifar10.keys() == {"train", "test"} else None
        except (OSError, RuntimeError, AttributeError):  # missing, cut short, or something else
            pass
        return None

    if (cifar10 := map_decoded()) is None:
        try:
            root.mkdir(parents=True, exist_ok=True)
            with FileLock(root / "cifar10.lock"):  # of many processes that want it, one gets it for all
                if (cifar10 := map_decoded()) is None:
                    cifar10 = decode_cifar10(root)
                    torch.save(cifar10, decoded.with_suffix(".unfinished"))
                    decoded.with_suffix(".unfinished").replace(decoded)
        except (OSError, RuntimeError) as error:
            raise DataError(f"can't write to {root} ({error}): choose another --data_root") from error
    return cifar10


def decode_cifar10(root: Path) -> dict[str, list[torch.Tensor]]:
    """Read CIFAR-10 through torchvision, which checks every file; download what is missing or damaged."""
    from torchvision.datasets import CIFAR10  # here, since whoever maps the decoded file does without it

    def read_files():
        return {name: CIFAR10(root, train=name == "train") for name in ("train", "test")}

    try:
        try:
            parts = read_files()
        except RuntimeError:  # torchvision: "not found or corrupted"
            download_cifar10(root)
            parts = read_files()
    except DataError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        damaged = root / CIFAR10_FOLDER
        raise UnavailableError(f"CIFAR-10 in {damaged} is damaged ({error}): delete that folder, run again") from error
    return {
        name: [torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets)]
        for name, part in parts.items()
    }


def download_cifar10(root: Path) -> None:
    """Download and unpack CIFAR-10 (170 MB), unless its server is silent for DOWNLOAD_TIMEOUT.

    Raises:
        UnavailableError: it can't be downloaded.
    """
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity

    try:
        if not check_integrity(root / CIFAR10.filename, CIFAR10.tgz_md5):
            wait_for_answer(CIFAR10.url)
        socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)  # torchvision sets none
        CIFAR10(root, download=True)
    except Exception as error:  # of the network, of HTTP, of the archive
        here = root / CIFAR10_FOLDER
        found, remedy = ("damaged", f"delete {here}") if here.exists() else ("missing", "go online")
        raise UnavailableError(
            f"CIFAR-10 in {root} is {found} and can't be downloaded ({error}): {remedy}, "
            "or name a folder that has it with --data_root, or choose --dataset synthetic"
        ) from error
    finally:
        socket.setdefaulttimeout(None)


def wait_for_answer(url: str) -> None:
    """Return when the server of url answers; raise OSError when it can't be reached or is silent."""
    answer = queue.SimpleQueue()

    def ask():
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=DOWNLOAD_TIMEOUT).close()
            answer.put(None)
        except urllib.error.HTTPError:  # an answer, whatever it says
            answer.put(None)
        except Exception as error:
            answer.put(error)

    # In a thread of its own, since a silent name server holds up urlopen beyond its timeout.
    threading.Thread(target=ask, daemon=True).start()
    try:
        error = answer.get(timeout=DOWNLOAD_TIMEOUT)
    except queue.Empty:
        error = TimeoutError(f"no answer within {DOWNLOAD_TIMEOUT} s")
    if error:
        raise error


def main() -> None:
    parser = argparse.ArgumentParser(description="Download CIFAR-10, check it and decode it, ahead of a run.")
    parser.add_argument("--data_root", metavar="DIR", default=DATA_ROOT, help="where to (default: %(default)s)")
    args = parser.parse_args()
    try:
        train_set, test_set = load_data("cifar10", args.data_root)
    except DataError as error:
        sys.exit(f"data.py: error: {error}")
    print(f"CIFAR-10 is ready in {args.data_root}: {len(train_set)} training and {len(test_set)} test images")


if __name__ == "__main__":
    main()
