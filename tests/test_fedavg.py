"""The federation against arithmetic: what NVFlare's FedAvg returns is what plain PyTorch and a mean give."""

import shutil
import zlib

import pytest
import torch
from torch.nn import functional as F

import guard
from conftest import REPO, run_job
from data import load_data, make_loader
from model import SimpleNetwork

SIZE = 80


def train_locally(weights, site, round, seed, size=SIZE):
    """Train one site for one round of two epochs with plain PyTorch; return its weights and steps."""
    train_set, _ = load_data("synthetic", "", SIZE, 1, seed)
    train_set = torch.utils.data.TensorDataset(*(tensor[:size] for tensor in train_set.tensors))
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {site} {round}".encode()))
    loader = make_loader(train_set, 16, generator)
    model = SimpleNetwork()
    model.load_state_dict(weights)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for _ in range(2):
        for images, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
    return model.state_dict(), 2 * len(loader)


def fedavg(sizes, rounds, seed, weights=None):
    """Average the weights of sites with training sets of these sizes, by their steps, for some rounds."""
    weights = weights or SimpleNetwork(seed).state_dict()
    for round in range(rounds):
        results = [train_locally(weights, f"site-{i + 1}", round, seed, size) for i, size in enumerate(sizes)]
        total = sum(steps for _, steps in results)
        weights = {name: sum(local[name] * steps for local, steps in results) / total for name in weights}
    return weights


def distance(a, b):
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.fixture(scope="module")
def one_client(tmp_path_factory):
    flags = ["--n_clients", "1", "--num_rounds", "3", "--train_size", str(SIZE), "--test_size", "1"]
    return run_job(tmp_path_factory.mktemp("one_client") / "workspace", *flags)


def test_one_client_is_plain_training(one_client):
    assert one_client.status == 0, one_client.errors
    assert distance(one_client.weights(), fedavg([SIZE], rounds=3, seed=0)) < 1e-6


@pytest.mark.parametrize("saved", ["the result of the run before", "a state_dict"])
def test_saved_weights_are_trained_further(one_client, tmp_path, saved):
    weights = SimpleNetwork(seed=5).state_dict()
    checkpoint, workspace = tmp_path / "weights.pt", tmp_path / "workspace"
    torch.save(weights, checkpoint)
    if saved == "the result of the run before":  # whose folder the new run renames
        workspace = tmp_path / "copy"
        shutil.copytree(one_client.folder, workspace / "hello-pt")
        checkpoint, weights = workspace / "hello-pt" / guard.MODEL, one_client.weights()
    flags = ["--n_clients", "1", "--num_rounds", "1", "--train_size", str(SIZE), "--test_size", "1"]
    run = run_job(workspace, *flags, "--initial_ckpt", str(checkpoint))
    assert run.status == 0, run.errors
    assert distance(run.weights(), fedavg([SIZE], rounds=1, seed=0, weights=weights)) < 1e-6


def test_three_clients_and_another_seed(tmp_path):
    flags = ["--n_clients", "3", "--num_rounds", "2", "--train_size", str(SIZE), "--test_size", "1", "--seed", "7"]
    run = run_job(tmp_path / "workspace", *flags)
    assert run.status == 0, run.errors
    assert distance(run.weights(), fedavg([SIZE] * 3, rounds=2, seed=7)) < 1e-5
    assert distance(run.weights(), fedavg([SIZE] * 3, rounds=2, seed=0)) > 1e-2


def test_sites_are_weighted_by_their_steps(tmp_path):
    line = "        writer = SummaryWriter("
    smaller = "train_set = torch.utils.data.TensorDataset(*(tensor[:16] for tensor in train_set.tensors))"
    script = tmp_path / "unequal_client.py"
    source = (REPO / "client.py").read_text()
    script.write_text(
        source.replace(line, f'        if flare.get_site_name() == "site-2":\n            {smaller}\n{line}')
    )
    flags = ["--train_size", str(SIZE), "--test_size", "1", "--train_script", str(script)]
    run = run_job(tmp_path / "workspace", *flags)
    assert run.status == 0, run.errors
    assert distance(run.weights(), fedavg([SIZE, 16], rounds=2, seed=0)) < 1e-6
    assert distance(run.weights(), fedavg([SIZE, SIZE], rounds=2, seed=0)) > 1e-4
