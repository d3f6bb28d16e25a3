"""This process, its signals, and the processes that a run starts."""

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil  # comes with nvflare
import torch

RUN_VARIABLE = "HELLO_PT_RUN"  # in the environment of every process of a run: the run's folder


@contextlib.contextmanager
def process_as_it_was() -> Iterator[None]:
    """Leave this process, which may be a notebook's kernel, as it was: environment, folder, path, output, logging."""
    environment, folder, path = dict(os.environ), os.getcwd(), list(sys.path)
    disabled = logging.root.manager.disable
    errors = getattr(sys.stdout, "errors", None)
    reconfigure = getattr(sys.stdout, "reconfigure", lambda errors: None)  # does nothing to a notebook's output
    reconfigure(errors="backslashreplace")  # for letters that the output's encoding lacks
    try:
        yield
    finally:
        reconfigure(errors=errors)
        logging.disable(disabled)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        sys.path[:] = path


class Stopped(SystemExit):
    """A signal asked job.py to stop."""

    left = None  # what is left, if not the rounds in the run's folder


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Make SIGINT, SIGTERM and SIGHUP end this process as an exception does, with the status 128 + signal."""

    before = {}

    def stop(number, frame):
        for other in before:
            signal.signal(other, signal.SIG_IGN)  # nothing disturbs the clean-up
        raise Stopped(128 + number)

    if threading.current_thread() is threading.main_thread():  # where Python handles signals
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) not in (None, signal.SIG_IGN):  # what is ignored stays so
                before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def share_cores(clients: int) -> None:
    """Give each client its share of the cores. Otherwise each takes all, and they slow each other down."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // clients)))


def processes_of(run_folder: Path) -> list[psutil.Process]:
    """Return the processes of a run, whoever started them: NVFlare's, and what these started."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # ended, or another user's
            if process.pid != os.getpid() and process.environ().get(RUN_VARIABLE) == str(run_folder):
                found.append(process)
    return found


def kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(processes, timeout=1)
