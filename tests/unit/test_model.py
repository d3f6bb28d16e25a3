import pytest
import torch
from torch.nn import functional as F

from model import KEY_METRIC, SimpleNetwork, compute_metrics, create_model, criterion


def test_logits_of_ten_classes_for_each_image():
    assert SimpleNetwork()(torch.zeros(3, 3, 32, 32)).shape == (3, 10)


def test_62006_parameters_in_the_layers_of_the_specification():
    model = create_model()
    assert isinstance(model, SimpleNetwork)
    assert sum(parameter.numel() for parameter in model.parameters()) == 62_006
    assert [name for name, _ in model.named_children()] == ["conv1", "pool", "conv2", "fc1", "fc2", "fc3"]


def test_seed_decides_the_initial_weights_and_leaves_torch_alone():
    before = torch.get_rng_state()
    a, b, other = (create_model(seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["conv1.weight"], other["conv1.weight"])
    assert torch.equal(torch.get_rng_state(), before)


def test_metrics_of_a_test_set_are_accuracy_in_percent_and_mean_cross_entropy():
    outputs, labels = torch.randn(8, 10, generator=torch.Generator().manual_seed(0)), torch.arange(8)
    outputs[:6, :] = F.one_hot(labels[:6], 10) * 5.0
    outputs[6:, :] = F.one_hot(labels[6:] + 1, 10) * 5.0
    metrics = compute_metrics(outputs, labels)
    assert metrics == {"accuracy": 75.0, "loss": pytest.approx(F.cross_entropy(outputs, labels).item())}
    assert all(type(value) is float for value in metrics.values())
    assert KEY_METRIC == ("accuracy", "max") and torch.equal(
        criterion(outputs, labels), F.cross_entropy(outputs, labels)
    )
