"""Each site's share of the training images: its properties."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cifar10 import DataError
from conftest import data_flags
from data import load_data, partition
from support.summary import class_counts

LABELS = st.lists(st.integers(0, 9), min_size=1, max_size=300).map(np.array)
ALPHAS = st.floats(-6, 6).map(lambda exponent: 10.0**exponent)
SEEDS = st.integers(0, 2**32 - 1)
SPLITS = st.sampled_from(["iid", "dirichlet"])
SORTED_LABELS = np.repeat(np.arange(10), 1000)


def class_shares(num_shards, alpha, seed):
    """Return the fraction of each class that each shard has, (num_shards, 10)."""
    shards = partition(SORTED_LABELS, num_shards, "dirichlet", alpha, seed)
    return np.stack([np.bincount(SORTED_LABELS[shard], minlength=10) / 1000 for shard in shards])


def is_complete(shards, labels, num_shards):
    """Tell whether shards are disjoint, hold all images, and have 10 images at least, or their part of a small set."""
    complete = sorted(np.concatenate(shards)) == list(range(len(labels)))
    sizes = [len(shard) for shard in shards]
    return complete and len(sizes) == num_shards and min(sizes) >= max(1, min(10, len(labels) // num_shards))


@given(LABELS, st.integers(1, 100), SEEDS)
@settings(max_examples=300)
def test_iid_shards_are_disjoint_hold_all_images_and_differ_by_one_image_at_most(labels, num_shards, seed):
    if len(labels) < num_shards:
        with pytest.raises(DataError, match="too few"):
            partition(labels, num_shards, "iid", None, seed)
        return
    shards = partition(labels, num_shards, "iid", None, seed)
    sizes = [len(shard) for shard in shards]
    assert is_complete(shards, labels, num_shards) and max(sizes) - min(sizes) <= 1


@given(LABELS, st.integers(1, 100), ALPHAS, SEEDS)
@settings(max_examples=300, deadline=None)
def test_dirichlet_shards_are_disjoint_and_hold_all_images_or_the_error_says_what_to_change(
    labels, num_shards, alpha, seed
):
    try:
        shards = partition(labels, num_shards, "dirichlet", alpha, seed)
    except DataError as error:
        few = len(labels) < num_shards
        assert "too few" in str(error) if few else f"--alpha {alpha:g} leaves a site with fewer than" in str(error)
        assert few or num_shards > 1
    else:
        assert is_complete(shards, labels, num_shards)


@given(st.integers(2, 10), st.floats(0.5, 1e6), SEEDS)
@settings(max_examples=100, deadline=None)
def test_enough_images_and_a_usual_alpha_can_be_dealt_out(num_shards, alpha, seed):
    assert is_complete(partition(SORTED_LABELS, num_shards, "dirichlet", alpha, seed), SORTED_LABELS, num_shards)


@given(SPLITS, st.floats(0.3, 1e6), SEEDS)
@settings(max_examples=50)
def test_same_seed_gives_the_same_shards(split, alpha, seed):
    first, second = (partition(SORTED_LABELS, 5, split, alpha, seed) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, second))


@given(SEEDS)
@settings(max_examples=20)
def test_another_seed_gives_other_shards(seed):
    for split in ("iid", "dirichlet"):
        first, second = (partition(SORTED_LABELS, 2, split, 0.5, s)[0] for s in (seed, seed + 1))
        assert not np.array_equal(np.sort(first), np.sort(second))


@pytest.mark.parametrize("alpha", [0.5, 1, 10])
def test_each_class_is_shared_out_as_numpys_own_dirichlet_distribution_says(alpha):
    shares = np.stack([class_shares(5, alpha, seed) for seed in range(200)]).transpose(0, 2, 1).reshape(-1, 5)
    drawn = np.random.default_rng(1).dirichlet([alpha] * 5, size=100_000)
    assert shares.sum(axis=1) == pytest.approx(1)
    # 2 000 classes: the largest difference of two distribution functions is below 0.05 in all but 1 of 10 000 cases.
    for i in range(5):
        points = np.linspace(0, 1, 101)
        cdfs = [
            np.searchsorted(np.sort(sample), points, side="right") / len(sample)
            for sample in (shares[:, i], drawn[:, i])
        ]
        assert np.abs(cdfs[0] - cdfs[1]).max() < 0.06
    assert np.cov(shares.T) == pytest.approx(np.cov(drawn.T), abs=0.02)


def test_smaller_alpha_means_more_skew():
    for num_shards in (2, 5, 10):
        skews = []
        for alpha in (1000, 10, 1, 0.3):
            spread = [class_shares(num_shards, alpha, seed).std(axis=0).mean() for seed in range(20)]
            skews.append(np.mean(spread) * num_shards)
        assert skews == sorted(skews)
        assert skews[0] < 0.15 and skews[-1] > 0.7


def test_sizes_differ_in_a_skewed_split():
    sizes = [len(shard) for shard in partition(SORTED_LABELS, 5, "dirichlet", 0.5, seed=0)]
    assert max(sizes) > 1.5 * min(sizes)


def test_impossible_split_is_one_clear_error():
    with pytest.raises(DataError, match="--alpha 1e-06 leaves a site with fewer than 10 images: raise it"):
        partition(SORTED_LABELS, 20, "dirichlet", 1e-6, seed=0)  # each class goes to one of 20 sites


@pytest.mark.parametrize("sites", [["site-1", "site-2", "site-3"], ["paris", "site-1", "7"]])
@pytest.mark.parametrize("split", ["iid", "dirichlet"])
def test_sites_take_the_training_images_by_their_place(split, sites):
    flags = {"train_size": 100, "test_size": 1, "seed": 3, "sites": sites}
    args = data_flags(split=split, alpha=1, **flags)
    train_set, _ = load_data(data_flags(**flags), sites[0])
    shards = [load_data(args, site)[0] for site in sites]
    images = torch.cat([shard.__getitems__(list(range(len(shard))))[0] for shard in shards])
    assert sorted(images.sum(dim=(1, 2, 3)).tolist()) == sorted(train_set[:][0].sum(dim=(1, 2, 3)).tolist())
    for shard, indices in zip(shards, partition(train_set.targets.numpy(), 3, split, 1, seed=3)):
        assert shard.indices == indices.tolist()
        counts = np.bincount(train_set.targets[indices], minlength=10).tolist()
        assert class_counts(shard) == dict(zip("0123456789", counts))
    for stranger in ("site-0", "site-4", "hospital"):
        with pytest.raises(DataError, match=f"among {', '.join(sites)}, and {stranger} is not among them"):
            load_data(args, stranger)


def test_alpha_is_a_half_unless_told_otherwise():
    flags = {"train_size": 100, "test_size": 1, "split": "dirichlet"}
    assert (
        load_data(data_flags(**flags), "site-1")[0].indices
        == load_data(data_flags(alpha=0.5, **flags), "site-1")[0].indices
    )


def test_same_split_takes_everything():
    args = data_flags(train_size=10, test_size=1)
    train_set, _ = load_data(args, "a hospital")
    assert len(train_set) == 10 and sum(class_counts(train_set).values()) == 10
