"""Which site failed, and why? Read from NVFlare's logs: all that depends on the wording of NVFlare 2.9 stands here."""

import contextlib
import json
import re
from pathlib import Path

SERVER_LOGS = ["server/log.json", "server/*/workspace/log.json", "poc/*/*/server/log.json"]
LOGS = ["*/log.json", "server/*/workspace/log.json", "poc/*/*/*/*/log.json"]  # simulated, downloaded, on this machine
TRAINER = "ExternalProcessBackend"  # the logger of what a client script prints


class JobFailed(Exception):
    """A job ended without the results that it was for."""


def killed_site(run_folder: Path) -> str | None:
    """Return the name of a simulated site whose process died: NVFlare logs that, and waits for it for ever."""
    server = run_folder / "server"
    with contextlib.suppress(OSError):
        if (server / "error_log.txt").stat().st_size:  # else spare the longer log, since this is asked each second
            for record in errors(read_log(server / "log.json")):
                found = re.search(r" client ([\w-]+)", record["message"])
                if found and record["name"] == "SimulatorClientRunner":
                    return found[1]
    return None


def reason_of_failure(run_folder: Path, error: Exception) -> str:
    """Say which site failed first, why, and where its log is."""
    if site := killed_site(run_folder):
        return f"{site} failed: its process was killed (see {run_folder / site / 'log.txt'})"
    server_log = next((log for place in SERVER_LOGS for log in run_folder.glob(place)), None)
    of_server = f"server failed: {str(error).partition('. ')[0]}"
    if server_log:
        of_server += f" (see {server_log.with_suffix('.txt')})"
    logs = {log: read_log(log) for place in LOGS for log in run_folder.glob(place)}
    first_errors = {log: found[0]["asctime"] for log, records in logs.items() if (found := errors(records))}
    if not first_errors or "return code -" in str(error):  # the server's process died
        return of_server
    log = min(first_errors, key=first_errors.get)
    site = next(part for part in log.relative_to(run_folder).parts if re.fullmatch(r"server|site-\d+", part))
    printed = [record["message"] for record in logs[log] if record["name"] == TRAINER]
    logged = [line for record in errors(logs[log]) for line in record["message"].splitlines()]
    reason = last_exception(printed) or last_exception(logged) or logged[0]
    if found := re.search(r"Result from (\S+) is bad, error code: (\w+)", reason):  # of a site elsewhere
        site, reason = found[1], f"{found[2]}, of which its own log says more"
    return f"{site} failed: {reason} (see {log.with_suffix('.txt')})"


def read_log(log: Path) -> list[dict]:
    """Return the records of a log.json that are complete: each has asctime, name, levelname and message."""
    records = []
    with contextlib.suppress(OSError):
        for line in log.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):  # half a line
                records.append(json.loads(line))
    return records


def errors(records: list[dict]) -> list[dict]:
    return [record for record in records if record["levelname"] in ("ERROR", "CRITICAL")]


def last_exception(lines: list[str]) -> str | None:
    """Return the line of the last traceback that names its exception: the first one that is not indented."""
    exception = None
    for i, line in enumerate(lines):
        if line.startswith("Traceback (most recent call last)"):
            exception = next((text for text in lines[i + 1 :] if text and not text.startswith(" ")), None)
    return exception
