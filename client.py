"""One site's local training: plain PyTorch, made federated by the twelve numbered FLARE lines."""

import argparse
import time

import nvflare.client as flare  # (1) the Client API
import torch
from nvflare.client.tracking import SummaryWriter  # (2) in place of torch.utils.tensorboard's
from torch.nn import functional as F

from data import add_data_flags, load_data, make_loader
from model import create_model


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


def main():
    args = parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = create_model().to(device)

    flare.init()  # (3) join the federation
    try:
        site_name = flare.get_site_name()  # (4) who am I?
        train_set, _ = load_data(args, site_name)
        writer = SummaryWriter()  # (5) its points go to the server

        while flare.is_running():  # (6) wait for the next task; False when the job has ended
            global_model = flare.receive()  # (7) what came with it: the global model
            model.load_state_dict(global_model.params)  # (8) start from its weights

            current_round, num_rounds = global_model.current_round, global_model.total_rounds  # (9) from 0
            train_loader = make_loader(train_set, args.batch_size, shuffle_by=(args.seed, site_name, current_round))
            steps = args.epochs * len(train_loader)  # a batch is a step
            place = f"{site_name}  round {current_round + 1}/{num_rounds}"
            train_loss = train(model, train_loader, args.epochs, args.lr, device, writer, current_round * steps, place)

            local_model = flare.FLModel(  # (10) the local model
                params=model.state_dict(),
                metrics={"train_loss": train_loss},
                meta={"NUM_STEPS_CURRENT_ROUND": steps},  # NVFlare's name of FedAvg's weight
            )
            flare.send(local_model)  # (11) to the server
    finally:
        flare.shutdown()  # (12) after an error too: FLARE's threads would keep a failed process alive


if __name__ == "__main__":
    main()
