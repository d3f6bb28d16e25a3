"""The recipes of docs/own-model-and-data.md, applied to copies of the program."""

import contextlib
import importlib.util
import re
import sqlite3

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from conftest import copy_repo, replace, run_job, succeed
from reference import distance
from wine import PAGE, WINE, apply, block_after, copy_with_wine, load_module, wine_flags

FOR_CLIENTS = [
    "**Another optimizer.**",
    "**A learning rate that decays over the rounds.**",
    "**Mixed precision.**",
    "**A progress bar.**",
    "**Tensors of which each site keeps its own**",
]
EARLY_STOPPING, MLFLOW = block_after("**Early stopping.**"), block_after("**MLflow.**")
(WORKERS,) = re.findall(r"`(num_workers=\d+)`", PAGE)
EVALUATED = ["--train_script", "client_with_eval.py"]


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    """A copy of the repository with the third wine against the others, and all recipes that can be had together."""
    repo = copy_with_wine(tmp_path_factory.mktemp("recipes") / "repo")
    for recipe in FOR_CLIENTS:
        for name in ("client.py", "client_with_eval.py"):
            apply(block_after(recipe), repo / name)
    apply(EARLY_STOPPING, repo / "job.py")
    network = re.search(r"def create_model.*?\n\n\n", (WINE / "model.py").read_text(), re.DOTALL)[0]
    imports = "import torch\nfrom sklearn.metrics import roc_auc_score\nfrom torch import nn\n"
    (repo / "model.py").write_text(f"{imports}\n{block_after('For two classes')}\n\n{network}")
    replace(repo / "model.py", "nn.Linear(16, 3)", "nn.Linear(16, 1), nn.Flatten(0)")
    replace(repo / "data.py", "torch.tensor(wine.target)", "torch.tensor(wine.target == 2, dtype=torch.float32)")
    replace(repo / "data.py", "drop_last=shuffle_by is not None", f"drop_last=shuffle_by is not None, {WORKERS}")
    one_class = """
    if site == "site-2":
        test_set = [sample for sample in test_set if sample[1] == 1]
"""
    replace(repo / "data.py", "    return train_sets[", f"{one_class}    return train_sets[")
    return repo


def expected(repo, rounds):
    """Return the weights that plain PyTorch gives with all recipes, but those that stay at the sites."""
    model, data = load_module(repo / "model.py"), load_module(repo / "data.py")
    sites = wine_flags().sites
    train_sets = {site: data.load_data(wine_flags(), site)[0] for site in sites}
    local = {site: model.create_model() for site in sites}
    weights = model.create_model().state_dict()
    for round in range(rounds):
        steps = {}
        for site in sites:
            local[site].load_state_dict({name: weights[name] for name in weights if name[:2] != "0."}, strict=False)
            loader = data.make_loader(train_sets[site], 16, shuffle_by=(0, site, round))
            optimizer = torch.optim.Adam(local[site].parameters(), lr=0.01 * 0.9**round)
            local[site].train()
            steps[site] = 2 * len(loader)
            for _ in range(2):
                for wines, labels in loader:
                    optimizer.zero_grad()
                    with torch.autocast("cpu", dtype=torch.bfloat16):
                        loss = binary_cross_entropy_with_logits(local[site](wines), labels)
                    loss.backward()
                    optimizer.step()
        states = {site: local[site].state_dict() for site in sites}
        for name in weights:
            mean = sum(states[site][name].double() * steps[site] for site in sites) / sum(steps.values())
            weights[name] = mean.to(weights[name].dtype)
    return {name: weights[name] for name in weights if name[:2] != "0."}


def test_recipes_together_train_as_plain_pytorch_until_the_condition_is_met(repo):
    run = run_job(repo.parent / "workspace", *EVALUATED, "--num_rounds", "12", repo=repo, OMP_NUM_THREADS="1")
    assert (run.status, run.errors) == (0, "")
    report = run.report()
    rounds = report["completed"]
    areas = [reported["site-1"]["AUC"] for reported in report["rounds"]]
    assert max(areas[:-1]) < 0.95 <= areas[-1]
    assert f"Done: {rounds} rounds of 12 (stop_cond or patience was met) on 2 sites." in run.output
    weights, wanted = run.weights(), expected(repo, rounds)
    assert distance({name: weights[name] for name in wanted}, wanted) < 1e-6

    # site-2 tests on one class alone.
    assert not any("AUC" in reported["site-2"] for reported in report["rounds"])
    assert re.search(rf"\n  AUC +site-1  site-2\n    round 1 +{areas[0]:#.4g} +-\n", run.output)
    # Two epochs draw the bar at their beginning and their end.
    assert len(re.findall(r"^site-1  round 1/12: .*/6 \[", run.output, re.MULTILINE)) == 4


def never_met(folder, rounds):
    """Run job.py with a condition that is never met, at a learning rate that changes nothing."""
    repo = copy_repo(folder / "repo")
    apply(EARLY_STOPPING.replace("AUC >= 0.95", "accuracy >= 101"), repo / "job.py")
    flags = ["--train_size", "32", "--test_size", "20", "--num_rounds", rounds, "--lr", "1e-9", "--epochs", "1"]
    return succeed(folder / "workspace", *EVALUATED, *flags, repo=repo)


def test_early_stopping_without_patience_left_keeps_the_best_model(tmp_path):
    run = never_met(tmp_path, rounds="9")
    assert "Done: 6 rounds of 9 (stop_cond or patience was met) on 2 sites." in run.output
    saved = torch.load(run.results / "app_server" / "FL_global_model.pt", weights_only=True)
    assert saved["meta_props"]["current_round"] == 0


def test_mlflow_has_a_run_for_each_site_if_it_is_installed(tmp_path):
    repo = copy_repo(tmp_path / "repo")
    apply(MLFLOW, repo / "job.py")
    run = run_job(tmp_path / "workspace", "--train_size", "32", "--test_size", "20", repo=repo)
    if importlib.util.find_spec("mlflow"):
        assert (run.status, run.errors) == (0, "")
        with contextlib.closing(sqlite3.connect(run.results / "mlflow.db")) as database:
            runs = database.execute("select name from runs join metrics using (run_uuid) where key = 'train_loss'")
            assert {name[:6] for (name,) in runs} == {"site-1", "site-2"}
    else:
        assert run.status == 1 and "mlflow is not installed" in run.errors


def test_early_stopping_whose_condition_is_never_met_is_a_whole_run(tmp_path):
    assert "Done: 3 rounds on 2 sites." in never_met(tmp_path, rounds="3").output
