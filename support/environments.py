"""Where does it run? What a simulation, a proof of concept and a federation need beyond NVFlare's own environments."""

import argparse
import copy
import json
import logging
import os
import shlex
import socket
import sys
from pathlib import Path

import nvflare.recipe
import torch
from nvflare.fuel.utils.log_utils import concise_log_dict
from nvflare.job_config.api import FedJob
from nvflare.recipe.spec import Recipe

from support.console import relayed
from support.failure import JobFailed
from support.follow import LOGIN_TIMEOUT, LOST_AFTER, follow_and_fetch
from support.presence import Dispensable, Presence
from support.progress import CONSOLE_FORMAT, LOGGERS
from support.run import HERE, kill_processes_of
from support.server import LogsOfSites, Rounds, WholeBestModels, WholeGlobalModels, WholeLocalModels

POC_PORT = 8002  # of the server, by NVFlare's default


def send_along(recipe: Recipe, script: Path) -> None:
    """Send the modules that a client script needs to the sites with it, from beside it or else from here."""
    # NVFlare 2.9.0 starts custom/<script's name>, but copies a script to its path below an entry of sys.path.
    sys.path.append(str(script.parent))
    for module in ("data.py", "cifar10.py", "model.py"):
        if not (script.parent / module).exists():
            recipe.add_client_file(str(HERE / module))


def guard_rounds(recipe: Recipe, args: argparse.Namespace) -> None:
    """Let the server report the rounds, refuse models that aren't whole, and go on while args.min_sites sites are left.

    A round may lack as many of the sites that are drawn for it as the job may lose.
    """
    spare = args.n_clients - args.min_sites
    job = recipe._job  # NVFlare 2.9.0's own recipe.utils use it
    job.job.min_clients = args.n_clients  # to begin; the recipe's min_clients is also how many a round draws
    job.to_server(Rounds(args.num_rounds, args.min_sites, args.seed))
    job.to_server(WholeGlobalModels(args.clients_per_round - spare), id="whole_global_models")
    recipe.add_server_input_filter(WholeLocalModels(spare > 0), tasks=["train"])
    recipe.add_server_input_filter(WholeBestModels(), tasks=["submit_model"])
    if spare:
        job.to_server(Presence())
        job.to_clients(Dispensable())
        # A site that is reported as dead is dead at once, and in later rounds from their start: in NVFlare 2.9.0 60 s
        # after the report, and 30 s after the start of each round.
        recipe.add_server_config({"dead_client_grace_period": 0, "dead_client_check_lead_time": 0})
    if args.env != "sim":
        recipe.enable_log_streaming()  # of log.json, from where job.py reads how the sites get on
        job.to_server(LogsOfSites())  # which takes the place of the receiver that this adds


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
        """Make NVFlare print only what may be shown; its log files keep everything."""
        config = copy.deepcopy(concise_log_dict)
        config["formatters"]["consoleFormatter"] = CONSOLE_FORMAT
        config["filters"]["ConciseFilter"] = {
            "()": "nvflare.fuel.utils.log_utils.LoggerNameFilter",
            "logger_names": LOGGERS,
            "allow_all_error_logs": False,
        }
        file = self.run_folder / "local" / "log_config.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(config, indent=2))
        return file


class PocEnv(nvflare.recipe.PocEnv):
    """NVFlare's proof of concept, in RUN_FOLDER/poc: a server and clients as processes of their own."""

    def __init__(self, args: argparse.Namespace):
        os.environ["NVFLARE_POC_WORKSPACE"] = str(args.run_folder / "poc")
        super().__init__(num_clients=args.n_clients, extra={"login_timeout": LOST_AFTER})
        self.args = args

    def deploy(self, job: FedJob) -> str:
        with socket.socket() as probe:
            if probe.connect_ex(("localhost", POC_PORT)) == 0:
                raise OSError(f"port {POC_PORT} of this machine is taken by another server: try `nvflare poc stop`")
        share_cores(self.num_clients)
        os.umask(0o077)  # the proof of concept has private keys in it
        print(f"NVFlare's logs: {self.args.run_folder}/poc/*/prod_00/*/log.txt", flush=True)
        return submit(super().deploy, job, self.args.run_folder)

    def get_job_result(self, job_id: str, timeout: float = 0.0) -> str:
        kit = self._get_admin_startup_kit_path()
        return follow_and_fetch(job_id, self.username, kit, self.args)


class ProdEnv(nvflare.recipe.ProdEnv):
    """A provisioned federation."""

    def __init__(self, args: argparse.Namespace):
        kit = args.startup_kit
        try:
            admin = json.loads((kit / "startup" / "fed_admin.json").read_text())
            user = str(admin["admin"]["username"])
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            raise OSError(f"{kit} is not an admin's startup kit: no startup/fed_admin.json") from error
        super().__init__(str(kit), LOGIN_TIMEOUT, user)
        self.args = args

    def deploy(self, job: FedJob) -> str:
        return submit(super().deploy, job, self.startup_kit_location)

    def get_job_result(self, job_id: str, timeout: float = 0.0) -> str:
        try:
            return follow_and_fetch(job_id, self.username, self.startup_kit_location, self.args)
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
