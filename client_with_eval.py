"""client.py plus evaluation: three lines changed (import, load_data, metrics), others added, FLARE's from (13) on."""

import argparse
import math
import time
from pathlib import Path

import nvflare.client as flare  # (1) the Client API
import torch
from nvflare.client.tracking import SummaryWriter  # (2) in place of torch.utils.tensorboard's
from torch.nn import functional as F

from data import add_data_flags, load_data, make_loader
from model import KEY_METRIC, create_model

# In this site's folder of the job. With fewer --num_threads than sites, NVFlare starts a new process for each task.
BEST_LOCAL_MODEL = Path("best_local_model.pt")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the model on one site; job.py sets the flags.")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--n_clients", type=int, default=2)  # among how many a --split deals the data out
    add_data_flags(parser)
    return parser.parse_args()


def train(model, train_loader, epochs, lr, device, writer, first_step, place):
    """Train for some epochs with SGD, print a line for each, and return the mean training loss, a float.

    Args:
        writer: takes `train_loss`, the mean cross-entropy since its last point, about ten times an epoch.
        first_step: how many optimizer steps came before; the points count on from there.
        place: what the lines begin with.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    log_interval = max(1, len(train_loader) // 10)
    losses = []
    model.train()
    for epoch in range(1, epochs + 1):
        start = time.monotonic()
        for images, labels in train_loader:
            images, labels = images.to(device), labels.to(device)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            if len(losses) % log_interval == 0:
                recent = torch.stack(losses[-log_interval:]).mean().item()
                writer.add_scalar("train_loss", recent, global_step=first_step + len(losses))
        epoch_loss = torch.stack(losses[-len(train_loader) :]).mean().item()
        print(f"{place}  epoch {epoch}/{epochs}  loss {epoch_loss:.4f}  {time.monotonic() - start:.0f} s")
    return torch.stack(losses).mean().item()


@torch.no_grad()
def evaluate(model, test_loader, device):
    """Return metrics over all test images by name, floats: accuracy in percent; loss, the mean cross-entropy."""
    model.eval()
    batches = [(model(images.to(device)).cpu(), labels) for images, labels in test_loader]
    logits, labels = (torch.cat(parts) for parts in zip(*batches))
    correct = (logits.argmax(dim=1) == labels).sum().item()
    return {"accuracy": 100 * correct / len(labels), "loss": F.cross_entropy(logits, labels).item()}


def keep_best(model, metrics):
    """Save the local model if it is the best so far; a process that is ended in between leaves the one before."""
    name, mode = KEY_METRIC
    score = math.nan if metrics[name] is None else metrics[name] if mode == "max" else -metrics[name]
    if BEST_LOCAL_MODEL.exists():
        best = torch.load(BEST_LOCAL_MODEL, weights_only=True)["score"]
        if math.isnan(score) or score <= best:  # nothing compares with NaN: a best that is NaN gives way to any number
            return
    unfinished = BEST_LOCAL_MODEL.with_suffix(".unfinished")
    torch.save({"score": score, "model": model.state_dict()}, unfinished)
    unfinished.replace(BEST_LOCAL_MODEL)


def main():
    args = parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = create_model().to(device)

    flare.init()  # (3) join the federation
    try:
        site_name = flare.get_site_name()  # (4) who am I?
        train_set, test_set = load_data(args, site_name)
        test_loader = make_loader(test_set, batch_size=1000)
        writer = SummaryWriter()  # (5) its points go to the server

        while flare.is_running():  # (6) wait for the next task; False when the job has ended
            global_model = flare.receive()  # (7) what came with it: the global model
            if flare.is_submit_model():  # (13) the server wants this site's best local model
                best = torch.load(BEST_LOCAL_MODEL, weights_only=True) if BEST_LOCAL_MODEL.exists() else {"model": {}}
                flare.send(flare.FLModel(params=best["model"]))  # (14) empty if it was never drawn to train
                continue
            model.load_state_dict(global_model.params)  # (8) start from its weights
            metrics = evaluate(model, test_loader, device)
            if flare.is_evaluate():  # (15) the server wants the metrics of this model and nothing else
                flare.send(flare.FLModel(metrics=metrics))  # (16)
                continue

            current_round, num_rounds = global_model.current_round, global_model.total_rounds  # (9) from 0
            for name, value in metrics.items():
                if value is not None:
                    writer.add_scalar(name, value, global_step=current_round)

            train_loader = make_loader(train_set, args.batch_size, shuffle_by=(args.seed, site_name, current_round))
            steps = args.epochs * len(train_loader)  # a batch is a step
            place = f"{site_name}  round {current_round + 1}/{num_rounds}"
            train_loss = train(model, train_loader, args.epochs, args.lr, device, writer, current_round * steps, place)
            keep_best(model, evaluate(model, test_loader, device))

            local_model = flare.FLModel(  # (10) the local model
                params=model.state_dict(),
                metrics={"train_loss": train_loss, **metrics},
                meta={"NUM_STEPS_CURRENT_ROUND": steps},  # NVFlare's name of FedAvg's weight
            )
            flare.send(local_model)  # (11) to the server
    finally:
        flare.shutdown()  # (12) after an error too: FLARE's threads would keep a failed process alive


if __name__ == "__main__":
    main()
