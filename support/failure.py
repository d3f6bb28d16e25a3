"""Which site failed, and why? All that depends on how NVFlare 2.9 words its logs stands here and in console.py."""

import argparse
import contextlib
import json
import re
import signal
from pathlib import Path

from support.console import is_printed
from support.on_site.run_script import ENDED
from support.text import one_line

KILLED = "its script was killed, or ended itself"
NOT_READY = "no attribute 'get_widget'"  # NVFlare 2.9.0's server, asked by show_stats while it starts or ends


def reason_of_failure(args: argparse.Namespace, error: Exception) -> str:
    """Say which sites failed, or that the server did, why, and where the log is.

    The surest evidence comes first: a dead process of a simulation, the sites that the server noted as lost, a signal
    that killed the server, what the server refused or raised, how a script ended, and then NVFlare's own error.
    """
    if dead := dead_process(args.run_folder):
        return dead
    server_log, see_server = find_log(args.run_folder)
    of_server = f"server failed: {str(error).partition('. ')[0]}{see_server}"
    lost = missing_sites(args.run_folder)
    if len(lost) > args.n_clients - args.min_sites:
        return "; ".join(f"{site} failed: {why_lost(args.run_folder, site, lost[site])}" for site in lost)
    if re.search(r"return code (-|2[2-5]\d)", str(error)):  # killed by a signal: -9, or 256 - 9, by the way it came
        return of_server
    for record in server_log:
        if record["levelname"] != "ERROR":
            continue
        raised = first_exception(record["message"])
        if record["name"] == "SimulatorRunner":  # what it refuses, such as a GPU that isn't there
            raised = raised or one_line(record["message"])
        if raised and not raised.endswith(NOT_READY):
            return f"server failed: {raised}{see_server}"
    return failed_script(args, job_failed=True) or of_server


def failed_script(args: argparse.Namespace, job_failed: bool) -> str:
    """Say which site's script failed, by how the scripts ended; return "" if none did, as far as it is known here."""
    lost = missing_sites(args.run_folder)  # the job went on without them
    # A federation's sites have names of their own. Those that sent a log have a folder in the results.
    sites = args.sites if args.env != "prod" else sorted({log.parent.name for log in log_files(args.run_folder, "*")})
    # NVFlare 2.9.0 itself kills the scripts of a job that failed and, with fewer --num_threads than sites, idle ones at
    # the end. In prod, the end of a log may be missing. In these cases, a script that seems killed proves nothing.
    kill_proves_nothing = job_failed or args.num_threads < args.n_clients or args.env == "prod"
    for site in (site for site in sites if site not in lost):
        log, see = find_log(args.run_folder, site)
        end = end_of_script(log)
        if end == KILLED:
            end = "" if kill_proves_nothing else f"{end}, or took longer than its 60 s after the last round"
        if end:
            return f"{site} failed: {end}{see}"
    return ""


def why_lost(run_folder: Path, site: str, event: list[str]) -> str:
    """Say why a site was left out or lost: what the server refused, or how its script ended, and where its log is."""
    log, see = find_log(run_folder, site)
    what, _, why = event
    if why:
        return why + see
    end = end_of_script(log)
    if what == "was lost" and end in (KILLED, ""):
        return f"it no longer answered{see}"
    if not log:
        return "its own log tells why (with --enable_log_streaming, sites send theirs)"
    return (end or "its script ended while the job went on") + see


def end_of_script(log: list[dict]) -> str:
    """Say how a client script ended, by its last line or its status; return "" if it ended well or there is no log.

    A log without either is that of a script that was KILLED.
    """
    printed = [r["message"] for r in log if is_printed(r["name"], r["levelname"], r["message"])]
    ends = [i for i, line in enumerate(printed) if line.startswith(ENDED)]
    if ends:
        end = printed[ends[-1]].removeprefix(ENDED)
        if not end.startswith("status "):
            return one_line(end)
        said = [line for line in printed[: ends[-1]] if line.strip()] or ["it printed nothing"]
        return "" if end == "status 0" else f"its script ended with {end}: {one_line(said[-1])}"
    errors = " ".join(record["message"] for record in log if record["levelname"] == "ERROR")
    codes = re.findall(r"exited \(rc=(-?\d+)\)", errors)
    if codes and int(codes[-1]) < 0:
        return f"its script was killed by {signal.Signals(-int(codes[-1])).name}"
    if codes:
        return f"its script ended itself with status {codes[-1]}"
    return KILLED if log else ""


def dead_process(run_folder: Path) -> str:
    """Say which process of a simulation died, or couldn't start: NVFlare 2.9.0 logs that, and waits forever."""
    # In the server's log: DATE TIME - SimulatorClientRunner - ERROR - Subprocess died for client site-2, exit code: -9
    died = r" - SimulatorClientRunner - ERROR - .* client ([\w-]+)"
    # In a process's own log: DATE TIME - MPM - ERROR - Execute exception: OSError: [Errno 98] Address already in use
    raised = (
        r" - (?:SimulatorClientRunner - ERROR - .*?|MPM - ERROR - Execute exception|"
        r"ClientTaskWorker - ERROR - ClientTaskWorker run error(?=: RuntimeError)): (.*)"
    )
    logs = {}
    for log in run_folder.glob("*/error_log.txt"):
        with contextlib.suppress(OSError):  # NVFlare renames a log that has grown long
            logs[log.parent.name] = log.read_text(errors="replace")
    dead = re.findall(died, logs.get("server", ""))[:1]
    for site in dead or logs:
        found = re.search(raised, logs.get(site, ""))
        if found or dead:
            reason = found[1] if found else "its process was killed"
            return f"{site} failed: {reason} (see {run_folder / site / 'log.txt'})"
    return ""


def read_lost_sites(run_folder: Path) -> dict[str, list[list[str]]]:
    """Read which sites were lost, in the order in which they were: {site: [[what, at what stage, why], ...]}."""
    for file in run_folder.glob("server/**/lost_sites.json"):
        with contextlib.suppress(ValueError):  # it is being written
            return json.loads(file.read_text())
    return {}


def missing_sites(run_folder: Path) -> dict[str, list[str]]:
    """Return what happened to the sites that are still missing: {site: [what, at what stage, why], ...}."""
    last_events = {site: events[-1] for site, events in read_lost_sites(run_folder).items()}
    return {site: event for site, event in last_events.items() if event[0] != "came back"}


def stop_cond(run_folder: Path) -> tuple[bool, bool]:
    """Tell whether FedAvg had a stop_cond (in a job.py that was changed), and whether that ended the job early.

    With one, FedAvg logs each round's mean, and saves only the best model so far.
    """
    log, _ = find_log(run_folder)
    said = "\n".join(record["message"] for record in log if record["name"] == "FedAvg")
    return " global metrics: " in said, "Stopping at round=" in said


def find_log(run_folder: Path, site: str = "server") -> tuple[list[dict], str]:
    """Return a log, and a hint where it is."""
    for log in log_files(run_folder, site):
        if records := parse_log(log.read_text(errors="replace")):
            text = log.with_suffix(".txt")  # easier to read, but not streamed
            return records, f" (see {text if text.exists() else log})"
    return [], ""


def log_files(run_folder: Path, site: str) -> list[Path]:
    """Return the logs of a site, or of all with "*": of a simulation, of poc, and downloaded from a federation.

    Those of a federation's sites are in folders with the sites' names.
    """
    downloaded = "workspace" if site == "server" else f"workspace/{site}"
    places = (f"{site}/log.json", f"poc/*/prod_00/{site}/*/log.json", f"server/*/{downloaded}/log.json")
    return [log for place in places for log in run_folder.glob(place)]


def parse_log(text: str) -> list[dict]:
    """Return the records of a log.json that are complete: each has asctime, name, levelname and message."""
    records = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):  # half a line, or what a site made up
            record = json.loads(line)
            records.append({key: str(record[key]) for key in ("asctime", "name", "levelname", "message")})
    return records


def first_exception(message: str) -> str | None:
    """Return what was raised first in the tracebacks of a log record, which led to the rest, with its place."""
    traceback = r"^Traceback \(most recent call last\):\n((?: .*\n)+)(.+(?:\n.+)*)"
    if not (found := re.search(traceback, message, re.MULTILINE)):
        return None
    calls = re.findall(r'^ *File "(.+)", line (\d+)', found[1], re.MULTILINE)
    own = [call for call in calls if not re.search(r"/lib/python3|/site-packages/|/support/|^<", call[0])]
    return one_line(found[2]) + (f" ({Path(own[-1][0]).name}:{own[-1][1]})" if own else "")
