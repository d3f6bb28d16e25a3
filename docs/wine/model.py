"""What is learned: the network, and the metric that its best state is chosen by."""

import torch
from torch import nn

KEY_METRIC = ("loss", "min")  # one of those that client_with_eval.py reports; "min": the smaller, the better


def create_model(seed: int = 0, dropout: float = 0.1) -> nn.Module:
    """Return the network that the federation learns; its initial weights come from the seed.

    It takes 13 features as they were measured, float32 (N, 13), and returns the logits of three classes, (N, 3).
    """
    with torch.random.fork_rng(devices=[]):  # leaves the caller's generator as it was
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.BatchNorm1d(13),  # learns the features' scales
            nn.Linear(13, 16),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(16, 3),
        )
