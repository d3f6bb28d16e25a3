"""Each site's share of the training images: its properties."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cifar10 import DataError
from conftest import data_flags
from data import class_counts, load_data, partition

LABELS = st.lists(st.integers(0, 9), min_size=1, max_size=300).map(np.array)
ALPHAS = st.floats(-6, 6).map(lambda exponent: 10.0**exponent)
SEEDS = st.integers(0, 2**32 - 1)
SPLITS = st.sampled_from(["iid", "dirichlet"])
SORTED_LABELS = np.repeat(np.arange(10), 1000)


def mixes(num_shards, alpha, seed):
    """Return the fraction of each class in each shard, (num_shards, 10)."""
    shards = partition(SORTED_LABELS, num_shards, "dirichlet", alpha, seed)
    return np.stack([np.bincount(SORTED_LABELS[shard], minlength=10) / len(shard) for shard in shards])


@given(LABELS, st.integers(1, 100), SPLITS, ALPHAS, SEEDS)
@settings(max_examples=500)
def test_shards_are_disjoint_and_hold_all_images_and_none_is_empty(labels, num_shards, split, alpha, seed):
    if len(labels) < num_shards:
        with pytest.raises(DataError, match="too few"):
            partition(labels, num_shards, split, alpha, seed)
        return
    shards = partition(labels, num_shards, split, alpha, seed)
    assert sorted(np.concatenate(shards)) == list(range(len(labels)))
    sizes = [len(shard) for shard in shards]
    assert len(sizes) == num_shards and min(sizes) >= 1 and max(sizes) - min(sizes) <= 1


@given(LABELS, SPLITS, ALPHAS, SEEDS)
def test_same_seed_gives_the_same_shards(labels, split, alpha, seed):
    first, second = (partition(labels, 1 + len(labels) // 3, split, alpha, seed) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, second))


@given(SEEDS)
@settings(max_examples=20)
def test_another_seed_gives_other_shards(seed):
    for split in ("iid", "dirichlet"):
        first, second = (partition(SORTED_LABELS, 2, split, 0.5, s)[0] for s in (seed, seed + 1))
        assert not np.array_equal(np.sort(first), np.sort(second))


def test_mix_of_classes_follows_the_dirichlet_distribution():
    # Of 100 shards, the first can't use up a class: its mix q has the mean p and the variance p (1 - p) / (alpha + 1)
    # of Dir(alpha * p), and that of drawing 100 images by it.
    for alpha in (0.1, 1, 10):
        q = np.stack([mixes(100, alpha, seed)[0] for seed in range(400)])
        spread = 0.1 * 0.9 / (alpha + 1)
        expected = spread + (0.1 * 0.9 - spread) / 100
        assert q.mean(axis=0) == pytest.approx(0.1, abs=0.06)
        assert q.var(axis=0).mean() == pytest.approx(expected, rel=0.1)


def test_smaller_alpha_means_more_skew():
    for num_shards in (2, 5, 20):
        skews = []
        for alpha in (1000, 10, 1, 0.1, 0.001):
            distances = [np.abs(mixes(num_shards, alpha, seed) - 0.1).sum(axis=1).mean() / 2 for seed in range(20)]
            skews.append(np.mean(distances))
        assert skews == sorted(skews)
        assert skews[0] < 0.1 and skews[-1] > 0.45


@pytest.mark.parametrize("split", ["iid", "dirichlet"])
def test_sites_take_the_training_images_by_their_number(split):
    flags = {"train_size": 100, "test_size": 1, "seed": 3, "n_clients": 3}
    args = data_flags(split=split, alpha=1, **flags)
    train_set, _ = load_data(data_flags(**flags), "site-1")
    shards = [load_data(args, f"site-{i}")[0] for i in (1, 2, 3)]
    images = torch.cat([shard[list(range(len(shard)))][0] for shard in shards])
    assert sorted(images.sum(dim=(1, 2, 3)).tolist()) == sorted(train_set.tensors[0].sum(dim=(1, 2, 3)).tolist())
    for shard, indices in zip(shards, partition(train_set.tensors[1].numpy(), 3, split, 1, seed=3)):
        assert shard.indices == indices.tolist()
        counts = np.bincount(train_set.tensors[1][indices], minlength=10).tolist()
        assert class_counts(args, shard) == dict(zip("0123456789", counts))
    for stranger in ("site-0", "site-4", "hospital"):
        with pytest.raises(DataError, match=f"to site-1 ... site-3, not to {stranger}"):
            load_data(args, stranger)


def test_same_split_takes_everything():
    args = data_flags(train_size=10, test_size=1)
    train_set, _ = load_data(args, "a hospital")
    assert len(train_set) == 10 and sum(class_counts(args, train_set).values()) == 10
