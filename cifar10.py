"""Where the images come from: CIFAR-10, or synthetic images. `python cifar10.py` downloads CIFAR-10 ahead of a run."""

import argparse
import functools
import socket
from pathlib import Path

import torch
from filelock import FileLock  # comes with torch
from torch.nn import functional as F
from torch.utils.data import Dataset

DATA_ROOT = "/tmp/nvflare/data"
BATCHES_FOLDER = "cifar-10-batches-py"  # torchvision's name for it
DECODED_FILE = "cifar10-uint8.pt"  # ours: see load_cifar10
CLASSES = ["plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
SILENCE = 10  # seconds after which a server that says nothing is given up


class DataError(OSError):
    """The images can't be had. The message is one line: what is wrong and what to do."""


class Images(Dataset):
    """uint8 images (N, 3, 32, 32) in memory. As in torchvision, `targets` are the labels and `classes` their names.

    A sample is an image, float32 (3, 32, 32) in [-1, 1] (ToTensor and Normalize(0.5, 0.5)), and its label, int64.
    """

    def __init__(self, images: torch.Tensor, targets: torch.Tensor, classes: list[str]):
        self.images, self.targets, self.classes = images, targets, classes

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int | list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return self.images[index].float().div_(127.5).sub_(1), self.targets[index]

    __getitems__ = __getitem__  # DataLoader gives it a batch's indices: one look-up a batch, not one an image

    def first(self, count: int | None) -> "Images":
        """Return the first `count` images, or all."""
        return Images(self.images[:count], self.targets[:count], self.classes)


def load_cifar10(root: Path) -> tuple[Images, Images]:
    """Return CIFAR-10's training and test images, or raise DataError. Where they are missing, they are downloaded.

    They are decoded once, to a file that all processes of a machine map into memory and share.
    """
    parts = map_decoded(root)
    if parts is None:
        try:
            root.mkdir(parents=True, exist_ok=True)
            with FileLock(root / "cifar10.lock"):  # one process downloads, and the others wait
                if (parts := map_decoded(root)) is None:
                    parts = download_and_decode(root)
                    torch.save(parts, unfinished := root / f"{DECODED_FILE}.unfinished")
                    unfinished.replace(root / DECODED_FILE)
        except DataError:  # an OSError, too
            raise
        except (OSError, RuntimeError) as error:
            if not (root / BATCHES_FOLDER).is_dir():
                raise DataError(f"can't write to {root} ({error}): choose another --data_root") from error
            parts = download_and_decode(root)  # a read-only folder: each process decodes for itself
    return Images(*parts["train"], CLASSES), Images(*parts["test"], CLASSES)


def map_decoded(root: Path) -> dict[str, list[torch.Tensor]] | None:
    """Map the decoded file into memory; return None if it is missing, damaged, or older than what it was made from."""
    decoded = root / DECODED_FILE
    try:
        if all(decoded.stat().st_mtime >= batch.stat().st_mtime for batch in root.glob(f"{BATCHES_FOLDER}/*")):
            parts = torch.load(decoded, mmap=True, weights_only=True)
            return parts if parts.keys() == {"train", "test"} else None
    except Exception:  # whatever a damaged file may raise
        pass
    return None


def download_and_decode(root: Path) -> dict[str, list[torch.Tensor]]:
    """Read CIFAR-10 through torchvision, which checks every file and downloads what is missing or damaged (170 MB)."""
    from torchvision.datasets import CIFAR10  # here, since whoever maps the decoded file does without it

    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SILENCE)  # torchvision sets none
    try:
        datasets = {name: CIFAR10(root, train=name == "train", download=True) for name in ("train", "test")}
    except Exception as error:  # of the network, of HTTP, of the archive, of a damaged pickle
        here = root / BATCHES_FOLDER
        found, remedy = ("damaged", f"delete {here}") if here.exists() else ("missing", "go online")
        raise DataError(
            f"CIFAR-10 in {root} is {found} and can't be downloaded ({error}): {remedy}, "
            "or name a folder that has it with --data_root, or choose --dataset synthetic"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
    return {
        name: [torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets)]
        for name, part in datasets.items()
    }


@functools.cache  # job.py's table asks for each site
def synthetic_images(train_size: int, test_size: int, seed: int) -> tuple[Images, Images]:
    """Return training and test images of CIFAR-10's shapes and ten classes. draw_images says what they look like."""
    generator = torch.Generator().manual_seed(seed)
    patterns = F.interpolate(torch.randn(10, 3, 4, 4, generator=generator), size=32, mode="bicubic")
    train_seed, test_seed = torch.randint(2**62, (2,), generator=generator).tolist()
    return draw_images(patterns, train_size, train_seed), draw_images(patterns, test_size, test_seed)


def draw_images(patterns: torch.Tensor, count: int, seed: int) -> Images:
    """Draw images: one of the patterns, float32 (10, 3, 32, 32), shifted, faint or strong, under noise."""
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
    return Images(images, labels, [str(i) for i in range(10)])


def main() -> None:
    parser = argparse.ArgumentParser(description="Download CIFAR-10, check it and decode it, ahead of a run.")
    parser.add_argument("--data_root", metavar="DIR", default=DATA_ROOT, help="where to (default: %(default)s)")
    root = parser.parse_args().data_root
    try:
        train_set, test_set = load_cifar10(Path(root).expanduser())
    except DataError as error:
        raise SystemExit(f"cifar10.py: error: {error}") from error
    print(f"CIFAR-10 is ready in {root}: {len(train_set)} training and {len(test_set)} test images")


if __name__ == "__main__":
    main()
