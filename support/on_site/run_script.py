"""Run a client script, and print how it ended as the last line: python run_script.py SCRIPT [FLAG ...]"""

import contextlib
import os
import re
import runpy
import subprocess
import sys
import traceback
from pathlib import Path

import nvflare.client as flare

ENDED = "The client script has ended: "
FAILED_FOR, ENDED_FOR = 5, 60  # seconds that a script's processes may live on after its end
WATCH = """
import os, sys, time
group, seconds = map(int, sys.argv[1:])
for _ in range(seconds):
    time.sleep(1)
    os.killpg(group, 0)  # fails, and so ends this, when the group has ended
os.killpg(group, 9)
"""
MOST_RECEIVED = 10  # times that a script may receive one task


def main() -> None:
    del sys.argv[0]
    script, status, end = sys.argv[0], 0, ""
    sys.path[0] = str(Path(script).resolve().parent)  # where the script's own modules are
    watch_calls()
    try:
        with open(os.devnull) as nothing:
            sys.stdin = nothing  # nobody answers a script that asks
            runpy.run_path(script, run_name="__main__")
    except SystemExit as stop:
        status = stop.code or 0
        if not isinstance(status, int):
            print(status, file=sys.stderr)
            status = 1
    except BaseException as error:
        traceback.print_exc()
        status, end = 1, in_one_line(error)
    sys.stdout = sys.__stdout__  # a script may have put a file there
    print(f"\n{ENDED}{end or f'status {status}'}")  # \n: after a script's unfinished line
    end_group_within(FAILED_FOR if status else ENDED_FOR)
    with contextlib.suppress(Exception):
        flare.shutdown()  # which the script may have left out: NVFlare's threads would keep the process alive
    sys.exit(status)


def end_group_within(seconds: int) -> None:
    """Kill what is left of this process and of those that the script started, after some seconds.

    NVFlare 2.9.0 makes this process the leader of their group, and waits for the whole group without end. A thread, an
    atexit function or a child may never end.
    """
    nowhere = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    watch = [sys.executable, "-I", "-c", WATCH, str(os.getpid()), str(seconds)]
    subprocess.Popen(watch, start_new_session=True, **nowhere)


def watch_calls() -> None:
    """Let flare.send take more types, and end a script that doesn't answer a task.

    NVFlare gives a script the same task until it is answered.
    """
    receive, send = flare.receive, flare.send
    unanswered = 0  # times that a task was received since the latest answer

    def receive_some_times(*args, **kwargs):
        nonlocal unanswered
        task = receive(*args, **kwargs)
        if task is not None:  # None: the script's own timeout passed
            unanswered += 1
        if unanswered > MOST_RECEIVED:
            sys.exit(f"it received a task {MOST_RECEIVED} times without an answer: is flare.send missing?")
        return task

    def send_plain(model, *args, **kwargs):
        nonlocal unanswered
        unanswered = 0
        send(in_plain_types(model), *args, **kwargs)

    flare.receive = flare.api.receive = receive_some_times  # some scripts import them from flare.api
    flare.send = flare.api.send = send_plain


def in_plain_types(model: flare.FLModel) -> flare.FLModel:
    """Turn weights that are arrays or lists into tensors, and metrics and step counts into Python's own numbers.

    NVFlare 2.9.0 drops such weights, and fails to send or to save numbers that are tensors or NumPy's.
    """
    if isinstance(model.params, dict):
        import torch  # here: NVFlare 2.9.0's simulator imports console.py, and so this, and fails if torch is so early

        model.params = {name: torch.as_tensor(value) for name, value in model.params.items()}
    for numbers in (model.metrics or {}, model.meta or {}):
        for name, value in numbers.items():
            if hasattr(value, "item"):
                numbers[name] = value.item()
    return model


def in_one_line(error: BaseException) -> str:
    """Return an exception in one line: type, message, and the last place that isn't a library's."""
    message = f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
    places = traceback.extract_tb(error.__traceback__)
    own = [place for place in places if not re.search(r"/lib/python3|/site-packages/|/on_site/|^<", place.filename)]
    return message + (f" ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else "")


if __name__ == "__main__":
    main()
