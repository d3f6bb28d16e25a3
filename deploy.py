"""Runs a job on a server and sites of their own, on this machine or anywhere. Skip this file while you simulate."""

import argparse
import json
import logging
import os
import socket
import sys
import time
from pathlib import Path

from nvflare.fuel.flare_api.api_spec import InvalidTarget
from nvflare.fuel.flare_api.flare_api import NoConnection, Session, new_secure_session
from nvflare.recipe import PocEnv, ProdEnv
from nvflare.recipe.spec import Recipe

import guard

POC_PORT = 8002  # of the server, by NVFlare's default
LOGIN_TIMEOUT = 20  # seconds
LOST_AFTER = 60  # seconds: NVFlare 2.9.0 waits 11 minutes for a killed site, and longer for one that is back


def deploy(args: argparse.Namespace, recipe: Recipe, run_folder: Path) -> Path:
    """Submit a job to a proof of concept or to a provisioned federation, and wait for its end.

    Returns:
        The folder of its results.

    Raises:
        OSError: there is no federation, it doesn't take the job, or loses too many sites; the message is one line.
        RuntimeError: the job failed; its results may hold the reason.
    """
    logging.disable()  # what NVFlare logs of a failed connection is in its exception, too
    if args.env == "poc":
        check_port(POC_PORT)
        os.umask(0o077)  # the proof of concept has private keys in it
        print(f"NVFlare's logs: {run_folder}/poc/example_project/prod_00/*/log.txt", flush=True)
        os.environ["NVFLARE_POC_WORKSPACE"] = str(run_folder / "poc")
        kit, user = run_folder / "poc" / "example_project" / "prod_00" / "admin@nvidia.com", "admin@nvidia.com"
        env = PocEnv(clients=args.sites, num_clients=args.n_clients, extra={"login_timeout": LOST_AFTER})
    else:
        kit, user = args.startup_kit, user_of(args.startup_kit)
        env = ProdEnv(str(kit), username=user, login_timeout=LOGIN_TIMEOUT)
    job_id = session = status = None
    try:
        job_id = recipe.execute(env).job_id
        session = new_secure_session(user, str(kit), timeout=LOGIN_TIMEOUT)
        status, lost = follow(session, job_id, args.n_clients, args.sites if args.split != "same" else None)
        results = Path(session.download_job_result(job_id, str(run_folder / "server"))) / "workspace"
    except guard.Stopped as stopped:
        if args.env == "poc" or not job_id:
            raise
        print(f"job.py: stopped; the federation goes on with job {job_id}", file=sys.stderr)
        sys.exit(stopped.code)
    except Exception as error:  # of NVFlare's many kinds
        if status:
            raise OSError(f"job {job_id} ended as {status}, but its results can't be fetched ({error})") from error
        after = f"; job {job_id} may go on" if job_id else ""
        raise ConnectionError(f"no connection to the federation, or refused by it ({error}): {kit}{after}") from error
    finally:
        if session:
            session.close()
    if lost:
        raise ConnectionError(f"{lost} (the results so far: {results})")
    if status != "FINISHED:COMPLETED":
        raise RuntimeError(f"the job ended as {status}")
    return results


def follow(session: Session, job_id: str, n_clients: int, names: list[str] | None) -> tuple[str, str]:
    """Show how a job gets on until it ends; abort it when it lacks a site for LOST_AFTER.

    Args:
        n_clients: how many sites the job needs at least.
        names: the sites that the job is for; None means all.

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
        sites = [site for site in sites if not names or site in names]
        if meta["status"] == "RUNNING":
            sites = [site for site in sites if at_work(session, job_id, site)]
        now = time.monotonic()
        last_seen.update(dict.fromkeys(sites, now))
        gone = sorted(site for site, when in last_seen.items() if now - when > LOST_AFTER)
        left, needed = len(last_seen) - len(gone), max(len(last_seen), n_clients)
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


def user_of(startup_kit: Path) -> str:
    """Return the user whose admin startup kit this is; raise OSError if it is something else."""
    try:
        user = json.loads((startup_kit / "startup" / "fed_admin.json").read_text())["admin"]["username"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        user = None
    if not isinstance(user, str):
        raise OSError(f"{startup_kit} is not an admin's startup kit: no startup/fed_admin.json with a user's name")
    return user


def check_port(port: int) -> None:
    """Raise OSError if a server listens on a port of this machine."""
    with socket.socket() as probe:
        if probe.connect_ex(("localhost", port)) == 0:
            raise OSError(
                f"port {port} of this machine is taken by another server, which has to end first: another run "
                "with --env poc, or what `nvflare poc start` left and `nvflare poc stop` ends"
            )
