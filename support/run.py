"""What holds before, during and after a run?

- One run at a time in a workspace.
- Whatever fails ends in one line. A client's process that dies ends the run, one that is slow is named.
- However job.py ends, short of SIGKILL, no process of the run is left behind.
"""

import argparse
import contextlib
import fcntl
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil  # comes with nvflare

from support.console import failure_of_output, open_streams
from support.failure import JobFailed, describe, killed_site, reason_of_failure, seconds_without_news, sites_at_work
from support.folder import FREE_SPACE, MARK, MODEL, full_disk, lock_file

HERE = Path(__file__).resolve().parent.parent
PATIENCE = 120  # seconds without news from a site, after which the sites that are at work are named
RUN_VARIABLE = "HELLO_PT_RUN"  # in the environment of every process of a run: the run's folder


@contextlib.contextmanager
def guarded(args: argparse.Namespace) -> Iterator[None]:
    """Guard a run, or an export, which needs less: what fails ends in one line, with status 1."""
    open_streams()
    try:
        try:
            with contextlib.nullcontext() if args.export else only_run(args.run_folder):
                yield
        finally:
            sys.stdout.flush()
    except Exception as error:
        reason = failure_of_output(error) or (not args.export and full_disk(args.run_folder, least=1_000_000))
        if not reason and isinstance(error, JobFailed):
            reason = reason_of_failure(args.run_folder, error)
        sys.exit(f"job.py: error: {reason or describe(error)}")


class Stopped(SystemExit):
    """A signal asked job.py to stop."""

    left = None  # what it leaves, if that isn't the rounds in the run's folder


def exit_on_signals() -> None:
    """Make SIGINT, SIGTERM and SIGHUP end this process as an exception does, with the status 128 + signal."""

    def stop(number, frame):
        raise Stopped(128 + number)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
        signal.signal(signal.SIGHUP, stop)


@contextlib.contextmanager
def only_run(run_folder: Path) -> Iterator[None]:
    """Be the only run in a folder, and leave none of its processes behind.

    Raises:
        OSError: the workspace can't be made or written; or another job.py runs there, or what a killed one left.
    """
    run_folder.parent.mkdir(parents=True, exist_ok=True)
    if full := full_disk(run_folder, least=FREE_SPACE):
        raise OSError(full)
    with lock_file(run_folder.with_suffix(".lock")) as lock:
        at_work = f"is at work in {run_folder}: wait for its end, or choose another --workspace"
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(f"process {lock.read().strip()} {at_work}") from None
        if orphans := processes_of(run_folder):
            raise OSError(f"process {orphans[0].pid} (the simulation of a killed job.py) {at_work}")
        lock.truncate(0)
        lock.write(f"{os.getpid()} (job.py)\n")
        lock.flush()

        exit_on_signals()
        os.environ[RUN_VARIABLE] = str(run_folder)
        find_own_modules()
        over = threading.Event()
        threading.Thread(target=watch, args=(run_folder, over), daemon=True).start()
        stopped = None
        try:
            yield
        except Stopped as signaled:
            stopped = signaled
            complete = any(run_folder.glob(MODEL))
            left = f"the rounds before are in {run_folder}" if complete else "no round was complete"
            print(f"job.py: stopped; {stopped.left or left}", file=sys.stderr)
        finally:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            over.set()
            kill_processes_of(run_folder)
            with contextlib.suppress(OSError):
                (run_folder / MARK).touch()
            lock.truncate(0)
        if stopped:
            sys.stdout.flush()
            os._exit(stopped.code)  # NVFlare 2.9.0's threads for a connection that a signal interrupted would live on


def find_own_modules() -> None:
    """Let the server find this model.py and no other: NVFlare 2.9.0 puts a job's code behind all else in sys.path."""
    os.chdir(HERE)  # where `python -m`, which starts the server, looks first
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])


def processes_of(run_folder: Path) -> list[psutil.Process]:
    """Return the processes of a run, whoever started them: NVFlare's, and what these started."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # ended, or another user's
            if process.pid != os.getpid() and process.environ().get(RUN_VARIABLE) == str(run_folder):
                found.append(process)
    return found


def kill_processes_of(run_folder: Path) -> None:
    while processes := processes_of(run_folder):
        for process in processes:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(processes, timeout=1)


def watch(run_folder: Path, over: threading.Event) -> None:
    """Kill a run whose site's process died: NVFlare 2.9.0's simulator logs that, but waits for it for ever.

    Name the sites that a run waits for, after PATIENCE, and again each time that the wait has doubled.
    """
    patience = PATIENCE
    while not over.wait(1):
        if killed_site(run_folder):
            kill_processes_of(run_folder)
        quiet = seconds_without_news(run_folder)
        if quiet < PATIENCE:
            patience = PATIENCE
        elif quiet > patience:
            patience *= 2
            for line in sites_at_work(run_folder):
                print(f"job.py: still waiting for {line}", flush=True)
