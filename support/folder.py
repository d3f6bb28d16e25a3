"""Whose is a run's folder? Only what job.py made is ever removed: results get another name, and the rest is let be."""

import argparse
import os
import re
import shutil
import stat
from datetime import datetime
from pathlib import Path
from typing import TextIO

MODEL = "**/app_server/FL_global_model.pt"  # there once a round is complete: of a simulation, of poc, fetched
MARK = "local/made-by-job.py"  # in a run's folder, where NVFlare 2.9.0's simulator deletes all but local and startup
FREE_SPACE = 10_000_000  # bytes: a short run leaves some 2 MB


def is_free(run_folder: Path) -> bool:
    """Tell whether a run can have its folder: nothing is there, or what job.py made, or a link."""
    if run_folder.is_symlink() or not run_folder.exists():
        return True
    try:
        return (run_folder / MARK).is_file() or any(run_folder.glob(MODEL))  # a model: of a job.py that left no mark
    except PermissionError:
        return False


def keep_earlier_results(args: argparse.Namespace) -> None:
    """Make room for a run: rename an earlier one's folder, or drop it if it has no result and nobody put anything in.

    A folder that holds args.initial_ckpt is kept, too, and args.initial_ckpt follows it.

    Raises:
        OSError: the folder is another program's, or can't be renamed.
    """
    run_folder, checkpoint = args.run_folder, args.initial_ckpt
    if args.export:
        return
    if not is_free(run_folder):
        raise OSError(f"{run_folder} was not made by job.py: move it, or choose another --workspace")
    wanted = checkpoint is not None and run_folder in checkpoint.parents
    if run_folder.is_symlink() or wanted or (run_folder.exists() and not is_worthless(run_folder)):
        time = datetime.fromtimestamp(run_folder.lstat().st_mtime)
        kept = run_folder.with_name(f"{run_folder.name}-{time:%Y-%m-%d-%H%M%S}")
        while os.path.lexists(kept):  # a copy of it, say
            kept = kept.with_name(f"{kept.name}-again")
        run_folder.rename(kept)
        print(f"The results of the run before are kept in {kept}", flush=True)
        if wanted:
            args.initial_ckpt = kept / checkpoint.relative_to(run_folder)
    elif run_folder.exists():
        shutil.rmtree(run_folder)
    (run_folder / MARK).parent.mkdir(parents=True)
    (run_folder / MARK).write_text("job.py deletes this folder if no round was completed, and no file is newer.\n")


def is_worthless(run_folder: Path) -> bool:
    """Tell whether a run completed no round, and nothing was changed in its folder since it ended."""
    mark = run_folder / MARK
    changes = (path.lstat().st_ctime_ns for path in run_folder.rglob("*"))
    return mark.is_file() and not any(run_folder.glob(MODEL)) and max(changes) <= mark.lstat().st_ctime_ns


def lock_file(file: Path) -> TextIO:
    """Open a run's lock, or make it; never follow, wait for or empty anything else.

    Raises:
        OSError: something else has its name.
    """
    elsewhere = "move it, or choose another --workspace"
    try:
        number = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    except OSError as error:
        reason = "it is a link" if file.is_symlink() else error.strerror
        raise OSError(f"{file} can't be job.py's lock ({reason}): {elsewhere}") from None
    if stat.S_ISREG(os.fstat(number).st_mode):
        lock = open(number, "r+", errors="replace")  # noqa: SIM115
        if re.fullmatch(r"(\d+ \(job\.py\)\n)?", lock.read(100)):
            lock.seek(0)
            return lock
    raise OSError(f"{file} is no lock of job.py's: {elsewhere}")


def full_disk(folder: Path, least: int) -> str:
    """Say that the disk of a run's folder has less than so many bytes left; return "" if it has them."""
    if not folder.parent.is_dir() or shutil.disk_usage(folder.parent).free >= least:
        return ""
    return f"the disk of {folder.parent} is full: make room, or choose another --workspace"
