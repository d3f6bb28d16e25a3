"""What do a simulation's processes print, and what if nobody is there to read it, or it can't be written?"""

import contextlib
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator


def open_streams() -> None:
    """Close standard input, for nobody answers a client script, and open an output that was closed to nowhere."""
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:  # Python's sign of a closed one
            os.dup2(null, number)
            setattr(sys, name, open(number, "w"))  # noqa: SIM115
    sys.stdout.reconfigure(errors="backslashreplace")  # of a path that the encoding doesn't have


def failure_of_output() -> str:
    """Return why standard output can't be written, "" if it can; then let Python's last flush go nowhere."""
    try:
        sys.stdout.flush()
        return ""
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return f"can't write to standard output: {error.strerror}"


@contextlib.contextmanager
def relayed(stop: Callable[[], None]) -> Iterator[None]:
    """Print what processes print that are started in here; call `stop` if they can't write their logs, or we can't.

    Left alone, NVFlare's logging answers each record that it can't write with a traceback of some 30 lines.

    Raises:
        OSError: something could not be written.
    """
    reading, writing = os.pipe()
    outputs = [os.dup(1), os.dup(2)]
    failures, over = [], threading.Event()

    def relay():
        swallowed = False  # in one of logging's tracebacks
        for line in open(reading, "rb"):  # noqa: SIM115
            if line.startswith(b"--- Logging error ---"):
                swallowed = True
            elif swallowed:
                swallowed = not line.startswith(b"Arguments: ")
                if (found := re.search(rb"\[Errno \d+\] ([^:\n]*)", line)) and not failures:
                    failures.append(f"can't write NVFlare's logs: {found[1].decode()}")
                    stop()
            elif not over.is_set() and not failures:
                try:
                    os.write(outputs[0], line)
                except OSError as error:
                    failures.append(f"can't write to standard output: {error.strerror}")
                    stop()

    thread = threading.Thread(target=relay, daemon=True)
    thread.start()
    sys.stdout.flush()
    for number in (1, 2):
        os.dup2(writing, number)
    os.close(writing)
    try:
        yield
    except SystemExit:  # a signal: what the processes say until they are ended is of no use
        over.set()
        raise
    finally:
        for number, output in zip((1, 2), outputs):
            os.dup2(output, number)
        if not over.is_set():
            thread.join(timeout=5)
        if failures:
            raise OSError(failures[0])
