"""Federated averaging of SimpleNetwork: the recipe, and where it runs."""

import support.start  # isort: skip  # noqa: F401 - first: if the program can't begin, this ends it in one line

import argparse
import shlex
from pathlib import Path

from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.recipe import add_experiment_tracking
from nvflare.recipe.spec import ExecEnv
from nvflare.recipe.utils import add_cross_site_evaluation, add_final_global_evaluation

from data import prepare_data
from model import KEY_METRIC
from support import arguments, environments
from support.recipe import add_guards
from support.run import guarded

CLIENT = str(Path(__file__).resolve().with_name("client.py"))
WORKSPACE = "/tmp/nvflare/simulation"  # NVFlare's own default
EXPORT_HELP = "--export and --export-dir DIR are NVFlare's own: they write the job's folder instead of running the job."


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the command line, checked and complete; a mistake ends in one line and exit status 2."""
    types = arguments.types
    count = types.within(int, 1, 1_000_000)
    parser = arguments.OneLineParser(prog="job.py", allow_abbrev=False, description=__doc__, epilog=EXPORT_HELP)
    flag = parser.add_argument
    either = parser.add_mutually_exclusive_group().add_argument
    either("--n_clients", type=types.within(int, 1, 100), metavar="N", help="sites (default: 2)")
    either("--sites", type=types.site_name, nargs="+", metavar="NAME", help="their names (default: site-1 ... site-N)")
    flag("--num_rounds", type=count, default=2, metavar="N", help="federated rounds (default: %(default)s)")
    flag("--first_round", type=count, default=1, metavar="N", help="with --initial_ckpt: number of the next round")
    flag("--clients_per_round", type=count, metavar="N", help="sites that a round draws at random (default: all)")
    flag("--min_sites", type=count, metavar="N", help="not sim: go on while N sites are left (default: all)")
    flag("--num_threads", type=count, metavar="N", help="sim: sites that train at the same time (default: all)")
    flag("--train_script", type=types.client_script, default=CLIENT, metavar="F", help="default: client.py")
    flag("--train_args", type=shlex.split, default="", metavar="STRING", help='its flags: --train_args="--flag value"')
    flag("--cross_site_eval", action="store_true", help="at the end, test every site's model on every site's data")
    flag("--epochs", type=count, default=2, metavar="N", help="local epochs a round (default: %(default)s)")
    flag("--batch_size", type=count, default=16, metavar="N", help="images a step (default: %(default)s)")
    flag("--lr", type=types.within(float, 1e-9, 100), default=0.01, metavar="X", help="learning rate (default: 0.01)")
    flag("--seed", type=types.within(int, 0, 2**32 - 1), default=0, metavar="N", help="random seed (default: 0)")
    flag("--initial_ckpt", type=types.checkpoint, metavar="FILE", help="start from saved weights")
    flag("--gpu", type=types.gpu_groups, default=[], metavar="SPEC", help="sim: GPUs of the sites, such as 0 or 0,1")
    flag("--env", choices=["sim", "poc", "prod"], default="sim", help="see docs/real-sites.md (default: %(default)s)")
    flag("--startup_kit", type=Path, metavar="DIR", help="your admin startup kit, for --env prod")
    flag("--enable_log_streaming", action="store_true", help="prod, --export: sites send their logs to the server")
    flag("--workspace", type=types.folder, default=WORKSPACE, metavar="DIR", help="where results are kept")
    return arguments.parse(parser, argv)  # with the flags of data.py


def make_recipe(args: argparse.Namespace, data: dict) -> FedAvgRecipe:
    """FedAvg (McMahan et al. 2017, arXiv:1602.05629) of the model with the client script on every site."""
    key_metric, mode = KEY_METRIC
    recipe = FedAvgRecipe(
        name="hello-pt",  # JOB_NAME in support/text.py, too
        model={"class_path": "model.create_model", "args": {"seed": args.seed}},  # the server calls it
        initial_ckpt=args.initial_ckpt,
        min_clients=args.clients_per_round,  # how many sites a round draws
        num_rounds=args.num_rounds,
        train_script=str(args.train_script),
        train_args=arguments.script_flags(args, data),
        launch_external_process=True,  # each script is a process of its own, run by support/on_site/run_script.py
        launch_timeout=3600,  # seconds until the script calls flare.init
        shutdown_timeout=60,  # seconds for what the script does after the last round
        key_metric=key_metric,
        key_metric_mode=mode,
    )
    add_experiment_tracking(recipe, "tensorboard")
    if args.cross_site_eval:
        add_cross_site_evaluation(recipe)
    elif args.evaluates:  # the script calls flare.is_evaluate
        add_final_global_evaluation(recipe)
    add_guards(recipe, args)  # sets more of the recipe: see support/recipe.py
    return recipe


def make_env(args: argparse.Namespace) -> ExecEnv:
    """Choose where the recipe runs: NVFlare's environment of that name, with what support/ adds."""
    if args.env == "prod":
        return environments.ProdEnv(args)
    if args.env == "poc":
        return environments.PocEnv(args)
    return environments.SimEnv(args)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with guarded(args) as run:
        data = prepare_data(args)
        run.begin(data)
        recipe = make_recipe(args, data)
        env = make_env(args)
        job = recipe.execute(env)  # given --export, NVFlare writes the job's folder instead, and exits
        # Not NVFlare's job.get_result, which turns a failure into a warning.
        run.sum_up(env.get_job_result(job.job_id))


if __name__ == "__main__":
    main()
