"""What a notebook's kernel does: it calls job.main() again and again, and goes on. test_notebook.py runs it.

Its arguments are the program's folder, the workspace, and the flags of a small run and of an endless one. It prints a
line of JSON for each run: its exit status, what it printed, and what of this process it left changed.
"""

import asyncio
import io
import json
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

REPO, WORKSPACE = sys.argv[1:3]
SMALL, ENDLESS = (flags.split() for flags in sys.argv[3:])
sys.path.insert(0, REPO)
sys.argv = ["ipykernel_launcher.py", "-f", "kernel.json"]

import job  # noqa: E402


def state():
    """Return what a run might leave changed."""
    root = logging.getLogger()
    return {
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "folder": os.getcwd(),
        "environment": dict(os.environ),
        "path": list(sys.path),
        "arguments": list(sys.argv),
        "streams": [sys.stdin, sys.stdout, sys.stderr],
        "temporary files": tempfile.gettempdir(),
        "logging": [list(root.handlers), root.level, root.manager.disable, logging.raiseExceptions],
    }


def run(*flags):
    sys.stdout = io.StringIO()  # as in a kernel, whose standard output is no file
    before, status = state(), 0
    try:
        job.main(["--dataset", "synthetic", "--workspace", WORKSPACE, *flags])
    except SystemExit as stop:
        status = stop.code
    after = state()
    output, sys.stdout = sys.stdout.getvalue(), sys.__stdout__
    changed = {name: [repr(before[name]), repr(after[name])] for name in before if after[name] != before[name]}
    print(json.dumps({"status": status, "output": output, "changed": changed}), file=sys.stderr, flush=True)


async def run_in_a_loop(*flags):
    other_work = asyncio.create_task(asyncio.sleep(0.1))
    run(*flags)
    await other_work


def interrupt_in_training(earlier_runs):
    """Do what a notebook's stop button does."""
    while len(list(Path(WORKSPACE).glob("hello-pt-*"))) < earlier_runs:
        time.sleep(0.1)
    while not all(trains(site) for site in ("site-1", "site-2")):
        time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGINT)


def trains(site):
    log = Path(WORKSPACE, "hello-pt", site, "log.txt")
    return log.exists() and "waiting for result" in log.read_text()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may ignore it
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    logging.getLogger().addHandler(logging.NullHandler())
    logging.getLogger().setLevel(logging.ERROR)
    run(*SMALL)
    asyncio.run(run_in_a_loop(*SMALL))
    threading.Thread(target=interrupt_in_training, args=(2,), daemon=True).start()
    run(*ENDLESS)
    run("--lr", "fast")
