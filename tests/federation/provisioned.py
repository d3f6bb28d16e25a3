"""A provisioned federation on this machine: a server, three sites, mutual TLS, started by their own scripts."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Set
from pathlib import Path

import yaml

from conftest import REPO, wait_until

SITES = ["site-1", "site-2", "site-3"]
PARTICIPANTS = ["server", *SITES]
LEAD = "researcher@south.org"  # who submits jobs
BIN = Path(sys.executable).parent
NETWORK = "hello-pt"  # of separate_hosts
SERVER_ADDRESS = "10.213.77.2"


class Federation:
    """What docs/project.yml describes.

    Args:
        folder: where `nvflare provision -w` puts, or has put, the startup kits.
        hosts: what to put in front of a command to run it on a participant's host; None: all run on this one.
    """

    def __init__(self, folder: Path, hosts: dict[str, list[str]] | None = None):
        self.folder, self.hosts = folder, hosts or {}

    def provision(self, server_address: str) -> None:
        project = yaml.safe_load((REPO / "docs" / "project.yml").read_text())
        project["participants"][0]["default_host"] = server_address
        self.folder.mkdir(exist_ok=True)
        file = self.folder / "project.yml"
        file.write_text(yaml.safe_dump(project))
        subprocess.run([BIN / "nvflare", "provision", "-p", file, "-w", self.folder], check=True)
        self.set_up_job_store()

    def set_up_job_store(self) -> None:
        """Keep the server's jobs apart from those of other servers on this machine, and let it run one at a time.

        NVFlare's defaults are one store for all servers, and four jobs at a time.
        """
        resources = self.kit("server") / "local" / "resources.json.default"
        text = resources.read_text().replace('"/tmp/nvflare/', f'"{self.folder}/')
        assert '"max_jobs": 4' in text
        resources.write_text(text.replace('"max_jobs": 4', '"max_jobs": 1'))

    def kit(self, participant: str) -> Path:
        return self.folder / "hello-pt" / "prod_00" / participant

    @property
    def environment(self) -> dict[str, str]:
        """The environment of the federation's processes: this virtual environment's."""
        return {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}

    def here(self, command: str) -> str:
        """Return a command of docs/real-sites.md for this federation, each of whose sites has its own images."""
        command = command.replace("/tmp/nvflare/federation", str(self.folder))
        for site in SITES:
            command = command.replace("CIFAR10=/tmp/nvflare/data", f"CIFAR10={self.folder}/images-of-{site}", 1)
        return command

    def run(self, command: str, folder: Path = REPO, **env: str) -> str:
        """Run a command of docs/real-sites.md; return what it prints."""
        command = ["bash", "-ec", self.here(command)]
        env = self.environment | env
        return subprocess.run(command, cwd=folder, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout

    def job(self, *arguments: str | Path, person: str = LEAD) -> dict:
        """Run an `nvflare job` command, as somebody who has a kit; return what it says."""
        command = [BIN / "nvflare", "--format", "json", "job", *arguments, "--startup-kit", self.kit(person)]
        done = subprocess.run(command, env=self.environment, timeout=600, stdout=subprocess.PIPE, text=True)
        return json.loads(done.stdout.splitlines()[-1])

    def start(self, participant: str) -> None:
        command = [*self.hosts.get(participant, []), "bash", self.kit(participant) / "startup" / "start.sh"]
        subprocess.run(command, env=self.environment | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, check=True)
        self.wait_until_ready(participant)

    def wait_until_ready(self, participant: str) -> None:
        self.wait_for(participant, "Server started" if participant == "server" else "Successfully registered client")

    def logs(self, participant: str) -> set[Path]:
        """Return a participant's log and those of its jobs, which NVFlare deletes some time after their end."""
        return set(self.kit(participant).glob("**/log.txt"))

    def wait_for(self, participant: str, text: str, known: Set[Path] = frozenset()) -> None:
        """Wait until a text is in a participant's logs, but for those that are known."""
        wait_until(
            lambda: any(text in log.read_text() for log in self.logs(participant) - known),
            what=f"{text!r} in the log of {participant}",
        )


def prod(federation: Federation) -> list[str]:
    """Return the flags of job.py for a job of LEAD's on all sites."""
    return ["--env", "prod", "--startup_kit", str(federation.kit(LEAD)), "--n_clients", "3"]


@contextlib.contextmanager
def separate_hosts() -> Iterator[dict[str, list[str]]]:
    """Give the server, at SERVER_ADDRESS, and each site a network namespace; return them as Federation.hosts.

    Raises:
        OSError, subprocess.CalledProcessError: there is no `ip` here, or it may not do that.
    """

    def ip(command):
        subprocess.run(["ip", *command.split()], check=True)

    try:
        ip(f"link add {NETWORK} type bridge")
        ip(f"addr add 10.213.77.1/24 dev {NETWORK}")
        ip(f"link set {NETWORK} up")
        for i, participant in enumerate(PARTICIPANTS, start=2):
            ip(f"netns add {NETWORK}-{participant}")
            ip(f"link add {participant}.fl type veth peer name eth0 netns {NETWORK}-{participant}")
            ip(f"link set {participant}.fl master {NETWORK} up")
            ip(f"-n {NETWORK}-{participant} addr add 10.213.77.{i}/24 dev eth0")
            ip(f"-n {NETWORK}-{participant} link set eth0 up")
            ip(f"-n {NETWORK}-{participant} link set lo up")
        yield {participant: ["ip", "netns", "exec", f"{NETWORK}-{participant}"] for participant in PARTICIPANTS}
    finally:
        for participant in PARTICIPANTS:
            subprocess.run(["ip", "netns", "del", f"{NETWORK}-{participant}"])
        subprocess.run(["ip", "link", "del", NETWORK])


def set_cable(participant: str, state: str) -> None:
    """Plug the network cable of a participant with a host of its own in or out, "up" or "down"."""
    subprocess.run(["ip", "link", "set", f"{participant}.fl", state], check=True)
