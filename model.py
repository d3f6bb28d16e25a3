"""The network that the federation learns."""

import torch
from torch import nn
from torch.nn import functional as F


class SimpleNetwork(nn.Module):
    """A small convolutional network for CIFAR-10, 62 006 parameters.

    Args:
        seed: seed of the initial weights. NVFlare ships a model as its class and its constructor
            arguments, which it reads from the attributes of their names, and builds it again on the server:
            so the seed of the initial weights travels to it, and they themselves don't.
    """

    def __init__(self, seed: int = 0):
        super().__init__()
        self.seed = seed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.conv1 = nn.Conv2d(3, 6, 5)
            self.pool = nn.MaxPool2d(2, 2)
            self.conv2 = nn.Conv2d(6, 16, 5)
            self.fc1 = nn.Linear(16 * 5 * 5, 120)
            self.fc2 = nn.Linear(120, 84)
            self.fc3 = nn.Linear(84, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits (N, 10) of images (N, 3, 32, 32), float32 in [-1, 1]."""
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = torch.flatten(x, 1)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)
