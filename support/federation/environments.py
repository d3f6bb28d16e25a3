"""Where does a job run that isn't simulated? NVFlare's own PocEnv and ProdEnv, and what they need to run well."""

import argparse
import json
import logging
import os
import socket
from pathlib import Path

import nvflare.recipe
from nvflare.job_config.api import FedJob

from support.federation.follow import LOGIN_TIMEOUT, LOST_AFTER, follow_and_fetch
from support.process import Stopped

POC_PORT = 8002  # of the server, by NVFlare's default


class PocEnv(nvflare.recipe.PocEnv):
    """NVFlare's proof of concept, in the run's folder poc/: a server and clients as processes of their own."""

    def __init__(self, args: argparse.Namespace):
        os.environ["NVFLARE_POC_WORKSPACE"] = str(args.run_folder / "poc")
        super().__init__(clients=args.sites, num_clients=args.n_clients, extra={"login_timeout": LOST_AFTER})
        self.args = args

    def deploy(self, job: FedJob) -> str:
        with socket.socket() as probe:
            if probe.connect_ex(("localhost", POC_PORT)) == 0:
                raise OSError(f"port {POC_PORT} of this machine is taken by another server: try `nvflare poc stop`")
        Path(self.poc_workspace).mkdir(mode=0o700, parents=True)  # it will have private keys in it
        print(f"NVFlare's logs: {self.args.run_folder}/poc/*/prod_00/*/log.txt", flush=True)
        return submit(super().deploy, job, self.args.run_folder)

    def get_job_result(self, job_id: str, timeout: float = 0.0) -> str:
        return follow_and_fetch(job_id, self.username, self._get_admin_startup_kit_path(), self.args)


class ProdEnv(nvflare.recipe.ProdEnv):
    """A provisioned federation."""

    def __init__(self, args: argparse.Namespace):
        kit = args.startup_kit
        admin = json.loads((kit / "startup" / "fed_admin.json").read_text())["admin"]
        super().__init__(str(kit), LOGIN_TIMEOUT, admin["username"])
        self.args = args

    def deploy(self, job: FedJob) -> str:
        return submit(super().deploy, job, self.startup_kit_location)

    def get_job_result(self, job_id: str, timeout: float = 0.0) -> str:
        try:
            return follow_and_fetch(job_id, self.username, self.startup_kit_location, self.args)
        except Stopped as stopped:
            stopped.left = f"the federation goes on with job {job_id}"
            raise


def submit(deploy, job: FedJob, place: str | Path) -> str:
    """Submit a job to a federation; raise OSError, in one line, if it can't be reached or doesn't take the job."""
    logging.disable()  # what NVFlare logs of a failed connection is in its exception, too
    try:
        return deploy(job)
    except Exception as error:  # of NVFlare's many kinds
        raise ConnectionError(f"no connection to the federation, or refused by it ({error}): {place}") from error
