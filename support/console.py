"""What does a person see of a running job? What its scripts print, and what the server says of the rounds."""

import contextlib
import logging
import os
import re

from support.on_site.run_script import ENDED
from support.text import CONTROLS

TRAINER = "ExternalProcessBackend"  # NVFlare 2.9.0's logger of what a client script prints, and of a few lines more
ROUNDS = "Rounds"  # the class in on_server/rounds.py, and so its logger


def is_printed(logger: str, level: str, message: str) -> bool:
    """Tell whether a record of a site's log is what its client script printed, and not a line of NVFlare's own."""
    of_nvflare = (
        r"launching external trainer \(launch |HELLO accepted from |trainer readiness confirmed from |"
        r"trainer session established: launch=|terminating trainer process group \(pgid=|"
        r"\[ME=|CJ heartbeat |streamed response from \S+ failed asynchronously: "  # in the script's process
    )
    return (logger, level) == (TRAINER, "INFO") and not re.match(of_nvflare, message)


def to_show(logger: str, level: str, message: str) -> str | None:
    """Return what is shown of a record in a job's logs, if anything."""
    if (logger, level) == (ROUNDS, "INFO") or (is_printed(logger, level, message) and not message.startswith(ENDED)):
        return CONTROLS.sub("", message)
    return None


class Console(logging.Handler):
    """Writes what is to be shown of a simulation to standard output. NVFlare applies it in each of its processes."""

    def emit(self, record: logging.LogRecord) -> None:
        logger = record.name.rpartition(".")[2]  # log.json has this part of the name alone
        text = to_show(logger, record.levelname, record.getMessage()) if logger in (TRAINER, ROUNDS) else None
        if text is not None:
            with contextlib.suppress(OSError):  # a closed output: job.py finds that out when it writes its summary
                os.write(1, f"{text}\n".encode(errors="surrogateescape"))
