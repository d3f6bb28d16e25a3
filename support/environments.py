"""Where does it run? What a simulation, a proof of concept and a federation need beyond NVFlare's own environments."""

import argparse
import copy
import json
import logging
import os
import shlex
import socket
import sys
import time
from pathlib import Path

import nvflare.recipe
import torch
from nvflare.fuel.flare_api.api_spec import InvalidTarget
from nvflare.fuel.flare_api.flare_api import NoConnection, Session, new_secure_session
from nvflare.fuel.utils.log_utils import concise_log_dict
from nvflare.job_config.api import FedJob
from nvflare.recipe.spec import Recipe

from support.console import relayed
from support.failure import JobFailed
from support.run import HERE, kill_processes_of
from support.whole_models import WholeGlobalModels, WholeLocalModels

POC_PORT = 8002  # of the server, by NVFlare's default
LOGIN_TIMEOUT = 20  # seconds
LOST_AFTER = 60  # seconds: NVFlare 2.9.0 waits 11 minutes for a killed site, and longer for one that is back


def send_along(recipe: Recipe, script: Path) -> None:
    """Send the modules that a client script needs to the sites with it, from beside it or else from here."""
    # NVFlare 2.9.0 starts custom/<script's name>, but copies a script to its path below an entry of sys.path.
    sys.path.append(str(script.parent))
    for module in ("data.py", "cifar10.py", "model.py"):
        if not (script.parent / module).exists():
            recipe.add_client_file(str(HERE / module))


def refuse_parts(recipe: Recipe, min_sites: int) -> None:
    """Let the server refuse local models that aren't whole, and global models of fewer sites."""
    recipe.add_server_input_filter(WholeLocalModels(), tasks=["train"])
    recipe._job.to_server(WholeGlobalModels(min_sites), id="whole_global_models")  # as NVFlare 2.9.0's recipe.utils do


def python_of(args: argparse.Namespace) -> str:
    """Return the Python that runs the client script: this one, or on machines of their own the sites'."""
    return "python3" if args.export or args.env == "prod" else shlex.quote(sys.executable)


def share_cores(clients: int) -> None:
    """Let each client compute on its share of the cores: left alone, each takes all, and they spin on each other."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // clients)))


class SimEnv(nvflare.recipe.SimEnv):
    """NVFlare's simulator, in RUN_FOLDER, whose parent is the workspace and whose name is the job's."""

    def __init__(self, run_folder: Path, **kwargs):
        os.environ.pop("NVFLARE_SIMULATOR_WORKSPACE_ROOT", None)  # would override --workspace
        super().__init__(workspace_root=str(run_folder.parent), **kwargs)
        self.run_folder = run_folder

    def deploy(self, job: FedJob) -> str:
        share_cores(self.num_threads)
        job.to_server({"server": {"task_request_interval": 0.2}})  # clients ask for work each 0.2 s, not each 2 s
        self.log_config = str(self.quiet_console())
        print(f"NVFlare's logs: {self.run_folder}/*/log.txt", flush=True)
        try:
            with relayed(stop=lambda: kill_processes_of(self.run_folder)):
                return super().deploy(job)
        except RuntimeError as error:
            raise JobFailed(error) from error

    def get_job_result(self, job_id: str, timeout: float = 0.0) -> str:
        return str(self.run_folder / "server" / "simulate_job")

    def quiet_console(self) -> Path:
        """Make NVFlare show only the rounds and what clients print; its log files keep everything."""
        config = copy.deepcopy(concise_log_dict)
        config["filters"]["ConciseFilter"] = {
            "()": "nvflare.fuel.utils.log_utils.LoggerNameFilter",
            "logger_names": ["FedAvg", "CrossSiteModelEval", "ExternalProcessBackend"],
            "allow_all_error_logs": False,
        }
        file = self.run_folder / "local" / "log_config.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(config, indent=2))
        return file


class PocEnv(nvflare.recipe.PocEnv):
    """NVFlare's proof of concept, in RUN_FOLDER/poc: a server and clients as processes of their own."""

    def __init__(self, run_folder: Path, **kwargs):
        os.environ["NVFLARE_POC_WORKSPACE"] = str(run_folder / "poc")
        super().__init__(extra={"login_timeout": LOST_AFTER}, **kwargs)
        self.run_folder = run_folder

    def deploy(self, job: FedJob) -> str:
        with socket.socket() as probe:
            if probe.connect_ex(("localhost", POC_PORT)) == 0:
                raise OSError(f"port {POC_PORT} of this machine is taken by another server: try `nvflare poc stop`")
        share_cores(self.num_clients)
        os.umask(0o077)  # the proof of concept has private keys in it
        print(f"NVFlare's logs: {self.run_folder}/poc/*/prod_00/*/log.txt", flush=True)
        return submit(super().deploy, job, self.run_folder)

    def get_job_result(self, job_id: str, timeout: float = 0.0) -> str:
        kit = self._get_admin_startup_kit_path()
        return follow_and_fetch(job_id, self.username, kit, self.run_folder, self.num_clients)


class ProdEnv(nvflare.recipe.ProdEnv):
    """A provisioned federation, of which a job needs at least `num_clients` sites."""

    def __init__(self, run_folder: Path, num_clients: int, startup_kit_location: str):
        try:
            admin = json.loads(Path(startup_kit_location, "startup", "fed_admin.json").read_text())
            user = str(admin["admin"]["username"])
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            raise OSError(f"{startup_kit_location} is not an admin's startup kit: no startup/fed_admin.json") from error
        super().__init__(startup_kit_location, LOGIN_TIMEOUT, user)
        self.run_folder, self.num_clients = run_folder, num_clients

    def deploy(self, job: FedJob) -> str:
        return submit(super().deploy, job, self.startup_kit_location)

    def get_job_result(self, job_id: str, timeout: float = 0.0) -> str:
        kit = self.startup_kit_location
        try:
            return follow_and_fetch(job_id, self.username, kit, self.run_folder, self.num_clients)
        except SystemExit as stopped:
            stopped.left = f"the federation goes on with job {job_id}"
            raise


def submit(deploy, job: FedJob, place: str | Path) -> str:
    """Submit a job to a federation; raise OSError, in one line, if it can't be reached or doesn't take the job."""
    logging.disable()  # what NVFlare logs of a failed connection is in its exception, too
    try:
        return deploy(job)
    except Exception as error:  # of NVFlare's many kinds
        raise ConnectionError(f"no connection to the federation, or refused by it ({error}): {place}") from error


def follow_and_fetch(job_id: str, user: str, kit: str, run_folder: Path, num_clients: int) -> str:
    """Wait for a job's end and fetch its results; return their folder.

    Raises:
        OSError: the job lost too many sites, or can't be followed; the message is one line.
        JobFailed: the job failed; its results may hold the reason.
    """
    session = status = None
    try:
        session = new_secure_session(user, kit, timeout=LOGIN_TIMEOUT)
        status, lost = follow(session, job_id, num_clients)
        results = Path(session.download_job_result(job_id, str(run_folder / "server"))) / "workspace"
    except Exception as error:  # of NVFlare's many kinds
        if status:
            raise OSError(f"job {job_id} ended as {status}, but its results can't be fetched ({error})") from error
        raise ConnectionError(f"no connection to the federation ({error}): {kit}; job {job_id} may go on") from error
    finally:
        if session:
            session.close()
    if lost:
        raise ConnectionError(f"{lost} (the results so far: {results})")
    if status != "FINISHED:COMPLETED":
        raise JobFailed(f"the job ended as {status}")
    return str(results)


def follow(session: Session, job_id: str, num_clients: int) -> tuple[str, str]:
    """Show how a job gets on until it ends; abort it when it lacks a site for LOST_AFTER.

    Returns:
        The job's last status, and what was lost if it was aborted for that, else "".
    """
    start, last_seen, shown, lost = time.monotonic(), {}, set(), ""

    def look(session, job_id, meta):
        nonlocal lost
        for news in meta.get("schedule_history", []) if meta["status"] == "SUBMITTED" else [meta["status"]]:
            if news not in shown:
                print(news, flush=True)
                shown.add(news)

        sites = [client.name for client in session.get_connected_client_list()]
        if meta["status"] == "RUNNING":
            sites = [site for site in sites if at_work(session, job_id, site)]
        now = time.monotonic()
        last_seen.update(dict.fromkeys(sites, now))
        gone = sorted(site for site, when in last_seen.items() if now - when > LOST_AFTER)
        left, needed = len(last_seen) - len(gone), max(len(last_seen), num_clients)
        if left < needed and now - start > LOST_AFTER and not lost:
            lost = f"only {left} of {needed} sites were there in the last {LOST_AFTER} s"
            lost += f", not {' and '.join(gone)}" if gone else ""
            session.abort_job(job_id)
        return True

    _, meta = session.monitor_job_and_return_job_meta(job_id, cb=look)
    return meta["status"], lost


def at_work(session: Session, job_id: str, site: str) -> bool:
    """Ask a site whether it works on a job."""
    try:
        return any(job.get("job_id") == job_id for job in session.get_client_job_status([site]) or [])
    except (NoConnection, InvalidTarget):  # no answer from the site, or it has just left
        return False
