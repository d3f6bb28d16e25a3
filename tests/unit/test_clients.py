"""What both clients share, and how the FLARE lines in them are numbered."""

import re

import pytest

from conftest import REPO

CHANGED_BY_EVALUATION = [  # lines of client.py that client_with_eval.py has in another form
    '"""One site\'s local training: plain PyTorch, made federated by the twelve numbered FLARE lines."""',
    "from model import create_model, criterion",
    "        train_set, _ = load_data(args, site_name)",
    '                metrics={"train_loss": train_loss},',
]


def lines(name):
    return [line for line in (REPO / name).read_text().splitlines() if line]


def test_lines_of_client_stand_in_order_in_client_with_eval():
    rest = iter(lines("client_with_eval.py"))
    missing = [line for line in lines("client.py") if line not in CHANGED_BY_EVALUATION and line not in rest]
    assert missing == []
    assert all(line in lines("client.py") for line in CHANGED_BY_EVALUATION)
    assert not any(line in lines("client_with_eval.py") for line in CHANGED_BY_EVALUATION)


@pytest.mark.parametrize("name, count", [("client.py", 12), ("client_with_eval.py", 16)])
def test_flare_lines_are_numbered_each_once(name, count):
    source = (REPO / name).read_text()
    numbers = [int(number) for number in re.findall(r"# \((\d+)\)", source)]
    assert sorted(numbers) == list(range(1, count + 1))
    for line in source.splitlines():
        if re.search(r"flare|SummaryWriter\(\)|global_model\.", line) and not line.startswith('"""'):
            assert re.search(r"# \(\d+\)", line), line


def test_loss_and_metrics_of_both_clients_are_those_of_model_py():
    for name in ("client.py", "client_with_eval.py"):
        source = (REPO / name).read_text()
        assert "loss = criterion(model(inputs), labels)" in source
        assert not re.search(r"cross_entropy|CrossEntropy|argmax|functional", source)
    assert "return compute_metrics(outputs, labels)" in (REPO / "client_with_eval.py").read_text()
