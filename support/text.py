"""Texts in one line, and names that several modules share."""

import re
from pathlib import Path

from support.on_site.run_script import in_one_line

HERE = Path(__file__).resolve().parent.parent
JOB_NAME = "hello-pt"
MODULES = ["model.py", "data.py", "cifar10.py"]  # that a job holds beside the client script
CONTROLS = re.compile(r"\x1b(?!\[[0-9;]*m)|[\x00-\x08\x0a-\x1a\x1c-\x1f\x7f-\x9f]")  # all but tabs and colours


class JobFailed(Exception):
    """A job ended without the results that it was for."""


def one_line(text: str, most: int = 300) -> str:
    """Return a text without line ends and terminal codes, cut to a length."""
    text = " ".join(CONTROLS.sub(" ", re.sub(r"\x1b\[[0-9;]*m", "", text)).split())
    return text if len(text) <= most else text[:most] + " ..."


def describe(error: BaseException) -> str:
    """Return an exception in one line: type, text and place; or the text alone, if it is a message of ours.

    Ours are DataError, and plain OSErrors and ConnectionErrors without an errno.
    """
    ours = type(error) in (OSError, ConnectionError) or type(error).__name__ == "DataError"
    text = str(error) if ours and error.errno is None else ""
    return one_line(text or in_one_line(error), most=1_000)
