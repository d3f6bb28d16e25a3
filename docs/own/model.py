"""What is learned: the network, its loss, its metrics, and the metric that the best model is chosen by."""

import torch
from torch import nn

KEY_METRIC = ("loss", "min")  # one of those that compute_metrics returns; "min": the smaller, the better

criterion = nn.CrossEntropyLoss()  # takes the outputs and the labels of a batch


def create_model(seed: int = 0, dropout: float = 0.1) -> nn.Module:
    """Return the network that the federation learns. Its initial weights come from the seed.

    It takes 13 features as they were measured, float32 (N, 13), and returns the logits of three classes, (N, 3).
    """
    with torch.random.fork_rng(devices=[]):  # leaves the caller's generator (of the CPU) as it was
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.BatchNorm1d(13),  # learns the features' scales, which differ by a factor of a thousand
            nn.Linear(13, 16),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(16, 3),
        )


def compute_metrics(outputs: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Return the metrics of a whole test set by name: accuracy in percent, and loss, the mean cross-entropy.

    Args:
        outputs: what the network returns, here logits (N, 3) float32, on the CPU.
        labels: (N,) int64, on the CPU.
    """
    correct = (outputs.argmax(dim=1) == labels).sum().item()
    return {"accuracy": 100 * correct / len(labels), "loss": criterion(outputs, labels).item()}
