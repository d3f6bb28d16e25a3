"""Which site failed, and why? Read from NVFlare's logs: all that depends on the wording of NVFlare 2.9 stands here."""

import contextlib
import json
import re
import time
import traceback
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from support.progress import CONTROLS, is_printed

JOB_LOGS = ["server/log.json", "poc/*/*/server/*/log.json"]  # of a server that is at work on this machine
SERVER_LOGS = [*JOB_LOGS, "server/*/workspace/log.json", "poc/*/*/server/log.json"]
LOGS = ["*/log.json", "server/*/workspace/log.json", "poc/*/*/*/*/log.json"]  # simulated, downloaded, on this machine


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


def seconds_without_news(run_folder: Path) -> float:
    """Return how long a job's server has logged nothing: no task that it gave out, no result that it got."""
    with contextlib.suppress(OSError, StopIteration):  # there is none yet, or NVFlare has just deleted it
        return time.time() - next(logs_of(run_folder, JOB_LOGS)).stat().st_mtime
    return 0


def sites_at_work(run_folder: Path) -> list[str]:
    """Say of each site that owes the server a result for which task, and for how long."""
    at_work = {}
    for record in read_log(next(logs_of(run_folder, JOB_LOGS))):
        message, since = record["message"], datetime.strptime(record["asctime"], "%Y-%m-%d %H:%M:%S,%f")
        if found := re.search(r"Round (\d+) started", message):
            round_number = int(found[1]) + 1
        elif found := re.match(r"Sending task (\w+) to \[(.*)\]", message):
            at_work.update(dict.fromkeys(re.findall(r"[\w-]+", found[2]), (found[1], since)))
        elif found := re.search(r"assigned task to client (\S+): name=(\w+)", message):
            at_work[found[1]] = found[2], since
        elif found := re.search(r"got result from client (\S+) for", message):
            at_work.pop(found[1], None)
    lines = []
    for site, (task, since) in sorted(at_work.items()):
        what = f"round {round_number}" if task == "train" else f"the task {task}"
        seconds = (datetime.now() - since).total_seconds()
        lines.append(f"{site}: at work on {what} for {seconds:.0f} s")
    return lines


def reason_of_failure(run_folder: Path, error: Exception) -> str:
    """Say which site failed first, why, and where its log is."""
    if site := killed_site(run_folder):
        return f"{site} failed: its process was killed (see {run_folder / site / 'log.txt'})"
    of_server = f"server failed: {str(error).partition('. ')[0]}"
    if server_log := next(logs_of(run_folder, SERVER_LOGS), None):
        of_server += f" (see {server_log.with_suffix('.txt')})"
    logs = {log: read_log(log) for log in logs_of(run_folder, LOGS)}
    first_errors = {log: found[0]["asctime"] for log, records in logs.items() if (found := errors(records))}
    killed = re.search(r"return code (-|2[2-5]\d)", str(error))  # the simulator's, or its server's: -9, or 256 - 9
    if not first_errors or killed:
        return of_server
    log = min(first_errors, key=first_errors.get)
    site = next(part for part in log.relative_to(run_folder).parts if re.fullmatch(r"server|site-\d+", part))
    printed, logged = printed_in(logs[log]), [record["message"] for record in errors(logs[log])]
    raised = (last_exception(message.splitlines()) for message in logged)
    reason = last_exception(printed) or next(filter(None, raised), None) or one_line(logged[0])
    # "... exited (rc=2) before completing the HELLO handshake"
    if found := re.search(r"trainer process.* exited \(rc=(-?\d+)\)", reason):
        said = [line for line in printed if line.strip()]
        reason = f"its script ended with status {found[1]}: {one_line(said[-1]) if said else 'it printed nothing'}"
    if found := re.search(r"Result from (\S+) is bad, error code: (\w+)", "\n".join(logged)):  # in a server's log
        site, code = found[1], found[2]
        if code == "TASK_RESULT_FILTER_ERROR":  # by server.py
            reason = reason.removeprefix("ValueError: ")
        else:
            reason = f"{code}, of which its own log says more"
            for results in run_folder.glob("server/*/workspace"):
                if raised := exception_of(site, results):
                    return f"{site} failed: {raised} (see {results / site / 'log.json'})"
    return f"{site} failed: {reason} (see {log.with_suffix('.txt')})"


def exception_of(site: str, results: Path) -> str | None:
    """Return what a script in a federation raised, by what its site streamed of its log until the job ended."""
    return last_exception(printed_in(read_log(results / site / "log.json")))


def describe(error: Exception) -> str:
    """Say in one line what an exception in this process means, and which line of a user's own code it comes from."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    if isinstance(error, OSError) and error.errno is None and "/lib/python3" not in place.filename:
        return one_line(str(error), most=1_000)  # written for people
    lines = "".join(traceback.format_exception(error)).splitlines()
    return last_exception(lines, f" ({Path(place.filename).name}:{place.lineno})")


def logs_of(run_folder: Path, places: list[str]) -> Iterator[Path]:
    return (log for place in places for log in run_folder.glob(place))


def read_log(log: Path) -> list[dict]:
    with contextlib.suppress(OSError):
        return parse_log(log.read_text(errors="replace"))
    return []


def parse_log(text: str) -> list[dict]:
    """Return the records of a log.json that are complete: each has asctime, name, levelname and message."""
    records = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):  # half a line
            records.append(json.loads(line))
    return records


def printed_in(records: list[dict]) -> list[str]:
    return [record["message"] for record in records if is_printed(record["name"], record["message"])]


def errors(records: list[dict]) -> list[dict]:
    return [record for record in records if record["levelname"] in ("ERROR", "CRITICAL")]


def last_exception(lines: list[str], otherwise: str = "") -> str | None:
    """Return what was raised last, in one line, with its place in a user's own code, if that had a part in it."""
    if full := [line for line in lines if re.match(r"OSError: \[Errno (27|28)\]", line)]:
        return one_line(full[0])  # of which the exception of torch.save that follows says nothing
    raised = []
    for start in (i + 1 for i, line in enumerate(lines) if line.endswith("Traceback (most recent call last):")):
        end = next((i for i in range(start, len(lines)) if lines[i] and not lines[i].startswith(" ")), len(lines))
        message = [
            line for line in lines[end : end + 4] if not re.match("During handling of|The above exception", line)
        ]
        calls = (re.match(r' *File "(.+)", line (\d+)', line) for line in lines[start:end])
        own = [call for call in calls if call and not re.search(r"/lib/python3|/support/|/job\.py$|^<", call[1])]
        raised.append((one_line(" ".join(message)), f" ({Path(own[-1][1]).name}:{own[-1][2]})" if own else ""))
    placed = [(message, place) for message, place in raised if place]
    return "".join(placed[-1]) if placed else raised[-1][0] + otherwise if raised else None


def one_line(text: str, most: int = 300) -> str:
    """Return a text without line ends and terminal codes, cut to a length."""
    text = " ".join(CONTROLS.sub(" ", re.sub(r"\x1b\[[0-9;]*m", "", text)).split())
    return text if len(text) <= most else text[:most] + " ..."
