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

RUN_VARIABLE = "HELLO_PT_RUN"  # in the environment of every process of a run: the run's folder
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]  # that end a run


@contextlib.contextmanager
def process_as_it_was() -> Iterator[None]:
    """Leave this process, which may be a notebook's kernel, as it was: signals, environment, folder, path and so on."""
    environment, folder, path = dict(os.environ), os.getcwd(), list(sys.path)
    handlers = {number: signal.getsignal(number) for number in (*SIGNALS, signal.SIGALRM)}
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
        for number, handler in handlers.items():
            if signal.getsignal(number) != handler:
                signal.signal(number, handler)


class Stopped(SystemExit):
    """A signal asked job.py to stop."""

    left = None  # what is left, if not the rounds in the run's folder


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Make SIGINT, SIGTERM and SIGHUP end what is in here as an exception does, with the status 128 + signal.

    Afterwards they are ignored, so that nothing disturbs the clean-up, until process_as_it_was ends.
    """
    stopped, handled = Stopped(), []

    def stop(number, frame):
        stopped.code = stopped.code or 128 + number
        signal.signal(signal.SIGALRM, stop)
        signal.alarm(1)  # raise it again each second: Python drops what is raised in a callback of os.fork, say
        raise stopped

    if threading.current_thread() is threading.main_thread():  # where Python handles signals; ignored ones stay so
        handled = [number for number in SIGNALS if signal.getsignal(number) not in (None, signal.SIG_IGN)]
    for number in handled:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, signal.SIG_IGN)
        if stopped.code:
            signal.alarm(0)


def processes_of(run_folder: Path) -> list[psutil.Process]:
    """Return the processes of a run, whoever started them, but not this one, which was started without the mark."""
    processes = psutil.process_iter(["environ"], ad_value={})  # {}: another user's, or one that has ended
    return [process for process in processes if process.info["environ"].get(RUN_VARIABLE) == str(run_folder)]


def kill_processes_of(run_folder: Path) -> None:
    while processes := processes_of(run_folder):
        for process in processes:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(processes, timeout=1)
