"""Federated averaging of SimpleNetwork: the recipe, and where it runs. What guards it in support/, you can skip."""

import argparse
import os
from pathlib import Path

from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.recipe import add_experiment_tracking
from nvflare.recipe.spec import ExecEnv
from nvflare.recipe.utils import add_cross_site_evaluation, add_final_global_evaluation

from data import add_data_flags, check_data_flags, load_data, prepare_data
from model import KEY_METRIC, create_model
from support.arguments import OneLineParser, check, command_line
from support.environments import PocEnv, ProdEnv, SimEnv, guard_rounds, python_of, send_along
from support.folder import keep_earlier_results
from support.results import read_results
from support.run import guarded
from support.samples import show_data
from support.summary import sum_up

HERE = Path(__file__).resolve().parent
WORKSPACE = "/tmp/nvflare/simulation"  # NVFlare's own default
EXPORT_HELP = (
    "NVFlare's own flags: --export, or --export --export-dir DIR, writes the job folder instead of running it."
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the checked command line; `check` adds run_folder, evaluates (does the script?), export, sites."""
    parser = OneLineParser(prog="job.py", allow_abbrev=False, description=__doc__, epilog=EXPORT_HELP)
    flag = parser.add_argument
    flag("--n_clients", type=int, default=2, metavar="N", help="clients site-1 ... site-N (default: %(default)s)")
    flag("--num_rounds", type=int, default=2, metavar="N", help="federated rounds (default: %(default)s)")
    flag("--clients_per_round", type=int, metavar="N", help="train so many, drawn at random (default: all)")
    flag("--min_sites", type=int, metavar="N", help="go on while so many are left (default: all)")
    flag("--num_threads", type=int, metavar="N", help="clients that train at the same time (default: all)")
    flag("--train_script", default=HERE / "client.py", metavar="F", help="client script (default: client.py)")
    flag("--train_args", default="", metavar="STRING", help="more flags for it, after = and in quotes")
    flag("--cross_site_eval", action="store_true", help="in the end, every site's model on every site's data")
    flag("--epochs", type=int, default=2, metavar="N", help="local epochs a round (default: %(default)s)")
    flag("--batch_size", type=int, default=16, metavar="N", help="images a step (default: %(default)s)")
    flag("--lr", type=float, default=0.01, metavar="X", help="learning rate of SGD (default: %(default)s)")
    add_data_flags(parser)
    flag("--seed", type=int, default=0, metavar="N", help="of weights, shuffling and data (default: %(default)s)")
    flag("--initial_ckpt", metavar="FILE", help="start from saved weights")
    flag("--gpu", metavar="SPEC", help="GPUs that the clients use, such as 0 or 0,1 (default: the first)")
    flag("--env", choices=["sim", "poc", "prod"], default="sim", help="see docs/real-sites.md (default: %(default)s)")
    flag("--startup_kit", type=Path, metavar="DIR", help="your admin startup kit for --env prod")
    flag("--workspace", default=WORKSPACE, metavar="DIR", help="where the results are kept (default: %(default)s)")
    flag("--json", metavar="FILE", help="write all that the summary says as a JSON document, too")
    args = parser.parse_args(argv)
    check(args, parser, check_data_flags, create_model)
    return args


def make_recipe(args: argparse.Namespace) -> FedAvgRecipe:
    """FedAvg (McMahan et al. 2017, arXiv:1602.05629) of the model with the client script on every site."""
    key_metric, mode = KEY_METRIC
    recipe = FedAvgRecipe(
        name=args.run_folder.name,
        model={"class_path": "model.create_model", "args": {"seed": args.seed}},  # the server calls it
        initial_ckpt=args.initial_ckpt and os.path.relpath(args.initial_ckpt),  # NVFlare sends a relative path along
        min_clients=args.clients_per_round,  # so many are drawn for a round
        num_rounds=args.num_rounds,
        train_script=str(args.train_script),
        train_args=command_line(args, ["epochs", "batch_size", "lr", "seed", "n_clients"], add_data_flags),
        # True gives each script a process of its own, and the server hears of it if that dies. With False it runs in
        # NVFlare's client process, and NVFlare 2.9.0 waits for ever if that is killed.
        launch_external_process=True,
        command=f"{python_of(args)} -u",
        key_metric=key_metric if args.evaluates else "",
        key_metric_mode=mode,
    )
    send_along(recipe, args.train_script)
    guard_rounds(recipe, args)
    add_experiment_tracking(recipe, "tensorboard")
    if args.cross_site_eval:
        add_cross_site_evaluation(recipe)
    elif args.evaluates:
        add_final_global_evaluation(recipe)
    return recipe


def make_env(args: argparse.Namespace) -> ExecEnv:
    """Choose where the recipe runs: NVFlare's environment of that name, with what support/environments.py adds."""
    if args.env == "prod":
        return ProdEnv(args)
    if args.env == "poc":
        return PocEnv(args)
    return SimEnv(args.run_folder, num_clients=args.n_clients, num_threads=args.num_threads, gpu_config=args.gpu)


def main() -> None:
    args = parse_args()
    with guarded(args):
        create_model(args.seed)  # the server will; what is wrong with it shows here first
        name, warning = prepare_data(args)
        data = show_data(args, name, warning, load_data)
        keep_earlier_results(args)
        recipe = make_recipe(args)
        env = make_env(args)
        run = recipe.execute(env)  # given --export, NVFlare writes the job folder instead, and exits
        results = read_results(args, env.get_job_result(run.job_id), KEY_METRIC)
        sum_up(args, data, results)


if __name__ == "__main__":
    main()
