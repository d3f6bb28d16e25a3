"""What is learned: the network, its loss, its metrics, and the metric that the best model is chosen by."""

import torch
from torch import nn
from torch.nn import functional as F

KEY_METRIC = ("accuracy", "max")  # one of those that compute_metrics returns; "min": the smaller, the better

criterion = nn.CrossEntropyLoss()  # takes the outputs and the labels of a batch


class SimpleNetwork(nn.Module):
    """A small convolutional network for CIFAR-10, 62 006 parameters."""

    def __init__(self):
        super().__init__()
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


def create_model(seed: int = 0) -> nn.Module:
    """Return the network that the federation learns. Its initial weights come from the seed.

    A job names this function, and the server calls it with job.py's --seed, for the first global model.
    """
    with torch.random.fork_rng(devices=[]):  # leaves the caller's generator (of the CPU) as it was
        torch.manual_seed(seed)
        return SimpleNetwork()


def compute_metrics(outputs: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Return the metrics of a whole test set by name: accuracy in percent, and loss, the mean cross-entropy.

    Args:
        outputs: what the network returns, here logits (N, 10) float32, on the CPU.
        labels: (N,) int64, on the CPU.
    """
    correct = (outputs.argmax(dim=1) == labels).sum().item()
    return {"accuracy": 100 * correct / len(labels), "loss": criterion(outputs, labels).item()}
