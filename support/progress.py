"""What does a person see of a running job? What its scripts print, and what the server says of the rounds."""

import re

TRAINER = "ExternalProcessBackend"  # NVFlare 2.9.0's logger of what a client script prints, and of some lines more
LOGGERS = [TRAINER, "CrossSiteModelEval", "Rounds", "WholeLocalModels"]
CONSOLE_FORMAT = {"()": "nvflare.fuel.utils.log_utils.BaseFormatter", "fmt": "%(levelname)s %(name)s: %(message)s"}
CONTROLS = re.compile(r"\x1b(?!\[[0-9;]*m)|[\x00-\x08\x0a-\x1a\x1c-\x1f\x7f-\x9f]")  # but tab and colours


def is_printed(logger: str, message: str) -> bool:
    """Tell whether a record of a site's log is what its client script printed."""
    own = (
        r"\[ME=|launching external trainer \(launch |HELLO accepted from |trainer readiness confirmed from |"
        r"trainer session established: launch=|terminating trainer process group \(pgid="
    )
    return logger == TRAINER and not re.match(own, message)


def to_show(logger: str, message: str) -> str | None:
    """Return what is shown of a record in a job's logs, if anything."""
    if is_printed(logger, message) or logger in ("Rounds", "WholeLocalModels"):
        return CONTROLS.sub("", message)
    if logger == "CrossSiteModelEval" and message.startswith("Beginning model validation"):
        return "the sites evaluate the models"
    return None
