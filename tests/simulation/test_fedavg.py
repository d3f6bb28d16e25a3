"""The federation against arithmetic: what NVFlare's FedAvg returns is what plain PyTorch and a mean give."""

import re
import shutil

import numpy as np
import pytest
import torch

from conftest import REPO, copy_repo, data_flags, run_job
from data import load_data, partition
from model import create_model
from reference import distance, fedavg, images_of_sites
from stages import MODEL

SIZE = 80
ALL = list(range(SIZE))


@pytest.fixture(scope="module")
def one_client(tmp_path_factory):
    flags = ["--n_clients", "1", "--num_rounds", "3", "--train_size", str(SIZE), "--test_size", "1"]
    return run_job(tmp_path_factory.mktemp("one_client") / "workspace", *flags)


def test_one_client_is_plain_training(one_client):
    assert one_client.status == 0, one_client.errors
    assert distance(one_client.weights(), fedavg(images_of_sites([ALL], seed=0, size=SIZE), rounds=3, seed=0)) < 1e-6


def test_result_of_the_run_before_is_trained_further(one_client, tmp_path):
    workspace = tmp_path / "copy"
    shutil.copytree(one_client.folder, workspace / "hello-pt")  # which the new run renames
    flags = ["--n_clients", "1", "--num_rounds", "1", "--train_size", str(SIZE), "--test_size", "1"]
    run = run_job(workspace, *flags, "--initial_ckpt", str(workspace / "hello-pt" / MODEL))
    assert run.status == 0, run.errors
    expected = fedavg(images_of_sites([ALL], seed=0, size=SIZE), rounds=1, seed=0, weights=one_client.weights())
    assert distance(run.weights(), expected) < 1e-6


def shares(split, n_clients, seed, alpha=None, size=SIZE):
    train_set, _ = load_data(data_flags(train_size=size, test_size=1, seed=seed), "site-1")
    labels = train_set.targets.numpy()
    return labels, partition(labels, n_clients, split, alpha, seed)


def test_two_sites_of_very_different_sizes_are_weighted_by_their_steps_and_evaluated(tmp_path):
    flags = ["--train_size", str(SIZE), "--test_size", "100", "--seed", "7", "--split", "dirichlet", "--alpha", "0.1"]
    run = run_job(tmp_path / "workspace", *flags, "--train_script", "client_with_eval.py")
    assert run.status == 0, run.errors
    labels, sites = shares("dirichlet", 2, seed=7, alpha=0.1)
    assert max(map(len, sites)) > 2 * min(map(len, sites))
    train_sets = images_of_sites(sites, seed=7, size=SIZE)
    assert distance(run.weights(), fedavg(train_sets, rounds=2, seed=7)) < 1e-6
    assert distance(run.weights(), fedavg(train_sets, rounds=2, seed=7, by_steps=False)) > 1e-4

    # The start shows each site's share, class by class.
    for site, share in zip(("site-1", "site-2"), sites):
        counts = np.bincount(labels[share], minlength=10)
        assert " ".join(map(str, [site, 100, len(share), *counts])) in " ".join(run.output.split())
    sizes = sorted(map(len, sites))
    assert f"(dirichlet split of alpha 0.1), {sizes[0]} to {sizes[1]} training samples a site" in run.output


def test_eight_sites_train_on_their_shares(tmp_path):
    # 84 images: four sites have 11 and four have 10, in batches of 10: 2 steps an epoch and 1.
    flags = ["--n_clients", "8", "--train_size", "84", "--test_size", "1", "--split", "iid", "--batch_size", "10"]
    run = run_job(tmp_path / "workspace", *flags)
    assert run.status == 0, run.errors
    _, sites = shares("iid", 8, seed=0, size=84)
    own, all_images = (images_of_sites(sites, seed=0, size=84) for sites in (sites, [range(84)] * 8))
    reference = {"rounds": 2, "seed": 0, "batch_size": 10}
    assert distance(run.weights(), fedavg(own, **reference)) < 1e-5
    assert distance(run.weights(), fedavg(own, **reference, by_steps=False)) > 1e-4
    assert distance(run.weights(), fedavg(all_images, **reference)) > 1e-2
    assert "(iid split), 10 to 11 training samples a site" in run.output
    assert {folder.name for folder in (run.results / "tb_events").iterdir()} == {f"site-{i}" for i in range(1, 9)}


def test_privacy_filter_of_the_page_is_applied(tmp_path):
    section = (REPO / "docs" / "real-sites.md").read_text().partition("## Privacy filters")[2]
    imports, argument, statement = re.findall(r"```(?:python|text)\n(.*?)```", section, re.DOTALL)[:3]
    repo = copy_repo(tmp_path / "repo")
    source = (REPO / "job.py").read_text()
    for line, new in [
        ("import os\n", imports),
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
    before = create_model(0).state_dict()
    trained = fedavg(images_of_sites([ALL], seed=0, size=SIZE), rounds=1, seed=0)
    parts = {name: (trained[name] - before[name]) / steps for name in before}
    median = torch.cat([part.flatten().abs() for part in parts.values()]).quantile(0.5)
    largest = max(part.abs().max() for part in parts.values())
    assert largest > 0.001 > median  # so that both rules of the filter count
    kept = {name: torch.where(part.abs() < median, 0, part).clamp(-0.001, 0.001) for name, part in parts.items()}
    assert distance(run.weights(), {name: before[name] + steps * kept[name] for name in before}) < 1e-6
    assert distance(run.weights(), trained) > 1e-3
