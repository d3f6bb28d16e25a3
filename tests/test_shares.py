"""Each site's share of the training images: its properties, and what sites do with it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import run_job, same_weights
from data import DataError, load_data, partition, take_shard

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
def test_taken_shards_are_the_training_images(split):
    train_set, _ = load_data("synthetic", "", 100, 1, seed=3)
    shards = [take_shard(train_set, split, 0.3, shard, 3, seed=3) for shard in (1, 2, 3)]
    images = torch.cat([shard[list(range(len(shard)))][0] for shard in shards])
    assert sorted(images.sum(dim=(1, 2, 3)).tolist()) == sorted(train_set.tensors[0].sum(dim=(1, 2, 3)).tolist())


def test_same_split_takes_everything():
    train_set, _ = load_data("synthetic", "", 10, 1)
    assert take_shard(train_set, "same", None, 1, 1, seed=0) is train_set


@pytest.mark.parametrize("split", ["iid", "dirichlet"])
def test_evaluation_leaves_the_trained_weights_alone(split, tmp_path):
    flags = ["--train_size", "64", "--test_size", "100", "--split", split]
    plain, evaluated = (
        run_job(tmp_path / script, *flags, "--train_script", script, OMP_NUM_THREADS="1")
        for script in ("client.py", "client_with_eval.py")
    )
    assert plain.status == evaluated.status == 0, plain.errors + evaluated.errors
    assert same_weights(plain.weights(), evaluated.weights())

    # The start shows each site's share, class by class.
    labels = load_data("synthetic", "", 64, 100)[0].tensors[1].numpy()
    for site, shard in zip(("site-1", "site-2"), partition(labels, 2, split, 0.5, seed=0)):
        counts = np.bincount(labels[shard], minlength=10)
        assert " ".join(map(str, [site, 32, *counts])) in " ".join(plain.output.split())
    assert f"64 training images in all ({split} split" in plain.output
