"""NVFlare's simulator, which ends when a site's process dies."""

import argparse
import contextlib
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import nvflare.recipe
import torch
from nvflare.fuel.utils.log_utils import default_log_dict
from nvflare.job_config.api import FedJob

from support.failure import dead_process, read_lost_sites
from support.process import kill_processes_of
from support.text import JobFailed

PATIENCE = 5  # seconds that a failed run has to end by itself


class SimEnv(nvflare.recipe.SimEnv):
    """NVFlare's simulator, in the run's folder: WORKSPACE/hello-pt."""

    def __init__(self, args: argparse.Namespace):
        os.environ.pop("NVFLARE_SIMULATOR_WORKSPACE_ROOT", None)  # would override --workspace
        super().__init__(
            clients=args.sites,
            num_threads=args.num_threads,
            gpu_config=",".join(args.gpu) or None,
            workspace_root=str(args.workspace),
        )
        self.run_folder = args.run_folder

    def deploy(self, job: FedJob) -> str:
        # NVFlare's log files keep everything, the screen shows less.
        handlers = {**default_log_dict["handlers"], "consoleHandler": {"class": "support.console.Console"}}
        self.log_config = os.path.join(os.environ["TMPDIR"], "log_config.json")
        Path(self.log_config).write_text(json.dumps({**default_log_dict, "handlers": handlers}))
        if self.gpu_config and not torch.cuda.is_available():
            print("WARNING: PyTorch finds no GPU here: the sites train on the CPU, in spite of --gpu.")
        print(f"NVFlare's logs: {self.run_folder}/*/log.txt", flush=True)
        over = threading.Event()
        threading.Thread(target=self.watch, args=(over,), daemon=True).start()
        try:
            with silent_errors():
                return super().deploy(job)
        except RuntimeError as error:
            raise JobFailed(error) from error
        finally:
            over.set()

    def get_job_result(self, job_id: str, timeout: float = 0.0) -> str:
        if read_lost_sites(self.run_folder):  # NVFlare 2.9.0's simulator may end well all the same
            raise JobFailed("a site was lost")
        return str(self.run_folder / "server" / "simulate_job")

    def watch(self, over: threading.Event) -> None:
        """End a run when a site's process died, or some seconds after a site failed.

        NVFlare 2.9.0 waits forever for a site whose process died. When a run fails, it waits a minute
        (shutdown_timeout) for scripts that are still training.
        """
        while not over.wait(1):
            lost = read_lost_sites(self.run_folder)
            if lost and over.wait(PATIENCE):
                break
            if lost or dead_process(self.run_folder):
                kill_processes_of(self.run_folder)


@contextlib.contextmanager
def silent_errors() -> Iterator[None]:
    """Write standard error nowhere, that of new processes too: NVFlare's logs have what matters."""
    with open(os.devnull, "w") as null, os.fdopen(os.dup(2), "w") as errors:
        os.dup2(null.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(errors.fileno(), 2)
