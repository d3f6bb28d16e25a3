"""Guards a run: nothing is lost by it, and it never hangs. Skip this file on a first reading.

- The command line is checked before anything is made.
- One run at a time in a workspace; the results of the run before are kept under another name.
- A client's process that dies ends the run.
- However job.py ends, short of SIGKILL, no process of the run is left behind.
"""

import argparse
import contextlib
import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import tokenize
import warnings
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import psutil  # comes with nvflare

HERE = Path(__file__).resolve().parent
JOB_NAME = "hello-pt"
WORKSPACE = "/tmp/nvflare/simulation"  # NVFlare's own default
MODEL = "server/**/app_server/FL_global_model.pt"  # there once a round is complete
LOGS = [  # of what went wrong: simulated, on this machine's own servers, downloaded
    "*/error_log.txt",
    "poc/*/*/*/*/error_log.txt",
    "server/*/workspace/error_log.txt",
]
SERVER_LOGS = ["server/log.txt", "server/*/workspace/log.txt", "poc/*/*/server/log.txt"]
FREE_SPACE = 10_000_000  # bytes: a short run leaves some 2 MB
GPU_GROUP = r"(?:[0-9]+|\[[0-9]+(?:,[0-9]+)*\])"
RUN_VARIABLE = "HELLO_PT_RUN"  # in the environment of every process of a run: the run's folder


# ---- One run, from its start to its end ----


class Busy(Exception):
    """Another run is at work in the workspace."""


def at_work(process: str, run_folder: Path) -> str:
    return f"process {process} is at work in {run_folder}: wait for its end, or choose another --workspace"


class Stopped(SystemExit):
    """A signal asked job.py to stop."""


def exit_on_signals() -> None:
    """Make SIGINT, SIGTERM and SIGHUP end this process as an exception does, with the status 128 + signal."""

    def stop(number, frame):
        raise Stopped(128 + number)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
        signal.signal(signal.SIGHUP, stop)


def refuse_second_run(argv: list[str]) -> None:
    """End at once if another job.py is at work in the workspace; only_run, which makes sure, comes seconds later."""
    parser = OneLineParser(prog="job.py", add_help=False, allow_abbrev=False)
    parser.add_argument("--workspace", default=WORKSPACE)
    parser.add_argument("--export", "--help", "-h", action="store_true")
    args, _ = parser.parse_known_args(argv)
    with contextlib.suppress(OSError, RuntimeError, ValueError, psutil.Error):
        run_folder = Path(args.workspace).expanduser().resolve() / JOB_NAME
        lock = run_folder.with_suffix(".lock")
        process = psutil.Process(int(lock.read_text()))
        if process.create_time() < lock.stat().st_mtime and not args.export:  # else a later process of that number
            sys.exit(f"job.py: error: {at_work(f'{process.pid} (job.py)', run_folder)}")


@contextlib.contextmanager
def only_run(run_folder: Path) -> Iterator[None]:
    """Be the only run in a folder, and leave none of its processes behind.

    Raises:
        Busy: another job.py runs there, or the simulation of one that was killed.
        OSError: the workspace can't be made or written.
    """
    run_folder.parent.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(run_folder.parent).free < FREE_SPACE:
        raise OSError(f"the disk of {run_folder.parent} is full: make room, or choose another --workspace")
    with open(run_folder.with_suffix(".lock"), "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise Busy(at_work(f"{lock.read().strip()} (job.py)", run_folder)) from None
        if orphans := processes_of(run_folder):
            raise Busy(at_work(f"{orphans[0].pid} (the simulation of a killed job.py)", run_folder))
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()

        os.environ[RUN_VARIABLE] = str(run_folder)
        over = threading.Event()
        threading.Thread(target=end_run_of_lost_client, args=(run_folder, over), daemon=True).start()
        try:
            yield
        except Stopped:
            complete = any(run_folder.glob(MODEL))
            results = f"the rounds before are in {run_folder}" if complete else "no round was complete"
            print(f"job.py: stopped; {results}", file=sys.stderr)
            raise
        finally:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            over.set()
            kill_processes_of(run_folder)
            lock.truncate(0)


def keep_earlier_results(run_folder: Path, checkpoint: Path | None) -> Path | None:
    """Make room: rename the folder of an earlier run, which NVFlare 2.9.0 would delete; drop one without a result.

    Args:
        checkpoint: a folder that holds it is kept, too.

    Returns:
        Where the checkpoint is now.
    """
    wanted = checkpoint is not None and run_folder in checkpoint.parents
    if any(run_folder.glob(MODEL)) or run_folder.is_symlink() or wanted:
        time = datetime.fromtimestamp(run_folder.lstat().st_mtime)
        kept = run_folder.with_name(f"{run_folder.name}-{time:%Y-%m-%d-%H%M%S}")
        run_folder.rename(kept)
        print(f"The results of the run before are kept in {kept}", flush=True)
        return kept / checkpoint.relative_to(run_folder) if wanted else checkpoint
    if run_folder.exists():
        shutil.rmtree(run_folder)
    return checkpoint


def write_whole(file: Path, text: str) -> None:
    """Write a text file so that nobody ever sees a part of it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f"{os.getpid()}.unfinished")
    unfinished.write_text(text)
    unfinished.replace(file)


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


def end_run_of_lost_client(run_folder: Path, over: threading.Event) -> None:
    """Kill a run whose client's process died: NVFlare 2.9.0's simulator logs that, but waits for it for ever."""
    while not over.wait(1):
        if lost_client(run_folder):
            kill_processes_of(run_folder)


def lost_client(run_folder: Path) -> str | None:
    """Return the name of a client whose process died, by the simulator's log."""
    with contextlib.suppress(OSError):
        errors = (run_folder / "server" / "error_log.txt").read_text(errors="replace")
        if found := re.search(r"(?:Communication error with|Subprocess died for) client ([\w-]+)", errors):
            return found[1]
    return None


def reason_of_failure(run_folder: Path, error: Exception) -> str:
    """Say which site failed first, why, and where its log is.

    A line of NVFlare's logs: 2026-11-24 05:15:11,082 - ExternalProcessBackend - INFO - ValueError: no data
    """
    if site := lost_client(run_folder):
        return f"{site} failed: its process was killed (see {run_folder / site / 'log.txt'})"
    server_log = next((log for place in SERVER_LOGS for log in run_folder.glob(place)), None)
    of_server = f"server failed: {str(error).partition('. ')[0]}" + (f" (see {server_log})" if server_log else "")
    logs = [log for place in LOGS for log in run_folder.glob(place) if log.stat().st_size]
    if not logs or "return code -" in str(error):  # the server's process died
        return of_server
    first = min(logs, key=lambda log: log.read_text(errors="replace"))  # every log begins with a time
    site = next(part for part in first.relative_to(run_folder).parts if re.fullmatch(r"server|site-\d+", part))
    errors = [line.split(" - ")[-1] for line in first.read_text(errors="replace").splitlines()]
    printed = re.findall(
        r" - ExternalProcessBackend - INFO - (.*)", first.with_name("log.txt").read_text(errors="replace")
    )
    reason = last_exception(printed) or last_exception(errors) or errors[0]
    if reason.endswith("unreachable"):  # and the sites saw it first
        return of_server
    if found := re.search(r"Result from (\S+) is bad, error code: (\w+)", reason):  # of a site elsewhere
        site, reason = found[1], f"{found[2]}, of which its own log says more"
    return f"{site} failed: {reason} (see {first.with_name('log.txt')})"


def last_exception(lines: list[str]) -> str | None:
    """Return the line of the last traceback that names its exception: the first one that is not indented."""
    exception = None
    for i, line in enumerate(lines):
        if line.startswith("Traceback (most recent call last)"):
            exception = next((text for text in lines[i + 1 :] if text and not text.startswith(" ")), None)
    return exception


# ---- Arguments, as types for argparse: whatever is wrong with them is said before anything is made ----


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {one_line(message)}\n")


def one_line(text: object) -> str:
    return " ".join(str(text).split())


def refuse(message: str) -> None:
    raise argparse.ArgumentTypeError(message)


def number(kind: type, low: float, high: float) -> Callable[[str], float]:
    """Return a type that takes a number of this kind from low to high."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high:  # so that nan fails, too
            refuse(f"{text} is not from {low} to {high}")
        return value

    parse.__name__ = kind.__name__  # argparse says "invalid int value"
    return parse


def client_script(text: str) -> Path:
    """Find a client script as given, or beside job.py, and see that it can be sent to the sites."""
    try:
        script = next(path.resolve() for path in (Path(text), HERE / text) if path.suffix == ".py" and path.is_file())
        with warnings.catch_warnings(), tokenize.open(script) as source:
            warnings.simplefilter("ignore")
            compile(source.read(), script, "exec")
    except (StopIteration, OSError):
        refuse(f"there is no Python file {text!r}")
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        refuse(f"{text!r} is not valid Python: {error}")
    model = script.with_name("model.py")
    if model.exists() and not model.samefile(HERE / "model.py"):  # a job holds one module of a name
        refuse(f"{text!r} has another model.py beside it: keep the script elsewhere, or run that folder's job.py")
    return script


def checkpoint(text: str) -> Path:
    """Check that a file holds finite weights of SimpleNetwork; no code in it is run."""
    import torch  # here, since exit_on_signals should come before it

    from model import SimpleNetwork

    file = Path(os.path.realpath(text))
    if not file.is_file() or file.suffix == ".py":  # the job holds it under its name, beside the scripts
        refuse(f"there is no checkpoint file {text!r}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            weights = torch.load(file, map_location="cpu", weights_only=True)
            weights = weights.get("model", weights)
            SimpleNetwork().load_state_dict(weights)
            finite = all(tensor.is_floating_point() and tensor.isfinite().all() for tensor in weights.values())
    except Exception as error:  # whatever a file may raise that isn't a checkpoint
        refuse(f"{text!r} holds no weights of SimpleNetwork: {one_line(error)[:200]}")
    if not finite:
        refuse(f"{text!r} holds weights that are not finite floating-point numbers")
    return file


def writable_folder(text: str) -> Path:
    """Check that a folder can be written, or made where it is missing."""
    try:
        folder = Path(text).expanduser().resolve()
        with contextlib.suppress(FileNotFoundError):
            folder.stat()
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        usable = bool(text) and existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
    except (OSError, RuntimeError, ValueError):  # among them: a name too long, a link to itself, a user unknown
        usable = False
    if not usable:
        refuse(f"can't write to {text!r}: choose another folder")
    return folder


def workspace_folder(text: str) -> Path:
    """Check that a simulation can use a folder, and that it is the only one to use what is in it."""
    folder = writable_folder(text)
    if not plain(folder):
        refuse(f"NVFlare's simulator can't take blanks, quotes, # or \\ in {str(folder)!r}")
    run_folder = folder / JOB_NAME
    if run_folder.is_symlink() or not run_folder.exists():
        return folder
    strange = not run_folder.is_dir() or [
        path.name for path in run_folder.iterdir() if not re.fullmatch(r"local|startup|poc|server|site-\d+", path.name)
    ]
    if strange:
        refuse(f"{run_folder} is not a simulation's folder, and would be lost: choose another one, or move it")
    return folder


def plain(path: object) -> bool:
    """Tell whether NVFlare 2.9.0's simulator can take a path: it puts it into a line that it splits as a shell does."""
    try:
        return shlex.split(str(path), True) == [str(path)]
    except ValueError:  # a quote without its other half
        return False


def export_folder(text: str) -> Path:
    """Check that a job can be written to a folder and replaces none."""
    folder = writable_folder(text)
    if os.path.lexists(folder / JOB_NAME):
        refuse(f"{folder / JOB_NAME} exists: move it, or choose another folder")
    return folder


def json_file(text: str) -> Path:
    """Check that a file can be written, and replaces none but an earlier run's: a mistaken name destroys nothing."""
    file = writable_folder(os.path.dirname(text) or ".") / os.path.basename(text)
    try:
        if os.path.lexists(file):
            report = json.loads(file.read_text() if file.is_file() and not file.is_symlink() else "")
            if not {"settings", "rounds", "models"} <= report.keys():
                raise ValueError
    except (OSError, ValueError, AttributeError, RecursionError):
        refuse(f"{text!r} is something else than an earlier run's JSON: choose another name")
    return file


def gpu_groups(text: str) -> str:
    """Check SimEnv's GPU configuration: 0,1 is two groups of one GPU, [0,1] is one group of two."""
    if not re.fullmatch(f"{GPU_GROUP}(,{GPU_GROUP})*", text):
        refuse(f"{text!r} is not a list such as 0 or 0,1 or [0,1],[2,3]")
    return text
