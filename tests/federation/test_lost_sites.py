"""What becomes of a job whose site is cut off from the network, or started again, in the middle of a round."""

import contextlib
import re
import subprocess

import pytest

from conftest import end_all, finish, running, start_job
from provisioned import LEAD, PARTICIPANTS, SERVER_ADDRESS, Federation, separate_hosts, set_cable


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    with contextlib.ExitStack() as stack:
        try:
            hosts = stack.enter_context(separate_hosts())
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"network namespaces need root and Debian's iproute2: {error}")
        federation = Federation(tmp_path_factory.mktemp("federation"), hosts)
        federation.provision(SERVER_ADDRESS)
        try:
            for participant in PARTICIPANTS:
                federation.start(participant)
            yield federation
        finally:
            end_all(federation.folder)


@pytest.mark.parametrize("accident", ["cut off", "started again"])
def test_job_that_loses_a_site_ends_with_its_name_and_the_rounds_before(federation, tmp_path, accident):
    known = federation.logs("server")
    flags = ["--env", "prod", "--startup_kit", str(federation.kit(LEAD)), "--n_clients", "3", "--num_rounds", "100000"]
    flags += ["--train_size", "200", "--epochs", "20"]  # rounds of a second or two
    process = start_job(tmp_path / "workspace", *flags)
    federation.wait_for("server", "Round 1 started", known)
    if accident == "cut off":
        set_cable("site-2", "down")
    else:
        for client in running(federation.folder, "python", "client_train", "prod_00/site-2"):
            client.kill()  # its start script starts it again
    run = finish(process, tmp_path / "workspace")
    if accident == "cut off":
        set_cable("site-2", "up")
    assert run.status == 1
    assert re.fullmatch(
        r"job\.py: error: only 2 of 3 sites were there in the last 60 s, not site-2 \(.*\)\n", run.errors
    )
    assert run.weights()
