"""Federated averaging in plain PyTorch: what NVFlare's must return."""

import zlib

import torch
from torch.nn import functional as F

from conftest import data_flags
from data import load_data, make_loader
from model import SimpleNetwork


def train_locally(weights, site, round, seed, images, batch_size, size):
    """Train one site for one round of two epochs; return its weights and steps."""
    train_set, _ = load_data(data_flags(train_size=size, test_size=1, seed=seed), site)
    train_set = torch.utils.data.TensorDataset(*(tensor[list(images)] for tensor in train_set.tensors))
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {site} {round}".encode()))
    loader = make_loader(train_set, len(train_set))
    images, labels = next(iter(loader))  # all of them, scaled
    model = SimpleNetwork()
    model.load_state_dict(weights)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    steps = 0
    for _ in range(2):
        for batch in torch.utils.data.BatchSampler(
            torch.utils.data.RandomSampler(train_set, generator=generator), batch_size, drop_last=False
        ):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            steps += 1
    return model.state_dict(), steps


def fedavg(images, rounds, seed, size, weights=None, batch_size=16, by_steps=True):
    """Average the weights of sites with these training images, by their steps or all alike, for some rounds.

    Args:
        images: of each site, the indices of its images among the `size` synthetic ones.
    """
    weights = weights or SimpleNetwork(seed).state_dict()
    for round in range(rounds):
        results = [
            train_locally(weights, f"site-{i + 1}", round, seed, own, batch_size, size) for i, own in enumerate(images)
        ]
        total = sum(steps if by_steps else 1 for _, steps in results)
        weights = {
            name: sum(local[name] * (steps if by_steps else 1) for local, steps in results) / total for name in weights
        }
    return weights


def distance(a, b):
    return max((a[name] - b[name]).abs().max().item() for name in a)
