"""Federated averaging in plain PyTorch: what NVFlare's must return."""

import zlib

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from conftest import data_flags
from data import load_data
from model import create_model


def train_locally(model, train_set, site, round, seed, batch_size, drop_last):
    """Train one site's model for one round of two epochs; return its weights and steps."""
    torch.manual_seed(zlib.crc32(f"{seed} {site} {round}".encode()))
    train_loader = DataLoader(train_set, batch_size, shuffle=True, drop_last=drop_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    model.train()
    steps = 0
    for _ in range(2):
        for batch, labels in train_loader:
            optimizer.zero_grad()
            F.cross_entropy(model(batch), labels).backward()
            optimizer.step()
            steps += 1
    return model.state_dict(), steps


def fedavg(
    train_sets: list[Dataset],
    rounds,
    seed,
    weights=None,
    batch_size=16,
    by_steps=True,
    create_model=create_model,
    drop_last=False,
    drawn=None,
    sites=None,
):
    """Average the weights of sites with these training sets, by their steps or all alike, for some rounds.

    Args:
        drawn: the names of the sites that train in each round; by default all.
        sites: the names of all sites; by default site-1 and so on.
    """
    sites = sites or [f"site-{i + 1}" for i in range(len(train_sets))]
    weights = dict(weights or create_model(seed).state_dict())
    for round in range(rounds):
        results = []
        for site, train_set in zip(sites, train_sets):
            if drawn and site not in drawn[round]:
                continue
            model = create_model()
            model.load_state_dict(weights)
            results.append(train_locally(model, train_set, site, round, seed, batch_size, drop_last))
        total = sum(steps if by_steps else 1 for _, steps in results)
        for name in weights:
            mean = sum(local[name] * (steps if by_steps else 1) for local, steps in results) / total
            weights[name] = mean if weights[name].is_floating_point() else mean.round().to(weights[name].dtype)
    return weights


def images_of_sites(sites, seed, size):
    """Return the training set of each site, whose images have these indices among `size` synthetic ones."""
    train_set, _ = load_data(data_flags(train_size=size, test_size=1, seed=seed), "site-1")
    return [TensorDataset(*train_set[list(images)]) for images in sites]


def distance(a, b):
    """Return the largest difference of two models' numbers; of numbers beyond 1, relative to their size."""
    return max(((a[name] - b[name]).abs() / b[name].abs().clamp(min=1)).max().item() for name in a)
