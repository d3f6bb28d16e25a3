"""Metrics and rounds of any kind: tensors, undefined ones, rounds that count on."""

import re

import pytest

from conftest import changed_client, copy_repo, insert, replace, run_job, same_weights, succeed
from stages import SMALL


def test_rounds_count_on_from_an_earlier_run_and_end_in_the_same_bits(tmp_path):
    flags = ["--train_size", "32", "--test_size", "20", "--train_script", "client_with_eval.py"]
    whole = run_job(tmp_path / "whole", *flags, "--num_rounds", "3", OMP_NUM_THREADS="1")
    first = run_job(tmp_path / "parts", *flags, "--num_rounds", "1", OMP_NUM_THREADS="1")
    flags += ["--initial_ckpt", str(first.results / "app_server" / "FL_global_model.pt"), "--first_round", "2"]
    second = run_job(tmp_path / "parts", *flags, "--num_rounds", "2", OMP_NUM_THREADS="1")
    assert (whole.status, first.status, second.status) == (0, 0, 0), second.errors
    assert same_weights(whole.weights(), second.weights())
    for i in (2, 3):
        assert f"\nround {i}/3  begins\n" in second.output and f"\n    round {i} " in second.output
        assert f"site-1  round {i}/3  epoch 1/2" in second.output
    assert "Done: 2 rounds on 2 sites." in second.output and "\n    round 1 " not in second.output
    assert second.report()["rounds"] == whole.report()["rounds"][1:]
    assert second.report()["models"] == whole.report()["models"]


UNUSUAL = """
            import numpy
            metrics = {name: torch.tensor(value) for name, value in metrics.items()}
            metrics["numpy"] = numpy.float64(0.25)
            if site_name == "site-2":
                metrics["undefined"] = float("nan") if global_model.current_round else None
                metrics["accuracy"] = float("nan")
            else:
                metrics["accuracy"] = torch.tensor(50.0)
                metrics["undefined"] = 1.5
"""


def test_metrics_may_be_tensors_and_numpys_numbers_and_undefined_ones_are_dashes_and_not_in_the_mean(tmp_path):
    line = "            if flare.is_evaluate():"
    script = changed_client(tmp_path, "client_with_eval.py", line, UNUSUAL)
    replace(script, '"train_loss": train_loss', '"train_loss": torch.tensor(train_loss)')
    replace(script, 'STEPS_CURRENT_ROUND": steps', 'STEPS_CURRENT_ROUND": torch.tensor(steps)')
    flags = ["--train_size", "32", "--test_size", "20", "--train_script", str(script)]
    run = succeed(tmp_path / "workspace", *flags)
    table = run.output.partition("\n  undefined ")[2]
    assert re.match(r" +site-1  site-2\n    round 1 +1\.500 +-\n    round 2 +1\.500 +-\n    final +1\.500 +-\n", table)
    report = run.report()
    for metrics in (report["rounds"][1]["site-1"], report["models"]["FL_global_model.pt"]["site-1"]):
        assert metrics["numpy"] == 0.25 and isinstance(metrics["accuracy"], float)
    best = "The best is FL_global_model.pt, after round 2: accuracy 50.00 on average over the sites that reported it."
    assert f"{best}\n" in run.output


@pytest.mark.parametrize(
    "buffer", ["torch.zeros(2).to_sparse()", "torch.zeros(2, device='meta')", "torch.zeros(2).to(torch.float8_e4m3fn)"]
)
def test_model_that_cannot_be_sent_is_told_at_once(tmp_path, buffer):
    repo = copy_repo(tmp_path / "repo")
    last_layer = "        self.fc3 = nn.Linear(84, 10)\n"
    insert(repo / "model.py", last_layer, f'        self.register_buffer("buffer", {buffer})\n')
    run = run_job(tmp_path / "workspace", *SMALL, repo=repo)
    error = r"job\.py: error: buffer in the state_dict of create_model can't be sent: .*\n"
    assert run.status == 1 and re.fullmatch(error, run.errors)
    assert "NVFlare's logs" not in run.output
