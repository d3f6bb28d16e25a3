"""What holds before, during and after a run?

- One run at a time in a workspace; the results of the run before are kept under another name.
- Whatever fails ends in one line. A client's process that dies ends the run.
- However job.py ends, short of SIGKILL, no process of the run is left behind.
"""

import argparse
import contextlib
import fcntl
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import psutil  # comes with nvflare

from support.failure import JobFailed, killed_site, reason_of_failure

MODEL = "server/**/app_server/FL_global_model.pt"  # there once a round is complete
FREE_SPACE = 10_000_000  # bytes: a short run leaves some 2 MB
RUN_VARIABLE = "HELLO_PT_RUN"  # in the environment of every process of a run: the run's folder


@contextlib.contextmanager
def guarded(args: argparse.Namespace) -> Iterator[None]:
    """Guard a run, or an export, which needs less: what is expected to fail ends in one line, with status 1."""
    expected = (OSError, RuntimeError) if args.export else OSError  # NVFlare raises the second one in an export
    try:
        with contextlib.nullcontext() if args.export else only_run(args.run_folder):
            yield
    except JobFailed as error:
        sys.exit(f"job.py: error: {reason_of_failure(args.run_folder, error)}")
    except expected as error:
        sys.exit("job.py: error: " + " ".join(str(error).split()))


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
    if shutil.disk_usage(run_folder.parent).free < FREE_SPACE:
        raise OSError(f"the disk of {run_folder.parent} is full: make room, or choose another --workspace")
    with open(run_folder.with_suffix(".lock"), "a+") as lock:
        at_work = f"is at work in {run_folder}: wait for its end, or choose another --workspace"
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise OSError(f"process {lock.read().strip()} (job.py) {at_work}") from None
        if orphans := processes_of(run_folder):
            raise OSError(f"process {orphans[0].pid} (the simulation of a killed job.py) {at_work}")
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()

        exit_on_signals()
        os.environ[RUN_VARIABLE] = str(run_folder)
        over = threading.Event()
        threading.Thread(target=end_run_of_killed_site, args=(run_folder, over), daemon=True).start()
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
            lock.truncate(0)
        if stopped:
            sys.stdout.flush()
            os._exit(stopped.code)  # NVFlare 2.9.0's threads for a connection that a signal interrupted would live on


def keep_earlier_results(args: argparse.Namespace) -> None:
    """Make room: rename the folder of an earlier run, which NVFlare 2.9.0 would delete; drop one without a result.

    A folder that holds args.initial_ckpt is kept, too, and args.initial_ckpt follows it.
    """
    run_folder, checkpoint = args.run_folder, args.initial_ckpt
    wanted = checkpoint is not None and run_folder in checkpoint.parents
    if any(run_folder.glob(MODEL)) or run_folder.is_symlink() or wanted:
        time = datetime.fromtimestamp(run_folder.lstat().st_mtime)
        kept = run_folder.with_name(f"{run_folder.name}-{time:%Y-%m-%d-%H%M%S}")
        run_folder.rename(kept)
        print(f"The results of the run before are kept in {kept}", flush=True)
        if wanted:
            args.initial_ckpt = kept / checkpoint.relative_to(run_folder)
    elif run_folder.exists():
        shutil.rmtree(run_folder)


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


def end_run_of_killed_site(run_folder: Path, over: threading.Event) -> None:
    """Kill a run whose site's process died: NVFlare 2.9.0's simulator logs that, but waits for it for ever."""
    while not over.wait(1):
        if killed_site(run_folder):
            kill_processes_of(run_folder)
