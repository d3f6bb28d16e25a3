"""How does a job get on in a federation? Asked every two seconds, until it ends and its results are here."""

import argparse
import contextlib
import time
from pathlib import Path

from nvflare.fuel.flare_api.api_spec import AuthorizationError, JobNotRunning
from nvflare.fuel.flare_api.flare_api import Session, new_secure_session

from support.console import TRAINER, to_show
from support.failure import log_files, parse_log, read_lost_sites
from support.text import CONTROLS, JobFailed

LOGIN_TIMEOUT = 20  # seconds
LOST_AFTER = 60  # seconds without a connection
SITES_WITHIN = 60  # seconds in which enough sites must be there
STATS_WITHIN = 120  # seconds after which a job whose server gives no more stats is aborted


def follow_and_fetch(job_id: str, user: str, kit: str, args: argparse.Namespace) -> str:
    """Show how a job gets on until it ends, and fetch its results; return their folder.

    Raises:
        OSError: the job could not begin, lost its server, or can't be followed; the message is one line.
        JobFailed: the job failed; its results may hold the reason.
    """
    follower = Follower(job_id, args)
    results = None
    while not results and not follower.problem:
        try:
            with contextlib.closing(new_secure_session(user, kit, timeout=LOGIN_TIMEOUT)) as session:
                follower.follow(session)
                if not follower.problem:
                    results = Path(session.download_job_result(job_id, str(args.run_folder / "server"))) / "workspace"
        except Exception as error:  # of NVFlare's many kinds
            if status := follower.status:
                raise OSError(f"job {job_id} ended as {status}, but its results can't be fetched ({error})") from error
            if time.monotonic() - follower.last_answer > LOST_AFTER:
                raise ConnectionError(
                    f"no connection to the federation ({error}): {kit}; job {job_id} may go on"
                ) from error
            time.sleep(2)
    if follower.problem:
        raise ConnectionError(follower.problem)
    logs = log_files(args.run_folder, "server")  # they may hold lines that came after the last look
    if follower.streams:
        logs += log_files(args.run_folder, "*")
    follower.show_records([record for log in logs for record in parse_log(log.read_text(errors="replace"))])
    lost = read_lost_sites(args.run_folder) and args.min_sites < args.n_clients
    # NVFlare 2.9.0 calls a job that lost a site abnormal, even if it went on. read_results tells whether all is there.
    if follower.status == "FINISHED:COMPLETED" or lost:
        return str(results)
    raise JobFailed(f"the job ended as {follower.status}")


class Follower:
    """Shows how a job gets on; aborts one that lacks sites to begin with, or that waits for a lost site at its end."""

    def __init__(self, job_id: str, args: argparse.Namespace):
        self.job_id, self.args = job_id, args
        self.start = self.last_answer = time.monotonic()
        self.shown = set()
        self.streams = args.env == "poc" or args.enable_log_streaming
        self.server_start = self.last_stats = None
        self.status = None  # once the job has ended
        self.problem = ""  # why there are no results to fetch

    def follow(self, session: Session) -> None:
        _, meta = session.monitor_job_and_return_job_meta(self.job_id, cb=self.look)
        if meta:
            self.status = meta["status"]
        if self.status == "FINISHED:FAILED_TO_RUN":
            answers = session.get_job_meta(self.job_id).get("job_deploy_detail", [])
            refused = [answer for answer in answers if not answer.endswith(": OK")]
            self.problem = f"job {self.job_id} ended as {self.status}: {'; '.join(refused)}"

    def look(self, session: Session, job_id: str, meta: dict) -> bool:
        """Show what is new; return whether there is anything to wait for."""
        waiting = meta["status"] == "SUBMITTED"
        news = meta.get("schedule_history", []) if waiting else [meta["status"]]
        for text in news:
            self.show_once(text)
        system = session.get_system_info()
        self.last_answer = time.monotonic()
        if waiting or not self.server_start:
            self.server_start = system.server_info.start_time
        elif system.server_info.start_time != self.server_start:
            rounds = f"the rounds before are in {job_id}/app_server of the server's folder"
            self.problem = f"the server was started again, and doesn't go on with the job: {rounds}"
            return False  # NVFlare 2.9.0 calls the job RUNNING forever
        sites = [client.name for client in system.client_info]
        if not waiting:
            self.show_logs(session, sites)
            # Without stats, the job has ended at all sites but a lost one, for which NVFlare 2.9.0 waits 600 s. Abort
            # it, to get the results. The other sites' scripts have had their 60 s after the last round.
            if self.last_stats and self.last_answer - self.last_stats > STATS_WITHIN:
                session.abort_job(job_id)
        elif len(sites) < self.args.n_clients and self.last_answer - self.start > SITES_WITHIN:
            self.problem = f"after {SITES_WITHIN} s, only {len(sites)} of {self.args.n_clients} sites are there"
            session.abort_job(job_id)
            return False
        return True

    def show_logs(self, session: Session, sites: list[str]) -> None:
        """Show what is new in what the job's server says and its sites print."""
        said = []
        with contextlib.suppress(JobNotRunning, LookupError, TypeError):  # at its start and its end
            said = session.show_stats(self.job_id, "server")["server"]["rounds"]["said"]
            self.last_stats = time.monotonic()
        if self.streams:
            try:
                self.show_streamed_logs(session, sites)
            except AuthorizationError:  # by NVFlare 2.9.0's default, only a project_admin may
                self.streams = False
                self.show_once("you may not read the job's logs, and so what the sites print isn't shown")
        if not self.streams:  # the server's log has these lines, too
            for line in said:
                self.show_once(CONTROLS.sub("", line))

    def show_streamed_logs(self, session: Session, sites: list[str]) -> None:
        logs = {}
        for place in ("server", *sites):  # asked for all at once, NVFlare 2.9.0 leaves live logs out
            logs[place] = session.get_job_logs(self.job_id, place, log_file_name="log.json")["logs"].get(place)
        self.show_records(parse_log("\n".join(filter(None, logs.values()))))
        for site in sites:
            if logs[site] is None and f"{site}  round" in (logs["server"] or ""):
                self.show_once(f"{site} sends no log, which its operator may have forbidden")

    def show_records(self, records: list[dict]) -> None:
        """Show what is new in logs, in its order in time."""
        for record in sorted(records, key=lambda record: record["asctime"]):
            message = to_show(record["name"], record["levelname"], record["message"])
            if message is not None:
                when = record["asctime"] if record["name"] == TRAINER else ""  # a script may print the same again
                self.show_once(message, when)

    def show_once(self, text: str, when: str = "") -> None:
        if (text, when) not in self.shown:
            print(text, flush=True)
            self.shown.add((text, when))
