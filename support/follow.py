"""How does a job get on in a federation? Asked every two seconds, until it ends and its results are here."""

import argparse
import contextlib
import time
from pathlib import Path

from nvflare.fuel.flare_api.api_spec import AuthorizationError, InvalidTarget, JobNotRunning
from nvflare.fuel.flare_api.flare_api import NoConnection, Session, new_secure_session

from support.failure import JobFailed, exception_of, parse_log, read_log
from support.progress import TRAINER, to_show
from support.results import completed_rounds, load_final_model, read_lost_sites

LOGIN_TIMEOUT = 20  # seconds
LOST_AFTER = 60  # seconds: NVFlare 2.9.0 waits 11 minutes for a killed site, and longer for one that is back


def follow_and_fetch(job_id: str, user: str, kit: str, args: argparse.Namespace) -> str:
    """Show how a job gets on until it ends, and fetch its results; return their folder.

    Raises:
        OSError: the job lost too many sites or its server, or can't be followed; the message is one line.
        JobFailed: the job failed; its results may hold the reason.
    """
    follower = Follower(job_id, args.n_clients, args.min_sites)
    while True:
        session = None
        try:
            session = new_secure_session(user, kit, timeout=LOGIN_TIMEOUT)
            follower.follow(session)
            if follower.abandoned:
                break
            results = Path(session.download_job_result(job_id, str(args.run_folder / "server"))) / "workspace"
            break
        except Exception as error:  # of NVFlare's many kinds
            if status := follower.status:
                raise OSError(f"job {job_id} ended as {status}, but its results can't be fetched ({error})") from error
            if time.monotonic() - follower.last_answer > LOST_AFTER:
                raise ConnectionError(
                    f"no connection to the federation ({error}): {kit}; job {job_id} may go on"
                ) from error
            time.sleep(2)
        finally:
            if session:
                with contextlib.suppress(Exception):  # the server may be away
                    session.close()
    if follower.refused:
        raise ConnectionError(f"job {job_id} ended as {follower.status}: {'; '.join(follower.refused)}")
    if follower.abandoned:
        rounds = f"the rounds before are in {job_id}/app_server of the server's folder"
        raise ConnectionError(f"the server was started again, and doesn't go on with the job: {rounds}")
    follower.show_records(read_log(results / "log.json"))  # what came since it was last asked
    status, lost, events = follower.status, follower.lost, read_lost_sites(results)
    if status == "FINISHED:COMPLETED":  # also if it was to be aborted, too late
        return str(results)
    if events and args.min_sites < args.n_clients:
        if completed_rounds(load_final_model(results)) == args.num_rounds:
            # NVFlare 2.9.0 waits 900 s for a lost site to say how the job ended there, or calls the job abnormal.
            return str(results)
        lost = lost or "; ".join(story(site, what, results) for site, what in sorted(events.items()))
    if lost:
        raise ConnectionError(f"{lost} (the results so far: {results})")
    raise JobFailed(f"the job ended as {status}")


def story(site: str, events: list[str], results: Path) -> str:
    """Say what happened to a site, and why, if its script failed."""
    raised = exception_of(site, results) if events[-1].startswith("was left out") else None
    return f"{site} {', '.join(events)}" + (f" ({raised})" if raised else "")


class Follower:
    """Shows how a job gets on; aborts it when it lacks a site that it needs for LOST_AFTER."""

    def __init__(self, job_id: str, n_clients: int, min_sites: int):
        self.job_id, self.n_clients, self.min_sites = job_id, n_clients, min_sites
        self.start = self.last_answer = time.monotonic()
        self.last_seen, self.shown = {}, set()
        self.server_start = None
        self.status = None  # once the job has ended
        self.lost = ""  # what was lost, if the job was aborted for that
        self.abandoned = False  # was the server started again?
        self.refused = []  # what participants said that could not take the job

    def follow(self, session: Session) -> None:
        _, meta = session.monitor_job_and_return_job_meta(self.job_id, cb=self.look)
        if meta:
            self.status = meta["status"]
        if self.status == "FINISHED:FAILED_TO_RUN":
            answers = session.get_job_meta(self.job_id).get("job_deploy_detail", [])
            self.refused = [answer for answer in answers if not answer.endswith(": OK")]

    def look(self, session: Session, job_id: str, meta: dict) -> bool:
        """Show what is new; return whether there is anything to wait for."""
        for news in meta.get("schedule_history", []) if meta["status"] == "SUBMITTED" else [meta["status"]]:
            self.show_once(news)
        system = session.get_system_info()
        self.server_start = self.server_start or system.server_info.start_time
        if meta["status"] == "RUNNING" and system.server_info.start_time != self.server_start:
            self.abandoned = True  # NVFlare 2.9.0 doesn't take it up, and calls it RUNNING for ever
            return False
        sites = [client.name for client in system.client_info]
        if meta["status"] != "SUBMITTED":
            self.show_logs(session, sites)
        if meta["status"] == "RUNNING":
            sites = [site for site in sites if self.at_work(session, site)]
        now = self.last_answer = time.monotonic()
        self.last_seen.update(dict.fromkeys(sites, now))
        gone = sorted(site for site, when in self.last_seen.items() if now - when > LOST_AFTER)
        left, all_sites = len(self.last_seen) - len(gone), max(len(self.last_seen), self.n_clients)
        may_lose = meta["status"] == "RUNNING" and self.min_sites < self.n_clients
        if left < (self.min_sites if may_lose else all_sites) and now - self.start > LOST_AFTER and not self.lost:
            self.lost = f"only {left} of {all_sites} sites were there in the last {LOST_AFTER} s"
            self.lost += f", not {' and '.join(gone)}" if gone else ""
            session.abort_job(job_id)
        return True

    def show_logs(self, session: Session, sites: list[str]) -> None:
        """Show what is new of what a job's server says, and its sites print."""
        logs = {}
        try:
            for place in ("server", *sites):  # NVFlare 2.9.0 leaves live logs out if it is asked for all at once
                logs[place] = session.get_job_logs(self.job_id, place, log_file_name="log.json")["logs"].get(place)
        except AuthorizationError:  # by NVFlare 2.9.0's default, only a project_admin may
            self.show_once("you may not read the job's logs, and so what the sites print isn't shown")
            with contextlib.suppress(JobNotRunning, LookupError):  # at its start and its end
                for line in session.show_stats(self.job_id, "server")["server"]["rounds"]["said"]:
                    self.show_once(line)
            return
        self.show_records(parse_log("\n".join(filter(None, logs.values()))))
        for site in sites:
            if logs[site] is None and f"{site}  round" in (logs["server"] or ""):
                self.show_once(f"{site} sends no log, which its operator may have forbidden: its prints aren't shown")

    def show_records(self, records: list[dict]) -> None:
        """Show what is new in logs, in its order in time."""
        for record in sorted(records, key=lambda record: record["asctime"]):
            message = to_show(record["name"], record["message"])
            if message is not None:  # what a script prints, or is refused for, may be the same again later
                again = record["name"] in (TRAINER, "WholeLocalModels")
                self.show_once(message, when=record["asctime"] if again else "")

    def show_once(self, text: str, when: str = "") -> None:
        if (text, when) not in self.shown:
            print(text, flush=True)
            self.shown.add((text, when))

    def at_work(self, session: Session, site: str) -> bool:
        """Ask a site whether it works on the job."""
        try:
            jobs = session.get_client_job_status([site]) or []
        except (NoConnection, InvalidTarget):  # no answer from the site, or it has just left
            return False
        return any(job.get("job_id") == self.job_id for job in jobs)
