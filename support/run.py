"""What guards a run?

- One run at a time in a workspace. Earlier results get another name, and none is ever deleted.
- Whatever fails ends in one line.
- When job.py ends, by SIGINT, SIGTERM or SIGHUP too, no process of the run is left behind.
"""

import argparse
import contextlib
import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from filelock import FileLock, Timeout  # comes with torch

from support.failure import failed_script, reason_of_failure
from support.process import RUN_VARIABLE, Stopped, ended_by_signals, kill_processes_of, process_as_it_was, processes_of
from support.results import read_results
from support.summary import show_data, sum_up
from support.text import HERE, JobFailed, describe

LOCK = ".hello-pt.lock"  # in the workspace


class Run:
    """A run, or an export, which needs only the checks."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.data, self.begun = args, None, False
        self.stack = contextlib.ExitStack()  # of what begin opens, and guarded closes

    def begin(self, data: dict) -> None:
        """Take the workspace, show what the sites train on (`data` is prepare_data's), and rename an earlier run."""
        self.begun = True
        if self.args.export:
            return
        self.stack.enter_context(only_run(self.args.run_folder))
        shown = show_data(self.args, data)
        make_room(self.args)
        self.data = shown  # from now on, a model in the run's folder is this run's
        # Sites that train here share the cores. Otherwise each takes all, and they slow each other down.
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // self.args.num_threads)))

    def sum_up(self, folder: str) -> None:
        """Sum up the results in a folder, in which app_server, tb_events and so on are."""
        sum_up(self.args, self.data, read_results(self.args, Path(folder)))
        if failed := failed_script(self.args, job_failed=False):
            raise OSError(f"{failed}; the results are complete")


@contextlib.contextmanager
def guarded(args: argparse.Namespace) -> Iterator[Run]:
    """Guard a run. What fails ends in one line, with status 1, or 2 for a ValueError before the run begins."""
    run = Run(args)
    try:
        # At the end, from right to left: ignore signals, kill the run's processes, restore this process.
        with process_as_it_was(), run.stack, ended_by_signals():
            yield run
            print(end="", flush=True)  # if standard output can't be written, this fails here
    except Stopped as stopped:
        left = "no round was complete"
        if run.data and args.env == "prod":
            left = "the federation may have the job"
        elif run.data and any(args.run_folder.glob("**/app_server/FL_global_model.pt")):  # of this run
            left = f"the rounds before are in {args.run_folder}"
        print(f"job.py: stopped; {stopped.left or left}", file=sys.stderr, flush=True)
        if os.path.realpath(getattr(sys.modules["__main__"], "__file__", "")) == str(HERE / "job.py"):
            os._exit(stopped.code)  # NVFlare 2.9.0's threads of an interrupted connection would live on
        raise
    except SystemExit as stop:
        if args.export and not stop.code:  # NVFlare has written the job's folder
            raise
        sys.exit(f"job.py: error: {describe(stop)} ended the program")
    except Exception as error:
        reason = reason_of_failure(args, error) if isinstance(error, JobFailed) else describe(error)
        if isinstance(error, OSError) and error.errno in (errno.EPIPE, errno.ENOSPC) and not error.filename:
            reason = f"can't write to standard output: {error.strerror}"
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # where Python writes what is left at its end
        if run.begun and args.workspace.is_dir() and shutil.disk_usage(args.workspace).free < 1_000_000:
            reason = f"the disk of {args.workspace} is full: make room, or choose another --workspace"
        print(f"job.py: error: {reason.removeprefix('ValueError: ')}", file=sys.stderr)
        mistaken = isinstance(error, ValueError) and not run.begun  # prepare_data says that the flags are wrong
        sys.exit(2 if mistaken else 1)


def make_room(args: argparse.Namespace) -> None:
    """Rename the folder of an earlier run, and make this one's."""
    if args.run_folder.exists():
        args.run_folder.rename(args.earlier_run)
        print(f"The results of the run before are kept in {args.earlier_run}", flush=True)
    (args.run_folder / "server").mkdir(parents=True)


@contextlib.contextmanager
def only_run(run_folder: Path) -> Iterator[None]:
    """Be the only run in a workspace, and leave none of its processes behind.

    Raises:
        OSError: the workspace can't be written, another job.py or processes of a killed one run there, or something
            else has the lock's name.
    """
    run_folder.parent.mkdir(parents=True, exist_ok=True)
    at_work = f"at work in {run_folder}: wait for its end, or choose another --workspace"
    file = run_folder.parent / LOCK
    if file.is_file() and file.stat().st_size:  # filelock 4.1, the latest for Python 3.10, would empty it
        raise OSError(f"{file} is no lock of job.py's: move it, or choose another --workspace")
    try:
        lock = FileLock(file).acquire(blocking=False)
    except Timeout:
        raise OSError(f"another job.py is {at_work}") from None
    with lock, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        if orphans := processes_of(run_folder):
            raise OSError(f"process {orphans[0].pid} (left by a killed job.py) is {at_work}")
        os.environ |= {
            RUN_VARIABLE: str(run_folder),
            "TMPDIR": scratch,  # deleted at the end, with the files that killed processes left
        }
        # `python -m`, which starts the server, looks here first, and so finds this model.py and no other. NVFlare 2.9.0
        # puts a job's code behind all else in sys.path.
        os.chdir(HERE)
        try:
            yield
        finally:
            kill_processes_of(run_folder)
