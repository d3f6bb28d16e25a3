"""What do a simulation's processes print, and what if nobody is there to read it, or it can't be written?"""

import contextlib
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator

from support.progress import to_show


def open_streams() -> None:
    """Close standard input, for nobody answers a client script, and open an output that was closed to nowhere."""
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:  # Python's sign of a closed one
            os.dup2(null, number)
            setattr(sys, name, open(number, "w"))  # noqa: SIM115
    sys.stdout.reconfigure(errors="backslashreplace")  # of a path that the encoding doesn't have


def failure_of_output(error: Exception) -> str:
    """Return why standard output can't be written, if that is what an exception says; let what is left go nowhere."""
    error = error.__cause__ or error
    if isinstance(error, OSError) and error.errno and not error.filename:
        try:
            os.write(1, b"\n")  # Python drops what it could not write, and says no more
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            return f"can't write to standard output: {error.strerror}"
    return ""


@contextlib.contextmanager
def relayed(stop: Callable[[], None]) -> Iterator[None]:
    """Print what is to be shown of what processes print that are started in here: NVFlare's log files have the rest.

    Its logging answers each record that it can't write with one more; then, or if we can't print, `stop` is called.

    Raises:
        OSError: something could not be written.
    """
    reading, writing = os.pipe()
    outputs = [os.dup(1), os.dup(2)]
    failures, over = [], threading.Event()

    def relay():
        shown, unwritable = True, False
        for line in open(reading, "rb"):  # noqa: SIM115
            if line.startswith(b"--- Logging error"):
                shown, unwritable = False, True
            elif line.startswith(b"Traceback "):
                shown = False
            elif found := re.match(rb"([A-Z]+) (\w+): (.*)", line):
                text = to_show(found[2].decode(), found[3].decode(errors="surrogateescape"))
                line = f"{text}\n".encode(errors="surrogateescape")
                shown, unwritable = text is not None and found[1] not in (b"ERROR", b"CRITICAL"), False
            if failures:
                continue
            if unwritable and (reason := re.search(rb"\[Errno \d+\] ([^:\n]*)", line)):
                failures.append(f"can't write NVFlare's logs: {reason[1].decode()}")
                stop()
            elif shown and not over.is_set():
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
