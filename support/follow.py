"""How does a job get on in a federation? Asked every two seconds, until it ends and its results are here."""

import time
from pathlib import Path

from nvflare.fuel.flare_api.api_spec import InvalidTarget
from nvflare.fuel.flare_api.flare_api import NoConnection, Session, new_secure_session

from support.failure import JobFailed, parse_log
from support.progress import to_show
from support.results import read_lost_sites

LOGIN_TIMEOUT = 20  # seconds
LOST_AFTER = 60  # seconds: NVFlare 2.9.0 waits 11 minutes for a killed site, and longer for one that is back


def follow_and_fetch(job_id: str, user: str, kit: str, run_folder: Path, min_sites: int) -> str:
    """Show how a job gets on until it ends, and fetch its results; return their folder.

    Raises:
        OSError: the job lost too many sites, or can't be followed; the message is one line.
        JobFailed: the job failed; its results may hold the reason.
    """
    session = status = None
    try:
        session = new_secure_session(user, kit, timeout=LOGIN_TIMEOUT)
        status, lost = follow(session, job_id, min_sites)
        results = Path(session.download_job_result(job_id, str(run_folder / "server"))) / "workspace"
    except Exception as error:  # of NVFlare's many kinds
        if status:
            raise OSError(f"job {job_id} ended as {status}, but its results can't be fetched ({error})") from error
        raise ConnectionError(f"no connection to the federation ({error}): {kit}; job {job_id} may go on") from error
    finally:
        if session:
            session.close()
    if status != "FINISHED:COMPLETED" and (events := read_lost_sites(results)) and not lost:
        lost = "; ".join(f"{site} {', '.join(what)}" for site, what in sorted(events.items()))
    if lost:
        raise ConnectionError(f"{lost} (the results so far: {results})")
    if status != "FINISHED:COMPLETED":
        raise JobFailed(f"the job ended as {status}")
    return str(results)


def follow(session: Session, job_id: str, min_sites: int) -> tuple[str, str]:
    """Show how a job gets on until it ends; abort it when it lacks a site that it needs for LOST_AFTER.

    Returns:
        The job's last status, and what was lost if it was aborted for that, else "".
    """
    start, last_seen, shown, lost = time.monotonic(), {}, set(), ""

    def look(session, job_id, meta):
        nonlocal lost
        for news in meta.get("schedule_history", []) if meta["status"] == "SUBMITTED" else [meta["status"]]:
            show_once(news, shown)
        sites = [client.name for client in session.get_connected_client_list()]
        if meta["status"] != "SUBMITTED":
            show_logs(session, job_id, sites, shown)
        if meta["status"] == "RUNNING":
            sites = [site for site in sites if at_work(session, job_id, site)]
        now = time.monotonic()
        last_seen.update(dict.fromkeys(sites, now))
        gone = sorted(site for site, when in last_seen.items() if now - when > LOST_AFTER)
        left = len(last_seen) - len(gone)
        if left < min_sites and now - start > LOST_AFTER and not lost:
            lost = f"only {left} of {max(len(last_seen), min_sites)} sites were there in the last {LOST_AFTER} s"
            lost += f", not {' and '.join(gone)}" if gone else ""
            session.abort_job(job_id)
        return True

    _, meta = session.monitor_job_and_return_job_meta(job_id, cb=look)
    return meta["status"], lost


def show_logs(session: Session, job_id: str, sites: list[str], shown: set) -> None:
    """Show what is new in the logs of a job's server and sites, as far as it isn't in `shown`."""
    logs = {}
    for place in ("server", *sites):  # NVFlare 2.9.0 leaves live logs out if it is asked for all at once
        logs[place] = session.get_job_logs(job_id, place, log_file_name="log.json")["logs"].get(place)
    news = []
    for record in parse_log("\n".join(filter(None, logs.values()))):
        message = to_show(record["name"], record["message"])
        if message is not None and (key := (record["asctime"], message)) not in shown:
            shown.add(key)
            news.append(key)
    for _, message in sorted(news):
        print(message, flush=True)
    for site in sites:
        if logs[site] is None and f"{site}  round" in (logs["server"] or ""):
            show_once(f"{site} sends no log, which its operator may have forbidden: what it prints isn't shown", shown)


def show_once(text: str, shown: set) -> None:
    if (text,) not in shown:
        print(text, flush=True)
        shown.add((text,))


def at_work(session: Session, job_id: str, site: str) -> bool:
    """Ask a site whether it works on a job."""
    try:
        return any(job.get("job_id") == job_id for job in session.get_client_job_status([site]) or [])
    except (NoConnection, InvalidTarget):  # no answer from the site, or it has just left
        return False
