"""The federation against arithmetic: what NVFlare's FedAvg returns is what plain PyTorch and a mean give."""

import re

import numpy as np
import pytest
import torch

from conftest import REPO, changed_client, copy_repo, data_flags, insert, run_job, same_weights, succeed
from data import load_data, partition
from model import create_model
from reference import distance, fedavg, images_of_sites
from stages import ONE_THREAD, sizes

SIZE = 80
ALL = list(range(SIZE))


def test_one_client_is_plain_training(tmp_path):
    flags = ["--n_clients", "1", "--num_rounds", "3", "--train_size", str(SIZE), "--test_size", "1"]
    run = succeed(tmp_path / "workspace", *flags)
    assert distance(run.weights(), fedavg(images_of_sites([ALL], seed=0, size=SIZE), rounds=3, seed=0)) < 1e-6


def shares(split, n_clients, seed, alpha=None, size=SIZE):
    train_set, _ = load_data(data_flags(train_size=size, test_size=1, seed=seed), "site-1")
    labels = train_set.targets.numpy()
    return labels, partition(labels, n_clients, split, alpha, seed)


def test_two_sites_of_very_different_sizes_are_weighted_by_their_steps_and_evaluated(tmp_path):
    flags = ["--train_size", str(SIZE), "--test_size", "100", "--seed", "7", "--split", "dirichlet", "--alpha", "0.1"]
    run = succeed(tmp_path / "workspace", *flags, "--train_script", "client_with_eval.py")
    labels, sites = shares("dirichlet", 2, seed=7, alpha=0.1)
    assert max(map(len, sites)) > 2 * min(map(len, sites))
    train_sets = images_of_sites(sites, seed=7, size=SIZE)
    assert distance(run.weights(), fedavg(train_sets, rounds=2, seed=7)) < 1e-6
    assert distance(run.weights(), fedavg(train_sets, rounds=2, seed=7, by_steps=False)) > 1e-4

    # The start shows each site's share, class by class.
    for site, share in zip(("site-1", "site-2"), sites):
        counts = np.bincount(labels[share], minlength=10)
        assert " ".join(map(str, [site, 100, len(share), *counts])) in " ".join(run.output.split())
    assert "\nData: synthetic (dirichlet split of alpha 0.1).\n" in run.output


# 84 images: four sites have 11 and four have 10, in batches of 10: 2 steps an epoch and 1.
EIGHT = ["--n_clients", "8", "--train_size", "84", "--test_size", "1", "--split", "iid", "--batch_size", "10"]


@pytest.fixture(scope="module")
def eight_sites(tmp_path_factory):
    return succeed(tmp_path_factory.mktemp("eight_sites") / "workspace", *EIGHT, **ONE_THREAD)


def test_eight_sites_train_on_their_shares(eight_sites):
    run = eight_sites
    _, sites = shares("iid", 8, seed=0, size=84)
    own, all_images = (images_of_sites(sites, seed=0, size=84) for sites in (sites, [range(84)] * 8))
    reference = {"rounds": 2, "seed": 0, "batch_size": 10}
    assert distance(run.weights(), fedavg(own, **reference)) < 1e-5
    assert distance(run.weights(), fedavg(own, **reference, by_steps=False)) > 1e-4
    assert distance(run.weights(), fedavg(all_images, **reference)) > 1e-2
    assert "\nData: synthetic (iid split).\n" in run.output
    assert sorted(train_size for train_size, _ in sizes(run).values()) == [10] * 4 + [11] * 4
    assert {folder.name for folder in (run.results / "tb_events").iterdir()} == {f"site-{i}" for i in range(1, 9)}


def test_eight_sites_end_in_the_same_bits_in_whatever_order_they_send(eight_sites, tmp_path):
    order = sending_order(eight_sites)
    line = "            flare.send(local_model)  # (11) to the server"
    delay = f"            time.sleep((8 - {order}.index(site_name)) / 2)"  # the last one sends first
    script = changed_client(tmp_path, "client.py", line, delay)
    run = succeed(tmp_path / "workspace", *EIGHT, "--train_script", str(script), **ONE_THREAD)
    assert sorted(order) == sorted(sending_order(run)) and order != sending_order(run)
    assert same_weights(run.weights(), eight_sites.weights())


def sending_order(run):
    """Return the sites in the order in which they sent their models of the last round."""
    return re.findall(r"(site-\d)  round 2/2  reports", run.output)


def test_sites_have_names_of_their_own(tmp_path):
    sites = ["hospital-b", "hospital-a"]
    fault = '        assert site_name == "hospital-b", "no curves"'
    script = changed_client(tmp_path, "client_with_eval.py", "    finally:", fault)
    flags = ["--sites", *sites, "--split", "iid", "--train_size", "40", "--test_size", "20", "--num_rounds", "1"]
    run = run_job(tmp_path / "workspace", *flags, "--cross_site_eval", "--train_script", str(script))
    line = 1 + script.read_text().splitlines().index(fault)
    assert run.status == 1
    assert run.errors == (
        f"job.py: error: hospital-a failed: AssertionError: no curves (changed_client.py:{line}) "
        f"(see {run.folder / 'hospital-a' / 'log.txt'}); the results are complete\n"
    )

    _, parts = shares("iid", 2, seed=0, size=40)  # a site's place in the list is its share
    expected = fedavg(images_of_sites(parts, seed=0, size=40), rounds=1, seed=0, sites=sites)
    assert distance(run.weights(), expected) < 1e-6
    for site in sites:
        assert f"\n{site}  round 1/1  epoch 2/2  loss " in run.output
        assert f"\n{site}  round 1/1  reports train_loss " in run.output
    tables = re.findall(r"^  (train_loss|accuracy|loss) +hospital-b +hospital-a$", run.output, re.MULTILINE)
    assert tables == ["train_loss", "accuracy", "loss", "accuracy", "loss"]  # of the round, and of all models
    assert re.search(r"\n    hospital-b( +\d\S+){2}\n    hospital-a( +\d\S+){2}\n", run.output)
    assert {folder.name for folder in (run.results / "tb_events").iterdir()} == set(sites)
    summary = run.report()
    assert list(summary["data"]["sites"]) == summary["settings"]["sites"] == sites
    assert set(summary["models"]) == {"FL_global_model.pt", *sites}
    assert "site-" not in run.output


def test_privacy_filter_of_the_page_is_applied(tmp_path):
    section = (REPO / "docs" / "real-sites.md").read_text().partition("## Privacy filters")[2]
    imports, argument, statement = re.findall(r"```(?:python|text)\n(.*?)```", section, re.DOTALL)[:3]
    repo = copy_repo(tmp_path / "repo")
    for line, new in [
        ("from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe\n", imports),
        ("        launch_timeout=3600,  # seconds until the script calls flare.init\n", argument),
        ('    add_experiment_tracking(recipe, "tensorboard")\n', statement),
    ]:
        insert(repo / "job.py", line, new)
    flags = ["--n_clients", "1", "--num_rounds", "1", "--train_size", str(SIZE), "--test_size", "1"]
    run = succeed(tmp_path / "workspace", *flags, repo=repo)
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
    # The filter makes NVFlare set up the sites before add_guards does; the script is started as ever all the same.
    assert "The client script has ended: status 0" in (run.folder / "site-1" / "log.txt").read_text()
