import argparse
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torchvision.datasets

import cifar10
import data
import job
from conftest import REPO, TEST_IMAGES, TRAIN_IMAGES, data_flags


@pytest.fixture
def small_cifar10(cifar10_server, monkeypatch):
    """Let this process, too, use the small CIFAR-10."""
    for name, value in cifar10_server.attributes.items():
        monkeypatch.setattr(torchvision.datasets.CIFAR10, name, value)


@pytest.fixture
def no_network(small_cifar10, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")


def batches(folder):
    return folder / cifar10.BATCHES_FOLDER


def synthetic(train_size=None, test_size=None, seed=0):
    flags = data_flags(train_size=train_size, test_size=test_size, seed=seed)
    return data.load_data(flags, "site-1")


def load_cifar10(folder, train_size=None, test_size=None):
    flags = data_flags(dataset="cifar10", data_root=str(folder), train_size=train_size, test_size=test_size)
    return data.load_data(flags, "site-1")


def test_synthetic_images_have_cifar10s_shapes_and_come_from_the_seed():
    (images, labels), (test_images, _) = ((part.images, part.targets) for part in synthetic(200, 50, seed=1))
    assert images.shape == (200, 3, 32, 32) and images.dtype == torch.uint8 and test_images.shape == (50, 3, 32, 32)
    assert labels.dtype == torch.int64 and sorted(labels.unique().tolist()) == list(range(10))
    again, other = (synthetic(200, 50, seed)[0].images for seed in (1, 2))
    assert torch.equal(images, again) and not torch.equal(images, other)


def test_fewer_synthetic_images_are_the_first_of_more():
    (few, few_tests), (more, more_tests) = synthetic(5, 3), synthetic(9, 6)
    assert torch.equal(few.images, more.images[:5]) and torch.equal(few.targets, more.targets[:5])
    assert torch.equal(few_tests.images, more_tests.images[:3])


def test_synthetic_sizes_by_default():
    train_set, test_set = synthetic()
    assert (len(train_set), len(test_set)) == (5000, 1000)


def test_loader_scales_bytes_to_minus_one_to_one():
    images = torch.tensor([0, 255], dtype=torch.uint8).repeat(1, 3 * 32 * 16).view(1, 3, 32, 32)
    loader = data.make_loader(cifar10.Images(images, torch.zeros(1, dtype=torch.int64), []), 4)
    (batch, labels), *rest = loader
    assert batch.dtype == torch.float32 and (batch.min(), batch.max()) == (-1, 1) and not rest and len(labels) == 1


def test_loader_shuffles_by_what_it_is_told_and_visits_every_image_once():
    train_set, _ = synthetic(50, 1)

    def order(seed):
        loader = data.make_loader(train_set, 16, shuffle_by=(seed, "site-1", 0))
        return torch.cat([images for images, _ in loader])

    assert len(order(1)) == 50
    assert torch.equal(order(1), order(1)) and not torch.equal(order(1), order(2))
    assert torch.equal(order(1).sum((1, 2, 3)).sort().values, order(2).sum((1, 2, 3)).sort().values)
    in_order = torch.cat([images for images, _ in data.make_loader(train_set, 16)])
    assert torch.equal(in_order, train_set.images / 127.5 - 1)


def test_cifar10_is_downloaded_once_and_decoded_as_torchvision_reads_it(small_cifar10, cifar10_server, tmp_path):
    train_set, test_set = load_cifar10(tmp_path)
    downloads = cifar10_server.downloads
    assert (len(train_set), len(test_set)) == (TRAIN_IMAGES, TEST_IMAGES)
    for part, train in ((train_set, True), (test_set, False)):
        reference = torchvision.datasets.CIFAR10(tmp_path, train=train)
        images, labels = part.images, part.targets
        assert torch.equal(images, torch.from_numpy(reference.data).permute(0, 3, 1, 2))
        assert labels.tolist() == reference.targets
    load_cifar10(tmp_path)
    assert cifar10_server.downloads == downloads


def test_sizes_take_the_first_images(small_cifar10, tmp_path):
    train_set, test_set = load_cifar10(tmp_path, 7, 3)
    assert (len(train_set), len(test_set)) == (7, 3)
    assert torch.equal(train_set.images, load_cifar10(tmp_path)[0].images[:7])


EIGHT_TIMES = """
import multiprocessing, torch, torchvision.datasets, cifar10
torch.set_num_threads(1)
fork = multiprocessing.get_context("fork")  # so that PyTorch is imported once
processes = [fork.Process(target=cifar10.main) for _ in range(8)]
for process in processes:
    process.start()
for process in processes:
    process.join()
"""


def test_eight_processes_download_once(online, cifar10_server, tmp_path):
    before = cifar10_server.downloads
    command = [sys.executable, "-c", EIGHT_TIMES, "--data_root", tmp_path]
    output = subprocess.run(command, cwd=REPO, env={**os.environ, **online}, stdout=subprocess.PIPE, text=True).stdout
    ready = f"CIFAR-10 is ready in {tmp_path}: {TRAIN_IMAGES} training and {TEST_IMAGES} test images"
    assert output.replace("\n", "") == ready * 8
    assert cifar10_server.downloads - before == 2


def prepared(dataset, folder, **flags):
    """Return what a dataset becomes, and the warning."""
    data_of_run = data.prepare_data(data_flags(dataset=dataset, data_root=str(folder), **flags))
    assert data_of_run["name"] == data_of_run["flags"]["dataset"]
    return data_of_run["name"], data_of_run["warning"]


def test_auto_falls_back_to_synthetic_with_a_warning(no_network, tmp_path):
    dataset, warning = prepared("auto", tmp_path)
    assert dataset == "synthetic" and "training on SYNTHETIC images" in warning


def test_auto_takes_cifar10_that_can_be_downloaded(small_cifar10, tmp_path):
    assert prepared("auto", tmp_path) == ("cifar10", "")


def test_auto_is_cifar10_on_real_sites_and_nothing_is_downloaded_here(small_cifar10, cifar10_server, tmp_path):
    downloads = cifar10_server.downloads
    assert prepared("auto", tmp_path, env="prod") == prepared("auto", tmp_path, export=True) == ("cifar10", "")
    assert cifar10_server.downloads == downloads


def test_arguments_stay_as_they_were_and_the_name_says_how_the_images_are_split():
    args = data_flags(split="dirichlet", alpha=0.3)
    before = dict(vars(args))
    assert data.prepare_data(args)["name"] == "synthetic (dirichlet split of alpha 0.3)"
    assert vars(args) == before
    assert data.prepare_data(data_flags(split="dirichlet"))["name"] == "synthetic (dirichlet split of alpha 0.5)"
    assert data.prepare_data(data_flags(split="iid"))["name"] == "synthetic (iid split)"


def test_cifar10_that_cant_be_had_is_one_clear_error_and_no_run_begins(no_network, tmp_path, capsys):
    flags = ["--dataset", "cifar10", "--workspace", str(tmp_path / "new"), "--data_root", str(tmp_path / "data")]
    with pytest.raises(SystemExit) as exit:
        job.main(flags)
    output, errors = capsys.readouterr()
    assert (exit.value.code, output) == (1, "")
    reason = r"CIFAR-10 in .* is missing and can't be downloaded .*--dataset.*"
    assert re.fullmatch(rf"job\.py: error: {reason}\n", errors)
    assert not (tmp_path / "new" / "hello-pt").exists()


def test_silent_server_is_given_up(small_cifar10, monkeypatch, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and never answers
        monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", f"http://127.0.0.1:{silent.getsockname()[1]}/x")
        monkeypatch.setattr(cifar10, "SILENCE", 1)
        with pytest.raises(cifar10.DataError, match="timed out"):
            load_cifar10(tmp_path)


@pytest.mark.parametrize("damage", ["cut short", "missing"])
def test_damaged_files_are_replaced(small_cifar10, tmp_path, damage):
    train_set, _ = load_cifar10(tmp_path)
    intact = train_set.images.clone()
    time.sleep(0.01)  # so that the damage is newer than the decoded file
    damage_file(batches(tmp_path) / "data_batch_3", damage)
    (tmp_path / cifar10.DECODED_FILE).unlink()
    assert torch.equal(load_cifar10(tmp_path)[0].images, intact)


def test_damaged_files_that_cant_be_replaced_are_one_clear_error(small_cifar10, monkeypatch, tmp_path):
    load_cifar10(tmp_path)
    time.sleep(0.01)
    damage_file(batches(tmp_path) / "data_batch_3", "cut short")
    (tmp_path / "cifar-10-python.tar.gz").unlink()
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", "http://127.0.0.1:9/x")
    with pytest.raises(cifar10.DataError, match=rf"is damaged .* delete {batches(tmp_path)}"):
        load_cifar10(tmp_path)


def test_download_cut_off_or_altered_is_never_taken_and_the_next_one_repairs_it(
    small_cifar10, cifar10_server, monkeypatch, tmp_path
):
    intact = cifar10_server.archive
    for broken in (intact[: len(intact) // 2], intact[:-1] + b"x"):
        monkeypatch.setattr(cifar10_server, "archive", broken)
        with pytest.raises(cifar10.DataError, match="is missing and can't be downloaded"):
            load_cifar10(tmp_path)
        assert not batches(tmp_path).exists() and not (tmp_path / cifar10.DECODED_FILE).exists()
    monkeypatch.setattr(cifar10_server, "archive", intact)
    assert len(load_cifar10(tmp_path)[0]) == TRAIN_IMAGES


@pytest.mark.parametrize("content", [[1], Path("of another program")])
def test_decoded_file_of_something_else_is_made_again(content, small_cifar10, tmp_path):
    torch.save(content, tmp_path / cifar10.DECODED_FILE)
    assert len(load_cifar10(tmp_path)[0]) == TRAIN_IMAGES


def test_decoded_file_that_was_cut_short_is_made_again(small_cifar10, tmp_path):
    load_cifar10(tmp_path)
    damage_file(tmp_path / cifar10.DECODED_FILE, "cut short")
    assert len(load_cifar10(tmp_path)[0]) == TRAIN_IMAGES


def damage_file(path, damage):
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:1000])


def test_folder_in_a_variable_of_the_site(small_cifar10, tmp_path, monkeypatch):
    monkeypatch.setenv("SITE_IMAGES", str(tmp_path))
    assert len(load_cifar10("$SITE_IMAGES/cifar10")[0]) == TRAIN_IMAGES
    assert (tmp_path / "cifar10" / cifar10.DECODED_FILE).exists()
    with pytest.raises(cifar10.DataError, match="not set on site-1"):
        load_cifar10("$NO_SUCH_VARIABLE")


def test_variable_may_hold_the_sign_of_the_home_folder(small_cifar10, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("IMAGES", "~/cifar10")
    args = data_flags(dataset="cifar10", data_root="$IMAGES")
    assert data.prepare_data(args)["flags"]["data_root"] == str(tmp_path / "cifar10")
    assert (tmp_path / "cifar10" / cifar10.DECODED_FILE).exists()


@pytest.mark.parametrize(
    "folder", ["text", "text/below", "$NO_SUCH_VARIABLE", "loop", "~nobody_here/x", "x" * 300, "{site}.txt/{site}"]
)
def test_folder_that_cant_be_used_is_one_line_and_no_run_begins(folder, no_network, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("text", "site-1.txt"):
        (tmp_path / name).write_text("")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(SystemExit) as exit:
        job.main(["--dataset", "cifar10", "--workspace", "new", "--data_root", folder])
    output, errors = capsys.readouterr()
    assert exit.value.code in (1, 2) and output == ""
    assert re.fullmatch(r"job\.py: error: .+\n", errors)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loop", "site-1.txt", "text"]


def test_folder_that_cant_be_written_is_one_clear_error(small_cifar10, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(cifar10.DataError, match="choose another --data_root"):
        load_cifar10(tmp_path / "file")


def test_relative_folder_is_that_of_where_job_py_was_started(small_cifar10, cifar10_server, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    args = data_flags(dataset="cifar10", data_root="images")
    settled = argparse.Namespace(**{**vars(args), **data.prepare_data(args)["flags"]})
    downloads = cifar10_server.downloads
    monkeypatch.chdir(tmp_path / "elsewhere")  # as a run does, and a site
    assert len(data.load_data(settled, "site-1")[0]) == TRAIN_IMAGES
    assert cifar10_server.downloads == downloads and list(Path().iterdir()) == []


def test_each_site_has_a_folder_of_its_own(small_cifar10, tmp_path):
    prepared("auto", tmp_path / "{site}")
    for site in ("site-1", "site-2"):
        assert (tmp_path / site / cifar10.DECODED_FILE).exists()
        flags = data_flags(dataset="cifar10", data_root=str(tmp_path / "{site}"))
        assert data.data_folder(flags, site) == tmp_path / site
        assert len(data.load_data(flags, site)[0]) == TRAIN_IMAGES


def test_folder_that_can_only_be_read_is_enough(small_cifar10, tmp_path):
    load_cifar10(tmp_path)
    (tmp_path / cifar10.DECODED_FILE).unlink()
    if subprocess.call(["mount", "--bind", "-o", "ro", tmp_path, tmp_path]):
        pytest.skip("only root can make a folder read-only for itself")
    try:
        with pytest.raises(OSError):
            (tmp_path / "file").touch()
        assert prepared("auto", tmp_path) == ("cifar10", "")
        assert len(load_cifar10(tmp_path)[0]) == TRAIN_IMAGES
        with pytest.raises(cifar10.DataError, match=r"can't write to .*: choose another --data_root"):
            load_cifar10(tmp_path / "new")
    finally:
        subprocess.check_call(["umount", tmp_path])
