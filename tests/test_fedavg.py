"""The federation against arithmetic: what NVFlare's FedAvg returns is what plain PyTorch and a mean give."""

import re
import shutil
import zlib

import pytest
import torch
from torch.nn import functional as F

import guard
from conftest import REPO, changed_client, run_job
from data import load_data, make_loader, partition
from model import SimpleNetwork

SIZE = 80
ALL = list(range(SIZE))


def train_locally(weights, site, round, seed, images, batch_size):
    """Train one site for one round of two epochs with plain PyTorch; return its weights and steps."""
    train_set, _ = load_data("synthetic", "", SIZE, 1, seed)
    train_set = torch.utils.data.TensorDataset(*(tensor[images] for tensor in train_set.tensors))
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {site} {round}".encode()))
    loader = make_loader(train_set, batch_size, generator)
    model = SimpleNetwork()
    model.load_state_dict(weights)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for _ in range(2):
        for images, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
    return model.state_dict(), 2 * len(loader)


def fedavg(images, rounds, seed, weights=None, batch_size=16, by_steps=True):
    """Average the weights of sites with these training images, by their steps or all alike, for some rounds."""
    weights = weights or SimpleNetwork(seed).state_dict()
    for round in range(rounds):
        results = [
            train_locally(weights, f"site-{i + 1}", round, seed, own, batch_size) for i, own in enumerate(images)
        ]
        total = sum(steps if by_steps else 1 for _, steps in results)
        weights = {
            name: sum(local[name] * (steps if by_steps else 1) for local, steps in results) / total for name in weights
        }
    return weights


def distance(a, b):
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.fixture(scope="module")
def one_client(tmp_path_factory):
    flags = ["--n_clients", "1", "--num_rounds", "3", "--train_size", str(SIZE), "--test_size", "1"]
    return run_job(tmp_path_factory.mktemp("one_client") / "workspace", *flags)


def test_one_client_is_plain_training(one_client):
    assert one_client.status == 0, one_client.errors
    assert distance(one_client.weights(), fedavg([ALL], rounds=3, seed=0)) < 1e-6


@pytest.mark.parametrize("saved", ["the result of the run before", "a state_dict"])
def test_saved_weights_are_trained_further(one_client, tmp_path, saved):
    weights = SimpleNetwork(seed=5).state_dict()
    checkpoint, workspace = tmp_path / "weights.pt", tmp_path / "workspace"
    torch.save(weights, checkpoint)
    if saved == "the result of the run before":  # whose folder the new run renames
        workspace = tmp_path / "copy"
        shutil.copytree(one_client.folder, workspace / "hello-pt")
        checkpoint, weights = next((workspace / "hello-pt").glob(guard.MODEL)), one_client.weights()
    flags = ["--n_clients", "1", "--num_rounds", "1", "--train_size", str(SIZE), "--test_size", "1"]
    run = run_job(workspace, *flags, "--initial_ckpt", str(checkpoint))
    assert run.status == 0, run.errors
    assert distance(run.weights(), fedavg([ALL], rounds=1, seed=0, weights=weights)) < 1e-6


def test_three_clients_and_another_seed(tmp_path):
    flags = ["--n_clients", "3", "--num_rounds", "2", "--train_size", str(SIZE), "--test_size", "1", "--seed", "7"]
    run = run_job(tmp_path / "workspace", *flags)
    assert run.status == 0, run.errors
    assert distance(run.weights(), fedavg([ALL] * 3, rounds=2, seed=7)) < 1e-5
    assert distance(run.weights(), fedavg([ALL] * 3, rounds=2, seed=0)) > 1e-2


def test_sites_train_on_their_shares_and_are_weighted_by_their_steps(tmp_path):
    # 27, 27 and 26 images, in batches of 13: 3, 3 and 2 steps an epoch.
    flags = ["--n_clients", "3", "--train_size", str(SIZE), "--test_size", "1", "--split", "dirichlet", "--alpha", "1"]
    run = run_job(tmp_path / "workspace", *flags, "--batch_size", "13")
    assert run.status == 0, run.errors
    train_set, _ = load_data("synthetic", "", SIZE, 1, 0)
    labels = train_set.tensors[1].numpy()
    shares = partition(labels, 3, "dirichlet", 1, 0)
    assert distance(run.weights(), fedavg(shares, rounds=2, seed=0, batch_size=13)) < 1e-5
    assert distance(run.weights(), fedavg(shares, rounds=2, seed=0, batch_size=13, by_steps=False)) > 1e-4


def test_sites_of_very_different_sizes_are_weighted_by_their_steps(tmp_path):
    smaller = "train_set = torch.utils.data.TensorDataset(*(tensor[:16] for tensor in train_set.tensors))"
    condition = '        if flare.get_site_name() == "site-2":'
    script = changed_client(
        tmp_path, "client.py", "        writer = SummaryWriter(", f"{condition}\n            {smaller}"
    )
    flags = ["--train_size", str(SIZE), "--test_size", "1", "--train_script", str(script)]
    run = run_job(tmp_path / "workspace", *flags)
    assert run.status == 0, run.errors
    assert distance(run.weights(), fedavg([ALL, ALL[:16]], rounds=2, seed=0)) < 1e-6
    assert distance(run.weights(), fedavg([ALL, ALL], rounds=2, seed=0)) > 1e-4


def test_privacy_filter_of_the_readme_is_applied(tmp_path):
    section = (REPO / "README.md").read_text().partition("### Privacy filters")[2]
    imports, argument, statement = re.findall(r"```(?:python|text)\n(.*?)```", section, re.DOTALL)[:3]
    repo = tmp_path / "repo"
    repo.mkdir()
    for file in REPO.glob("*.py"):
        shutil.copy(file, repo)
    source = (REPO / "job.py").read_text()
    for line, new in [
        ("import torch\n", imports),
        ("        launch_external_process=True,\n", argument),
        ('    add_experiment_tracking(recipe, "tensorboard")\n', statement),
    ]:
        assert source.count(line) == 1
        source = source.replace(line, line + new)
    (repo / "job.py").write_text(source)

    flags = ["--n_clients", "1", "--num_rounds", "1", "--train_size", str(SIZE), "--test_size", "1"]
    run = run_job(tmp_path / "workspace", *flags, repo=repo)
    assert run.status == 0, run.errors
    steps = 10
    before, trained = SimpleNetwork(0).state_dict(), fedavg([ALL], rounds=1, seed=0)
    parts = {name: (trained[name] - before[name]) / steps for name in before}
    median = torch.cat([part.flatten().abs() for part in parts.values()]).quantile(0.5)
    largest = max(part.abs().max() for part in parts.values())
    assert largest > 0.001 > median  # so that both rules of the filter count
    kept = {name: torch.where(part.abs() < median, 0, part).clamp(-0.001, 0.001) for name, part in parts.items()}
    assert distance(run.weights(), {name: before[name] + steps * kept[name] for name in before}) < 1e-6
    assert distance(run.weights(), trained) > 1e-3
