"""What the tests share: a small CIFAR-10 on a local server, and job.py run as a user runs it."""

import argparse
import contextlib
import hashlib
import http.server
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from data import add_data_flags

REPO = Path(__file__).resolve().parent.parent

TRAIN_IMAGES, TEST_IMAGES = 500, 100  # of the small CIFAR-10


class Cifar10Server:
    """Serves a small CIFAR-10 archive; `attributes` are what torchvision's CIFAR10 needs to accept it."""

    def __init__(self):
        self.archive, md5 = make_archive()
        self.downloads = 0  # how often it was asked for: twice a download by torchvision
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self):
                self.send_response(200)
                self.send_header("Content-Length", str(len(server.archive)))
                self.end_headers()

            def do_GET(self):
                server.downloads += 1
                self.do_HEAD()
                with contextlib.suppress(ConnectionError):  # torchvision first asks for the address alone
                    self.wfile.write(server.archive)

            def log_message(self, *args):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.attributes = {
            "url": f"http://127.0.0.1:{self.http.server_port}/cifar-10-python.tar.gz",
            "tgz_md5": hashlib.md5(self.archive).hexdigest(),
            "train_list": [[f"data_batch_{i}", md5[f"data_batch_{i}"]] for i in range(1, 6)],
            "test_list": [["test_batch", md5["test_batch"]]],
            "meta": {"filename": "batches.meta", "key": "label_names", "md5": md5["batches.meta"]},
        }


def make_archive() -> tuple[bytes, dict[str, str]]:
    """Return cifar-10-python.tar.gz of random images in CIFAR-10's format, and its files' MD5 sums."""
    random = np.random.default_rng(0)

    def batch(count):
        labels = random.integers(10, size=count).tolist()
        return {"data": random.integers(256, size=(count, 3072), dtype=np.uint8), "labels": labels}

    files = {f"data_batch_{i}": batch(TRAIN_IMAGES // 5) for i in range(1, 6)}
    files["test_batch"] = batch(TEST_IMAGES)
    files["batches.meta"] = {"label_names": [str(i) for i in range(10)]}
    md5, archive = {}, io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for name, content in files.items():
            content = pickle.dumps(content)
            md5[name] = hashlib.md5(content).hexdigest()
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return archive.getvalue(), md5


@pytest.fixture(scope="session")
def cifar10_server():
    server = Cifar10Server()
    yield server
    server.http.shutdown()


@pytest.fixture(scope="session")
def online(cifar10_server) -> dict[str, str]:
    """The environment of a machine that can download the small CIFAR-10."""
    return environment(cifar10_server.attributes)


@pytest.fixture(scope="session")
def offline(cifar10_server) -> dict[str, str]:
    """The environment of a machine that can't."""
    return environment({**cifar10_server.attributes, "url": "http://127.0.0.1:9/cifar-10-python.tar.gz"})


def environment(cifar10_attributes: dict) -> dict[str, str]:
    return {"PYTHONPATH": str(REPO / "tests" / "small_cifar10"), "SMALL_CIFAR10": json.dumps(cifar10_attributes)}


@pytest.fixture
def workspace(tmp_path):
    yield tmp_path / "workspace"
    end_all(tmp_path)  # after a failed test


@dataclass
class Run:
    """A finished `python job.py`."""

    status: int
    output: str  # standard output
    errors: str  # standard error
    folder: Path  # WORKSPACE/hello-pt

    @property
    def results(self) -> Path:
        return next(self.folder.glob("server/**/app_server")).parent

    def report(self) -> dict:
        """Return what the run wrote to summary.json."""
        return json.loads((self.folder / "summary.json").read_text())

    def weights(self) -> dict[str, torch.Tensor]:
        return torch.load(self.results / "app_server" / "FL_global_model.pt", weights_only=True)["model"]


def start_job(
    workspace: Path,
    *flags: str,
    repo: Path = REPO,
    before: str = "",
    output: int = subprocess.PIPE,
    host: Sequence[str] = (),
    **env: str,
) -> subprocess.Popen:
    """Start job.py in another working directory, on its own workspace and, by default, synthetic images.

    Args:
        before: Python statements for the process to begin with.
        output: where standard output and standard error go; by default, each into a pipe of its own.
        host: what to put in front of the command to run it on another host.
    """
    dataset = ["--dataset", "synthetic"] if "--dataset" in (repo / "data.py").read_text() else []
    command = [sys.executable, str(repo / "job.py")]
    if before:
        command[1:] = ["-c", f"import sys; sys.path[0] = {str(repo)!r}; {before}; import job; job.main()"]
    return subprocess.Popen(
        [*host, *command, *dataset, "--workspace", str(workspace), *flags],
        cwd=workspace.parent,
        env={name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"} | env,
        stdout=output,
        stderr=output,
        text=True,
        # What runs the tests may ignore these, as a shell's & does, and job.py would inherit that.
        preexec_fn=lambda: [signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGHUP)],
    )


def finish(process: subprocess.Popen, workspace: Path) -> Run:
    output, errors = process.communicate(timeout=900)
    return Run(process.returncode, output, errors, workspace / "hello-pt")


def run_job(workspace: Path, *flags: str, repo: Path = REPO, **env: str) -> Run:
    """Run job.py; again, if a process could not start since a test beside this one took its port or all the time."""
    run = finish(start_job(workspace, *flags, repo=repo, **env), workspace)
    if "Address already in use" in run.errors or "Could not connect to the server cell" in run.errors:
        shutil.rmtree(run.folder)
        run = finish(start_job(workspace, *flags, repo=repo, **env), workspace)
    return run


def succeed(workspace: Path, *flags: str, repo: Path = REPO, **env: str) -> Run:
    """Run job.py, which must succeed and have nothing to say on standard error."""
    run = run_job(workspace, *flags, repo=repo, **env)
    assert (run.status, run.errors) == (0, "")
    return run


def wait_until(condition, process=None, seconds=600, what="what was waited for", every=0.1):
    """Wait until a condition, perhaps of a process that must be running, holds, and return its value."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < end, f"{what} did not happen"
        time.sleep(every)
    return value


def running(folder: Path, *words: str) -> list[psutil.Process]:
    """Return the processes that work in a folder or name it on their command line, which has these words.

    job.py itself finds its processes by a mark in their environment.
    """
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # ended in between
            command = " ".join(process.cmdline())
            concerned = str(folder) in command or Path(process.cwd()).is_relative_to(folder)
            if concerned and all(word in command for word in words) and process.pid != os.getpid():
                found.append(process)
    return found


def end_all(folder: Path) -> None:
    """Kill the processes of a folder, as long as there are any."""
    while processes := running(folder):
        for process in processes:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(processes, timeout=5)


def copy_repo(folder: Path) -> Path:
    """Copy the program to a new folder."""
    folder.mkdir()
    for file in REPO.glob("*.py"):
        shutil.copy(file, folder)
    shutil.copytree(REPO / "support", folder / "support", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def data_flags(**flags) -> argparse.Namespace:
    """Return the arguments that data.py wants, those of `--dataset synthetic` unless told otherwise."""
    parser = argparse.ArgumentParser()
    add_data_flags(parser)
    args = parser.parse_args(["--dataset=synthetic"])
    run = {"seed": 0, "sites": ["site-1", "site-2"], "env": "sim", "export": False}
    return argparse.Namespace(**{**vars(args), **run, **flags})


def same_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def changed_client(folder: Path, script: str, line: str, new: str) -> Path:
    """Write a copy of a client script with something new in front of a line; return its path."""
    changed = Path(shutil.copyfile(REPO / script, folder / "changed_client.py"))
    replace(changed, line, f"{new}\n{line}")
    return changed


def insert(file: Path, line: str, new: str) -> None:
    """Put something new behind a line of a file."""
    replace(file, line, line + new)


def replace(file: Path, old: str, new: str) -> None:
    """Replace a text that a file has once."""
    source = file.read_text()
    assert source.count(old) == 1
    file.write_text(source.replace(old, new))


def wait_for(file: Path, indent: int) -> str:
    """Return statements, the first without the indentation of the others, that wait until there is a file."""
    lines = ["import os, time", "deadline = time.monotonic() + 900"]
    lines += [f"while not os.path.exists({str(file)!r}) and time.monotonic() < deadline:", "    time.sleep(0.1)"]
    return f"\n{' ' * indent}".join(lines)


def slowed(folder: Path, *slow: tuple[str, str, str]) -> str:
    """Write what makes each process wait when a function of this name has called a certain one; return its PYTHONPATH.

    Args:
        slow: what is called, such as "time.time", the caller's name, and the seconds, a Python expression.
    """
    code = ["import copy, os, random, socket, sys, time", "sleep = time.sleep"]
    for number, (called, caller, seconds) in enumerate(slow):
        code += [
            f"fast_{number} = {called}",
            f"def slow_{number}(*args):",
            f"    value = fast_{number}(*args)",
            f"    if sys._getframe(1).f_code.co_name == {caller!r}:",
            f"        sleep({seconds})",
            "    return value",
            f"{called} = slow_{number}",
        ]
    (folder / "python").mkdir()
    (folder / "python" / "sitecustomize.py").write_text("\n".join(code))  # Python imports it at a process's start
    return str(folder / "python")
