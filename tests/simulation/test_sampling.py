"""A round may draw some of the sites: real runs, whose global model is the mean of the drawn ones."""

import re

import pytest

from conftest import run_job, same_weights, succeed
from reference import distance, fedavg, images_of_sites
from stages import ONE_THREAD, cross_site_results
from test_fedavg import shares

SITES = ["site-1", "site-2", "site-3"]
FLAGS = ["--n_clients", "3", "--clients_per_round", "2", "--split", "iid", "--train_size", "60", "--test_size", "20"]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A run that never draws site-3, and evaluates all models in the end."""
    workspace = tmp_path_factory.mktemp("evaluated") / "workspace"
    flags = ["--seed", "2", "--train_script", "client_with_eval.py", "--cross_site_eval"]
    return run_job(workspace, *FLAGS, *flags, **ONE_THREAD)


def drawn(run):
    """Return the sites that trained in each round, by what they print; those that report must be the same."""
    trained = [set(re.findall(rf"(site-\d)  round {i}/2  epoch", run.output)) for i in (1, 2)]
    assert trained == [set(re.findall(rf"(site-\d)  round {i}/2  reports", run.output)) for i in (1, 2)]
    assert run.output.count("averaged 2 local models") == 2
    return trained


def mean_of(sites, seed):
    """Return the model that plain PyTorch makes of these sites in each round."""
    train_sets = images_of_sites(shares("iid", 3, seed=seed, size=60)[1], seed=seed, size=60)
    return fedavg(train_sets, rounds=2, seed=seed, drawn=sites)


def test_global_model_is_the_mean_of_the_drawn_sites(evaluated):
    assert evaluated.status == 0, evaluated.errors
    sites = drawn(evaluated)
    assert [len(names) for names in sites] == [2, 2]
    assert distance(evaluated.weights(), mean_of(sites, seed=2)) < 1e-6
    assert distance(evaluated.weights(), mean_of([SITES] * 2, seed=2)) > 1e-4


def test_site_that_was_never_drawn_validates_the_others_and_has_no_model(evaluated):
    trained = set.union(*drawn(evaluated))
    assert trained == {"site-1", "site-2"}
    results = cross_site_results(evaluated)
    models = {"SRV_FL_global_model.pt", "SRV_best_FL_global_model.pt", *trained}
    assert {site: set(metrics) for site, metrics in results.items()} == dict.fromkeys(SITES, models)
    table = evaluated.output.partition("Each model (row) on each site's test data (column)")[2]
    models = ["FL_global_model.pt", "best_FL_global_model.pt", "site-1", "site-2"]
    rows = ["accuracy", *models, "loss", *models]
    assert re.findall(r"^ {2,4}(\S+) +\S+ +\S+ +\S+$", table, re.MULTILINE) == rows
    assert "Done: 2 rounds on 3 sites." in evaluated.output and "Lost:" not in evaluated.output
    assert not re.search("warning|error", evaluated.output + evaluated.errors, re.IGNORECASE)


def test_seed_decides_who_is_drawn(evaluated, tmp_path):
    again = succeed(tmp_path / "again", *FLAGS, "--seed", "2", **ONE_THREAD)
    assert drawn(again) == drawn(evaluated)
    assert same_weights(again.weights(), evaluated.weights())
    assert "Done: 2 rounds on 3 sites." in again.output

    other = succeed(tmp_path / "other", *FLAGS, "--seed", "1")
    sites = drawn(other)
    assert sites != drawn(evaluated) and sites[0] != sites[1]
    assert distance(other.weights(), mean_of(sites, seed=1)) < 1e-6
