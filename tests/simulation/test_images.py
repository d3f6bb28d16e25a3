"""Where a run's images come from: real runs, offline and with a download."""

import shutil

from conftest import REPO, TEST_IMAGES, copy_repo, run_job
from stages import cross_site_results, scalars, sizes


def test_offline_default_run_learns_synthetic_images_and_says_so(offline, tmp_path):
    (tmp_path / "Größe-工作区").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "Größe-工作区")
    flags = ["--dataset", "auto", "--data_root", str(tmp_path / "data"), "--train_script", "client_with_eval.py"]
    run = run_job(tmp_path / "link", *flags, **offline)
    assert run.status == 0, run.errors
    assert "WARNING: training on SYNTHETIC images" in run.errors
    summary = run.output.partition("Done:")[2]
    assert "\nData: synthetic.\n" in summary and "WARNING" in summary
    assert sizes(run) == {"site-1": (5000, 1000), "site-2": (5000, 1000)}
    first, second, final = (cross_site_accuracy for cross_site_accuracy in scalars(run, "site-1")["accuracy"].values())
    assert first < 20 < second < final and final >= 60


def test_client_with_eval_copied_over_client_downloads_and_evaluates(online, tmp_path):
    repo = copy_repo(tmp_path / "my copy")
    shutil.copy(REPO / "client_with_eval.py", repo / "client.py")
    flags = ["--dataset", "auto", "--data_root", str(tmp_path / "data"), "--train_size", "64", "--num_rounds", "1"]
    run = run_job(tmp_path / "workspace", *flags, repo=repo, **online)
    assert run.status == 0, run.errors  # which has the download's progress
    assert "\nData: cifar10.\n" in run.output
    assert sizes(run) == {"site-1": (64, TEST_IMAGES), "site-2": (64, TEST_IMAGES)}
    for site in ("site-1", "site-2"):
        accuracy = cross_site_results(run)[site]["SRV_FL_global_model.pt"]["accuracy"]
        assert accuracy * TEST_IMAGES / 100 == round(accuracy * TEST_IMAGES / 100)  # of the small CIFAR-10
