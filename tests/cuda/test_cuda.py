"""The program on GPUs: python -m pytest tests/cuda. Where PyTorch finds none, each test is reported as skipped."""

import re

import pytest
import torch

from conftest import changed_client, replace, run_job

GPUS = torch.cuda.device_count()
pytestmark = pytest.mark.skipif(GPUS == 0, reason="NOT TESTED: PyTorch finds no GPU here")
SMALL = ["--train_size", "320", "--test_size", "100"]


def report_device(folder):
    """Write a copy of client.py that prints its device and the GPUs that it sees."""
    shown = '    print(f"trains on {device} with {torch.cuda.device_count()} GPUs")'
    return changed_client(folder, "client.py", "    model = create_model().to(device)\n", shown)


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    run = run_job(tmp_path_factory.mktemp("cpu") / "workspace", *SMALL, CUDA_VISIBLE_DEVICES="")
    assert run.status == 0, run.errors
    return run.weights()


@pytest.mark.parametrize("flags", [[], ["--gpu", "0"], ["--gpu", "[0]"]])
def test_sites_train_on_the_gpu_and_end_near_the_cpus_weights(on_cpu, tmp_path, flags):
    run = run_job(tmp_path / "workspace", *SMALL, *flags, "--train_script", str(report_device(tmp_path)))
    assert run.status == 0, run.errors
    assert run.output.count("trains on cuda") == 2
    for name, weights in run.weights().items():
        assert weights.isfinite().all() and torch.allclose(weights, on_cpu[name], atol=1e-3)


@pytest.mark.skipif(GPUS < 2, reason="NOT TESTED: PyTorch finds fewer than two GPUs here")
@pytest.mark.parametrize("spec, seen", [("0,1", 1), ("[0,1]", 2)])
def test_two_gpus_are_shared_out_as_asked(tmp_path, spec, seen):
    run = run_job(tmp_path / "workspace", *SMALL, "--gpu", spec, "--train_script", str(report_device(tmp_path)))
    assert run.status == 0, run.errors
    assert re.findall(r"trains on cuda with (\d) GPUs", run.output) == [str(seen)] * 2


def test_memory_is_free_again_when_the_sites_processes_have_ended(tmp_path):
    free, _ = torch.cuda.mem_get_info()
    run = run_job(tmp_path / "workspace", *SMALL)
    assert run.status == 0, run.errors
    assert torch.cuda.mem_get_info()[0] >= free - 100_000_000


def test_site_that_runs_out_of_memory_is_named(tmp_path):
    script = report_device(tmp_path)
    line = "            model.load_state_dict("
    hog = '            if site_name == "site-2":\n                torch.empty(10**13, device="cuda")\n'
    replace(script, line, hog + line)
    run = run_job(tmp_path / "workspace", *SMALL, "--train_script", str(script))
    assert run.status == 1
    assert re.match(
        r"job\.py: error: site-2 failed: OutOfMemoryError: CUDA out of memory.*\(changed_client\.py:\d+\)", run.errors
    )
