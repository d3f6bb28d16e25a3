"""What does a recipe need beside NVFlare's defaults? The modules to send along, and the guards on server and sites."""

import argparse
import sys

import torch
from nvflare.app_common.logging.job_log_receiver import JobLogReceiver
from nvflare.app_common.logging.job_log_streamer import JobLogStreamer
from nvflare.recipe.spec import Recipe

from model import create_model
from support.on_server.rounds import Rounds
from support.on_server.site_starts import SiteStarts
from support.on_server.whole_models import WholeGlobalModels, WholeLocalModels, WholeSubmittedModels
from support.on_site.last_word import LastWord
from support.text import HERE, MODULES, describe

NAME_SLOW_AFTER = 120  # seconds after which the server names a site that is still at work on a task


def add_guards(recipe: Recipe, args: argparse.Namespace) -> None:
    """Send the script's modules. Let the server report rounds, refuse bad models and go on without lost sites."""
    check_model(create_model(args.seed).state_dict())  # as the server will make it
    send_along(recipe, args)  # comes first: adding a file makes NVFlare 2.9.0 create the executor that is changed below
    spare = args.n_clients - args.min_sites  # so many sites a round may lack
    job = recipe._job  # private, but NVFlare 2.9.0's own recipe.utils use it, too
    job.job.min_clients = args.n_clients  # to begin; then Rounds lowers it to min_sites
    server_app = job._deploy_map["server"].app_config
    fedavg = server_app.workflows[0].controller
    fedavg.start_round = args.first_round - 1
    fedavg._ignore_result_error = spare > 0  # go on without the result of a site that failed or was refused
    last_round = args.first_round - 1 + args.num_rounds
    job.to_server(Rounds(last_round, args.min_sites, args.seed, NAME_SLOW_AFTER))
    # A round draws clients_per_round sites, and `spare` of these may be missing.
    job.to_server(WholeGlobalModels(args.clients_per_round - spare), id="whole_global_models")
    server_app.components["persistor"].filter_id = "whole_global_models"
    job.to_clients(LastWord())
    recipe.add_server_input_filter(WholeLocalModels(), tasks=["train"])
    recipe.add_server_input_filter(WholeSubmittedModels(), tasks=["submit_model"])
    # A site counts as dead as soon as it is reported as dead. By default, NVFlare 2.9.0 waits 60 s after the report,
    # and 30 s after the start of each later round.
    recipe.add_server_config({"dead_client_grace_period": 0, "dead_client_check_lead_time": 0})
    executor = job._deploy_map["@ALL"].app_config.executors[0].executor  # of all sites
    # NVFlare 2.9.0 ends a job whose script is silent for 30 s, as in a long C call. No recipe has an argument for that.
    executor._heartbeat_timeout = 900  # seconds
    python = sys.executable if args.env in ("sim", "poc") and not args.export else "python3"
    # In place of NVFlare's own `python3 -u`, in front of the script's path and flags.
    executor._command[:2] = [python, "-u", "custom/support/on_site/run_script.py"]
    if args.env == "poc" or args.enable_log_streaming:
        # What recipe.enable_log_streaming() adds, but for dest_dir. Without it, NVFlare 2.9.0 writes live logs to the
        # folder for temporary files, and looks for them in the folder in which the job's server works.
        job.to_clients(JobLogStreamer(log_file_name="log.json"))  # has what scripts print
        job.to_server(JobLogReceiver(dest_dir="."))
    if args.env == "sim" and not args.export:
        job.to_server(SiteStarts())
        # Sites ask for work each 0.2 s, not each 2 s.
        recipe.add_server_config({"server": {"task_request_interval": 0.2}})


def check_model(weights: dict) -> None:
    """See that NVFlare can send what a network's state_dict holds; raise OSError if it can't."""
    for name, value in weights.items():
        try:
            (value.float() if value.dtype == torch.bfloat16 else value).numpy(force=True)  # as NVFlare does it
        except Exception as error:  # of a sparse, lazy, meta or float8 tensor, or of something else than a tensor
            raise OSError(f"{name} in the state_dict of create_model can't be sent: {describe(error)}") from error


def send_along(recipe: Recipe, args: argparse.Namespace) -> None:
    """Send the modules and packages that a client script needs, those beside it too."""
    # NVFlare 2.9.0 starts custom/<script's name>, but copies a script to custom/ plus its path below an entry of
    # sys.path. So its folder becomes an entry.
    sys.path.append(str(args.train_script.parent))
    for module in ["support/on_site/run_script.py", *MODULES]:
        recipe.add_client_file(str(HERE / module))
    # NVFlare 2.9.0 follows imports of modules, but not of packages.
    for file in [*HERE.glob("*/__init__.py"), *args.train_script.parent.glob("*/__init__.py")]:
        if file.parent.name != "support":  # NVFlare itself sends those files of it that a job needs
            recipe._job.add_file_to_clients(str(file.parent), dest_dir=file.parent.name)
