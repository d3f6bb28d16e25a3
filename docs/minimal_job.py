"""The job's recipe by itself, without flags and guards: run `python -m docs.minimal_job` in the repository's folder."""

from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.recipe import SimEnv, add_experiment_tracking

recipe = FedAvgRecipe(
    name="hello-pt-minimal",
    model={"class_path": "model.create_model", "args": {"seed": 0}},  # the server calls it: a SimpleNetwork
    min_clients=2,
    num_rounds=2,
    train_script="client.py",
    train_args="--epochs 2 --batch_size 16 --lr 0.01 --dataset synthetic",
)
add_experiment_tracking(recipe, tracking_type="tensorboard")
env = SimEnv(num_clients=2, num_threads=1)  # NVFlare 2.9.0 may mix up two sites that start at the same moment
run = recipe.execute(env)
print("Results:", run.get_result())
